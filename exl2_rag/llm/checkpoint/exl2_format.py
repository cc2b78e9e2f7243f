"""EXL2 on disk: one linear layer's tensors, checked, decoded bit for bit, and packed.

    q_weight     [R, N]    I32   codes, 2 to 8 bits each, down the columns (see kernels/codes.py)
    q_groups     [2 * G]   I16   (bits, first packed row) of each group; rows follow from the next group's start
    q_scale      [G, N/8]  I32   a nibble (scale - 1) per group and column
    q_scale_max  [G]       F16   multiplier of each group, not yet divided by 256
    q_invperm    [K]       I32   the stored row of each input feature

    weight = half((code - 2**(bits - 1)) * half(scale² * half(scale_max * prescale / 256)))

Source: the storage format published with ExLlamaV2.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from exl2_rag.errors import CheckpointError
from exl2_rag.llm.kernels import codes as bit_codes
from exl2_rag.llm.kernels.reference import exl2_group_scales
from exl2_rag.llm.kernels.weights import CHUNK_ROWS, EXL2_WIDTHS, TILE_COLUMNS, Group, parse_groups

PARTS = ("q_weight", "q_groups", "q_scale", "q_scale_max", "q_invperm")
"""The tensors of a layer, `<key>.<part>`; `bias` may be beside them."""

_MAX_ROWS = 1 << 16  # row numbers are 16 bits wide in the format
_DECODE_COLUMNS = 1024  # columns decoded at a time: bounds the memory beside the result


def check(parts: Mapping[str, Tensor], key: str) -> list[Group]:
    """Refuse tensors that are not one EXL2 matrix; returns its groups.

    Raises:
        CheckpointError: says which tensor of `key` is wrong and how.
    """
    dtypes = {
        "q_weight": (torch.int32, 2),
        "q_groups": (torch.int16, 1),
        "q_scale": (torch.int32, 2),
        "q_scale_max": (torch.float16, 1),
        "q_invperm": (torch.int32, 1),
    }
    for name, (dtype, dims) in dtypes.items():
        if name not in parts:
            raise CheckpointError(f"{key}.{name} is missing; an EXL2 layer has {', '.join(PARTS)}")
        tensor = parts[name]
        if tensor.dtype != dtype or tensor.dim() != dims:
            raise CheckpointError(
                f"{key}.{name} must be {dtype} with {dims} dimension(s), "
                f"it is {tensor.dtype} of shape {list(tensor.shape)}"
            )
    packed_rows, out_features = parts["q_weight"].shape
    if out_features == 0 or out_features % TILE_COLUMNS:
        raise CheckpointError(f"{key}.q_weight must have a multiple of 32 columns, it has {out_features}")
    try:
        groups = parse_groups([number & 0xFFFF for number in parts["q_groups"].tolist()], packed_rows)
    except ValueError as error:
        raise CheckpointError(f"{key}.q_groups: {error}") from error
    for name, wanted in (("q_scale", (len(groups), out_features // 8)), ("q_scale_max", (len(groups),))):
        if parts[name].shape != wanted:
            raise CheckpointError(
                f"{key}.{name} must be {list(wanted)} for {len(groups)} groups and {out_features} columns, "
                f"it is {list(parts[name].shape)}"
            )
    if not bool(torch.isfinite(parts["q_scale_max"]).all()):
        raise CheckpointError(f"{key}.q_scale_max holds numbers that are not finite; the file is damaged")
    _check_permutation(parts["q_invperm"], sum(group.rows for group in groups), key)
    return groups


def _check_permutation(q_invperm: Tensor, in_features: int, key: str) -> None:
    if q_invperm.shape[0] != in_features:
        raise CheckpointError(
            f"{key}.q_groups describes {in_features} rows, but {key}.q_invperm has {q_invperm.shape[0]} entries"
        )
    if in_features > _MAX_ROWS:
        raise CheckpointError(f"{key} has {in_features} input features; the format allows {_MAX_ROWS}")
    lowest, highest = int(q_invperm.min()), int(q_invperm.max())
    if lowest < 0 or highest >= in_features:
        raise CheckpointError(
            f"{key}.q_invperm must hold the numbers 0 to {in_features - 1}, it runs from {lowest} to {highest}"
        )
    if bool((torch.bincount(q_invperm.to(torch.int64), minlength=in_features) != 1).any()):
        raise CheckpointError(f"{key}.q_invperm names a stored row twice; it must be a permutation")


def decode(parts: Mapping[str, Tensor], key: str, *, prescale: float) -> Tensor:
    """[K, N] float16: the weights of a layer, rows in the order of its inputs, padded columns included."""
    groups = check(parts, key)
    group_scales = exl2_group_scales(parts["q_scale_max"], prescale)
    stored_row = parts["q_invperm"].to(torch.int64)
    weight = torch.empty((len(stored_row), parts["q_weight"].shape[1]), dtype=torch.float16)
    for first in range(0, weight.shape[1], _DECODE_COLUMNS):
        last = first + _DECODE_COLUMNS
        words, scale_words = parts["q_weight"][:, first:last], parts["q_scale"][:, first // 8 : last // 8]
        weight[:, first:last] = bit_codes.dequantise(words, scale_words, group_scales, groups)[stored_row]
    return weight


def pack(
    codes: Tensor,
    scales: Tensor,
    scale_max: Tensor,
    groups: Sequence[tuple[int, int]],
    invperm: Tensor | None = None,
) -> dict[str, Tensor]:
    """The tensors of an EXL2 layer from its codes: the inverse of reading one.

    Args:
        codes: [K, N] integers in stored row order, 0 to 2**bits - 1 of their group. N is the padded width.
        scales: [G, N] integers, 1 to 16.
        scale_max: [G] float16.
        groups: (bits, rows) of each group, in order; widths must not rise.
        invperm: [K] int32, the stored row of each input feature; the same order if absent.

    Returns:
        `q_weight`, `q_groups`, `q_scale`, `q_scale_max` and `q_invperm`.

    Raises:
        CheckpointError: the arguments do not describe a matrix that the format can hold.
    """
    in_features, out_features = codes.shape
    if sum(rows for _, rows in groups) != in_features:
        raise CheckpointError(f"pack: groups must have {in_features} rows in all, they have {[r for _, r in groups]}")
    if out_features % TILE_COLUMNS or scales.shape != (len(groups), out_features):
        raise CheckpointError(
            f"pack: codes must be [K, N] with N a multiple of 32 and scales [{len(groups)}, N]; "
            f"they are {list(codes.shape)} and {list(scales.shape)}"
        )
    if int(scales.min()) < 1 or int(scales.max()) > 16:
        raise CheckpointError(f"pack: scales must be 1 to 16, they run from {int(scales.min())} to {int(scales.max())}")
    packed: list[Tensor] = []
    pairs: list[int] = []
    row = first_packed = 0
    for index, (bits, rows) in enumerate(groups):
        if bits not in EXL2_WIDTHS or rows <= 0 or rows % CHUNK_ROWS or first_packed >= 1 << 16:
            raise CheckpointError(
                f"pack: group {index} of {rows} rows and {bits} bits at packed row {first_packed} cannot be stored; "
                "rows must be a multiple of 32, bits 2, 3, 4, 5, 6 or 8, and the packed row less than 65536"
            )
        part = codes[row : row + rows]
        if int(part.min()) < 0 or int(part.max()) >= 1 << bits:
            raise CheckpointError(f"pack: codes of group {index} must be 0 to {(1 << bits) - 1}")
        packed.append(bit_codes.pack_codes(part, bits))
        pairs += [bits, first_packed]
        row += rows
        first_packed += rows * bits // CHUNK_ROWS
    order = torch.arange(in_features, dtype=torch.int32) if invperm is None else invperm.to(torch.int32).clone()
    signed_pairs = [number - (1 << 16) if number >= 1 << 15 else number for number in pairs]
    parts = {
        "q_weight": torch.cat(packed),
        "q_groups": torch.tensor(signed_pairs, dtype=torch.int16),
        "q_scale": bit_codes.pack_nibbles(scales.to(torch.int64) - 1),
        "q_scale_max": scale_max.to(torch.float16).clone(),
        "q_invperm": order,
    }
    check(parts, "pack")
    return parts
