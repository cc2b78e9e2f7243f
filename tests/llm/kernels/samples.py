"""Random inputs of the ops, at any size."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from exl2_rag.llm.checkpoint import pack
from exl2_rag.llm.kernels import kv_format, ops
from exl2_rag.llm.kernels.kv_format import QuantisedPages
from exl2_rag.llm.kernels.ops import Exl2Weights, GptqWeights, PlaneWeights

AWKWARD = (1, 2, 3, 7, 8, 15, 16, 17, 31, 33, 129)

MIXES = {
    "2": [(2, 64), (2, 32)],
    "3": [(3, 96)],
    "4": [(4, 128), (4, 32)],
    "5": [(5, 32), (5, 32)],
    "6": [(6, 64), (6, 64)],
    "8": [(8, 128)],
    "8/4": [(8, 32), (4, 128), (4, 96)],
    "6/3/2": [(6, 32), (3, 64), (2, 32)],
    "all": [(8, 32), (6, 64), (5, 32), (4, 128), (3, 32), (2, 32), (2, 32)],
}


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def exl2_parts(groups: list[tuple[int, int]], out_features: int, *, seed: int = 0, permuted: bool = True):
    """The on-disk tensors of a random matrix whose weights are around 0.1."""
    rng = generator(seed)
    in_features = sum(rows for _, rows in groups)
    codes = torch.cat([torch.randint(0, 1 << bits, (rows, out_features), generator=rng) for bits, rows in groups])
    scales = torch.randint(1, 17, (len(groups), out_features), generator=rng)
    scale_max = torch.tensor([0.4 / (1 << bits) for bits, _ in groups], dtype=torch.float16)
    invperm = torch.randperm(in_features, generator=rng) if permuted else None
    return pack(codes, scales, scale_max, groups, invperm)


def exl2_weights(groups: list[tuple[int, int]], out_features: int, **options) -> Exl2Weights:
    parts = exl2_parts(groups, out_features, **options)
    return ops.exl2_prepare(**parts)


def plane_weights(groups: list[tuple[int, int]], out_features: int, **options) -> PlaneWeights:
    return ops.exl2_prepare_planes(**exl2_parts(groups, out_features, **options))


def gptq_parts(in_features: int, out_features: int, n_groups: int, *, seed: int = 0, g_idx: Tensor | None = None):
    """The on-disk tensors of a random GPTQ matrix, as `ops.gptq_prepare` takes them."""
    rng = generator(seed)

    def words(*shape: int) -> Tensor:
        return torch.randint(-(1 << 31), 1 << 31, shape, generator=rng).to(torch.int32)

    scales = (torch.rand((n_groups, out_features), generator=rng) * 0.02).half()
    return words(in_features // 8, out_features), words(n_groups, out_features // 8), scales, g_idx


def gptq_weights(in_features: int, out_features: int, n_groups: int, *, seed: int = 0, act_order=False) -> GptqWeights:
    rng = generator(seed)
    g_idx = torch.randint(0, n_groups, (in_features,), generator=rng).to(torch.int32) if act_order else None
    return ops.gptq_prepare(*gptq_parts(in_features, out_features, n_groups, seed=seed, g_idx=g_idx))


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=generator(seed))


def attention_call(q, k_pages, v_pages, page_table, query_starts, context_lens, **options) -> tuple:
    """The arguments of `paged_attention`; options are fields of PagedBatch and Scoring, the scale 0.2 unless given."""
    of_scoring = {name: options.pop(name) for name in ops.Scoring.__slots__ if name in options}
    batch = ops.PagedBatch(page_table, query_starts, context_lens, **options)
    return q, k_pages, v_pages, batch, ops.Scoring(**{"softmax_scale": 0.2, **of_scoring})


def quantised_pages(pages: Tensor, bits: int) -> QuantisedPages:
    """The pages as they would be stored; rows that nobody owns stay poison."""
    codes, scales = kv_format.quantise(kv_format.rotate(pages), bits)
    return QuantisedPages(kv_format.pack_codes(codes, bits), scales)


def share_pages(page_table: Tensor, groups: list[int], prefix_pages: list[int]) -> dict[str, Tensor]:
    """Give the sequences of each group (their numbers in `groups`) the same leading pages; the fields of PagedBatch."""
    starts = [0]
    for size, pages in zip(groups, prefix_pages, strict=True):
        table = page_table[starts[-1] : starts[-1] + size]
        table[:, :pages] = table[:1, :pages].clone()
        starts.append(starts[-1] + size)
    prefix = torch.tensor(prefix_pages, dtype=torch.int32)
    return {"group_starts": torch.tensor(starts, dtype=torch.int32), "group_prefix_pages": prefix}


@dataclass
class AttentionCase:
    """A ragged batch over paged keys and values, and the same keys and values laid out per sequence."""

    q: Tensor
    k_pages: Tensor
    v_pages: Tensor
    page_table: Tensor
    query_starts: Tensor
    context_lens: Tensor
    keys: list[Tensor]
    values: list[Tensor]

    def arguments(self) -> tuple[Tensor, ...]:
        return (self.q, self.k_pages, self.v_pages, self.page_table, self.query_starts, self.context_lens)

    def alone(self, sequence: int, first: int, last: int) -> tuple[Tensor, ...]:
        """The arguments for rows first to last (counted within the sequence) as a batch of their own."""
        start, end = self.query_starts[sequence].item(), self.query_starts[sequence + 1].item()
        context = self.context_lens[sequence].item() - (end - start) + last
        return (
            self.q[start + first : start + last],
            self.k_pages,
            self.v_pages,
            self.page_table[sequence : sequence + 1],
            torch.tensor([0, last - first], dtype=torch.int32),
            torch.tensor([context], dtype=torch.int32),
        )


def attention_case(
    lengths: list[tuple[int, int]],
    *,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 32,
    page_size: int = 16,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> AttentionCase:
    """lengths: (new rows, tokens in the cache) of each sequence. Pages are dealt out in random order."""
    rng = generator(seed)
    counts = [-(-context // page_size) for _, context in lengths]
    n_pages = sum(counts) + 2
    order = torch.randperm(n_pages, generator=rng).to(torch.int32)
    page_table = torch.full((len(lengths), max([1, *counts])), -1, dtype=torch.int32)
    shape = (n_pages, page_size, kv_heads, head_dim)
    # What no sequence owns is poison: reading it must show.
    k_pages, v_pages = torch.full(shape, float("nan"), dtype=dtype), torch.full(shape, float("nan"), dtype=dtype)
    keys, values, taken = [], [], 0
    for index, (_, context) in enumerate(lengths):
        page_table[index, : counts[index]] = order[taken : taken + counts[index]]
        taken += counts[index]
        keys.append(torch.randn((context, kv_heads, head_dim), generator=rng).to(dtype))
        values.append(torch.randn((context, kv_heads, head_dim), generator=rng).to(dtype))
        for token in range(context):
            page = page_table[index, token // page_size]
            k_pages[page, token % page_size] = keys[-1][token]
            v_pages[page, token % page_size] = values[-1][token]
    rows = torch.tensor([0] + [count for count, _ in lengths]).cumsum(0).to(torch.int32)
    return AttentionCase(
        q=torch.randn((int(rows[-1]), heads, head_dim), generator=rng),
        k_pages=k_pages,
        v_pages=v_pages,
        page_table=page_table,
        query_starts=rows,
        context_lens=torch.tensor([context for _, context in lengths], dtype=torch.int32),
        keys=keys,
        values=values,
    )


def write_arguments(
    rows: int, *, bits: int, head_dim: int, rotary: int, dtype=torch.float32, heads=4, kv_heads=2, seed=0
):
    """The arguments of `quantise_kv_write` over three pages of 16 tokens."""
    q, k, v = (normal(rows, n, head_dim, seed=seed + n).to(dtype) for n in (heads, kv_heads, kv_heads + 1))
    v = v[:, :kv_heads]  # strided
    angles = torch.rand(40, rotary // 2, generator=torch.Generator().manual_seed(seed)) * 6
    positions = torch.arange(rows) * 3 % 40
    slots = torch.randperm(3 * 16, generator=torch.Generator().manual_seed(seed))[:rows]
    pages = [QuantisedPages.zeros(3, 16, kv_heads, head_dim, bits=bits, device=q.device) for _ in range(2)]
    return q, k, v, angles.cos(), angles.sin(), positions, slots, *pages


def assert_close(op: str, actual: Tensor, expected: Tensor) -> None:
    """Within the tolerance declared with the op."""
    tolerance = ops.TOLERANCES[op]
    torch.testing.assert_close(actual, expected, atol=tolerance.absolute, rtol=tolerance.relative)
