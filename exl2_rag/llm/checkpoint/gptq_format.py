"""GPTQ on disk: one linear layer's tensors, checked and decoded bit for bit. Four bits, groups along the inputs.

qweight  [K/8, N]  I32   code of row k, column n: nibble k % 8 of word [k // 8][n]
qzeros   [G, N/8]  I32   zero point of group g, column n: nibble n % 8 of word [g][n // 8], less one
scales   [G, N]    F16
g_idx    [K]       I32   optional: the group of each row; all zero counts as absent

weight = half((code - (zero + 1)) * scale), or (code - zero) where `checkpoint_format` is "gptq_v2"
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from exl2_rag.errors import CheckpointError
from exl2_rag.llm.kernels import reference
from exl2_rag.llm.kernels.weights import TILE_COLUMNS

PARTS = ("qweight", "qzeros", "scales")
"""The tensors of a layer; `g_idx` and `bias` may be beside them."""


def zero_offset(checkpoint_format: str | None) -> int:
    """What is added to a stored zero point: `checkpoint_format` is the one of `quantization_config`."""
    return 0 if checkpoint_format == "gptq_v2" else 1


def check(parts: Mapping[str, Tensor], key: str) -> None:
    """Refuse tensors that are not one 4-bit GPTQ matrix.

    Raises:
        CheckpointError: says which tensor of `key` is wrong and how.
    """
    for name in PARTS:
        if name not in parts:
            raise CheckpointError(f"{key}.{name} is missing; a GPTQ layer has {', '.join(PARTS)}")
        tensor = parts[name]
        dtypes = (torch.float16, torch.bfloat16, torch.float32) if name == "scales" else (torch.int32,)
        if tensor.dtype not in dtypes or tensor.dim() != 2:
            raise CheckpointError(
                f"{key}.{name} must be {' or '.join(map(str, dtypes))} with 2 dimensions, "
                f"it is {tensor.dtype} of shape {list(tensor.shape)}"
            )
    in_features, out_features = parts["qweight"].shape[0] * 8, parts["qweight"].shape[1]
    n_groups = parts["scales"].shape[0]
    if in_features == 0 or out_features == 0 or out_features % TILE_COLUMNS:
        raise CheckpointError(
            f"{key}.qweight must have rows and a multiple of 32 columns, its shape is {list(parts['qweight'].shape)}"
        )
    for name, wanted in (("scales", (n_groups, out_features)), ("qzeros", (n_groups, out_features // 8))):
        if n_groups == 0 or parts[name].shape != wanted:
            raise CheckpointError(
                f"{key}.{name} must be {list(wanted)} for {out_features} columns, it is {list(parts[name].shape)}; "
                "only 4-bit GPTQ is supported"
            )
    if not bool(torch.isfinite(parts["scales"]).all()):
        raise CheckpointError(f"{key}.scales holds numbers that are not finite; the file is damaged")
    if "g_idx" in parts:
        _check_row_groups(parts["g_idx"], in_features, n_groups, key)


def _check_row_groups(g_idx: Tensor, in_features: int, n_groups: int, key: str) -> None:
    if g_idx.dtype != torch.int32 or g_idx.shape != (in_features,):
        raise CheckpointError(
            f"{key}.g_idx must be int32 [{in_features}], it is {g_idx.dtype} of shape {list(g_idx.shape)}"
        )
    lowest, highest = int(g_idx.min()), int(g_idx.max())
    if lowest < 0 or highest >= n_groups:
        raise CheckpointError(f"{key}.g_idx must be 0 to {n_groups - 1}, it runs from {lowest} to {highest}")


def decode(parts: Mapping[str, Tensor], key: str, *, prescale: float, checkpoint_format: str | None) -> Tensor:
    """[K, N] float16: the weights of a layer."""
    check(parts, key)
    weights = reference.gptq_prepare(
        parts["qweight"],
        parts["qzeros"],
        parts["scales"],
        parts.get("g_idx"),
        prescale=prescale,
        zero_offset=zero_offset(checkpoint_format),
    )
    return reference.gptq_decode(weights, 0, weights.codes.shape[0])
