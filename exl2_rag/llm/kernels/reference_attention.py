"""The ops of attention and of the quantised cache in plain torch; see `reference.py` for what a reference is."""

from __future__ import annotations

import torch
from torch import Tensor

from exl2_rag.errors import ShapeError
from exl2_rag.llm.kernels import kv_format
from exl2_rag.llm.kernels.kv_format import QuantisedPages
from exl2_rag.llm.kernels.paged_batch import PagedBatch, Pages, Scoring


def check_range(op: str, name: str, numbers: Tensor, limit: int) -> None:
    """Refuse numbers outside 0 to limit - 1."""
    if numbers.numel() and not 0 <= int(numbers.min()) <= int(numbers.max()) < limit:
        raise ShapeError(
            f"{op}: {name} must be 0 to {limit - 1}, they run from {int(numbers.min())} to {int(numbers.max())}"
        )


def check_batch(starts: list[int], contexts: list[int], *, n_rows: int, limit_tokens: int) -> None:
    """Refuse a ragged batch whose lengths contradict each other or the page table."""
    if starts[0] != 0 or starts[-1] != n_rows:
        raise ShapeError(f"paged_attention: query_starts must run from 0 to {n_rows}, they are {starts}")
    for sequence, context in enumerate(contexts):
        count = starts[sequence + 1] - starts[sequence]
        if not 0 <= count <= context <= limit_tokens:
            raise ShapeError(
                f"paged_attention: sequence {sequence} has {count} new rows and {context} tokens in the cache; "
                f"rows must not outnumber tokens, nor tokens the {limit_tokens} that the page table can name"
            )


def rotate_half(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the first R of each head's D numbers; number i of the first half goes with number i of the second."""
    half = cos.shape[-1]
    first, second, rest = heads[..., :half], heads[..., half : 2 * half], heads[..., 2 * half :]
    return torch.cat((first * cos - second * sin, second * cos + first * sin, rest), dim=-1)


def paged_attention(q: Tensor, k_pages: Pages, v_pages: Pages, batch: PagedBatch, scoring: Scoring) -> Tensor:
    """Causal attention of each sequence's new rows over everything it has in the cache.

    Groups change what is read how often, not what comes out: they are checked, no more.
    """
    page_table, scale, sinks = batch.page_table, scoring.softmax_scale, scoring.sinks
    if batch.group_starts is not None and batch.group_prefix_pages is not None:
        check_groups(batch.group_starts.tolist(), batch.group_prefix_pages.tolist(), page_table)
    is_quantised = isinstance(k_pages, QuantisedPages)
    n_pages, page_size, n_kv_heads = (k_pages.codes if isinstance(k_pages, QuantisedPages) else k_pages).shape[:3]
    output = torch.zeros_like(q, memory_format=torch.contiguous_format)
    starts, contexts = batch.query_starts.tolist(), batch.context_lens.tolist()
    check_batch(starts, contexts, n_rows=q.shape[0], limit_tokens=page_table.shape[1] * page_size)
    for sequence, context in enumerate(contexts):
        first, last = starts[sequence], starts[sequence + 1]
        if last == first:
            continue
        pages = page_table[sequence, : -(-context // page_size)].to(torch.int64)
        check_range("paged_attention", "page_table entries in use", pages, n_pages)
        keys, values = (_gather(part, pages)[:context].double() for part in (k_pages, v_pages))
        queries = q[first:last].double().reshape(last - first, n_kv_heads, -1, q.shape[2])
        scores = torch.einsum("tkrd,skd->krts", queries, keys) * scale
        if scoring.softcap:
            scores = scoring.softcap * torch.tanh(scores / scoring.softcap)
        query_position = torch.arange(context - (last - first), context, device=q.device)[:, None]
        key_position = torch.arange(context, device=q.device)[None, :]
        hidden = key_position > query_position
        if scoring.sliding_window > 0:
            hidden |= key_position <= query_position - scoring.sliding_window
        scores = scores.masked_fill(hidden, float("-inf"))
        if sinks is not None:  # one more score a row, whose weight goes nowhere
            column = sinks.double().reshape(n_kv_heads, -1, 1, 1).expand(-1, -1, last - first, 1)
            scores = torch.cat((scores, column), dim=-1)
        weights = torch.softmax(scores, dim=-1)[..., :context]
        mixed = torch.einsum("krts,skd->tkrd", weights, values).flatten(1, 2)
        output[first:last] = (kv_format.rotate(mixed) if is_quantised else mixed).to(q.dtype)
    return output


def check_groups(group_starts: list[int], prefix_pages: list[int], page_table: Tensor) -> None:
    """Refuse groups that are not a partition of the batch, or that do not share the pages they say."""
    batch = page_table.shape[0]
    if group_starts[0] != 0 or group_starts[-1] != batch or sorted(group_starts) != group_starts:
        raise ShapeError(
            f"paged_attention: group_starts must rise from 0 to the {batch} sequences, they are {group_starts}"
        )
    for group, count in enumerate(prefix_pages):
        rows = page_table[group_starts[group] : group_starts[group + 1]]
        if not 0 <= count <= page_table.shape[1] or bool((rows[:, :count] != rows[:1, :count]).any()):
            raise ShapeError(f"paged_attention: the sequences of group {group} do not share {count} leading pages")


def quantise_kv_write(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    slot_mapping: Tensor,
    k_pages: QuantisedPages,
    v_pages: QuantisedPages,
) -> Tensor:
    """Rotate q and k by their positions and all three into the basis of the pages; write k and v; return q."""
    op = "quantise_kv_write"
    page_size = k_pages.codes.shape[1]
    check_range(op, "positions", positions, cos.shape[0])
    check_range(op, "slot_mapping", slot_mapping, k_pages.codes.shape[0] * page_size)
    row_cos, row_sin = cos[positions][:, None], sin[positions][:, None]
    page, row = slot_mapping // page_size, slot_mapping % page_size
    for vectors, pages in ((rotate_half(k.float(), row_cos, row_sin), k_pages), (v.float(), v_pages)):
        codes, scales = kv_format.quantise(kv_format.rotate(vectors), pages.bits)
        pages.codes[page, row] = kv_format.pack_codes(codes, pages.bits)
        pages.scales[page, row] = scales
    return kv_format.rotate(rotate_half(q.float(), row_cos, row_sin)).to(q.dtype)


def _gather(pages: Pages, indices: Tensor) -> Tensor:
    """[len * PS, KH, D] of the pages with these indices, as they are stored."""
    if isinstance(pages, QuantisedPages):
        chosen = QuantisedPages(pages.codes[indices], pages.scales[indices])
        return kv_format.dequantise_pages(chosen).flatten(0, 1)
    return pages[indices].flatten(0, 1)
