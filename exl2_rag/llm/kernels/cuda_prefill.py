"""Attention of steps with long prompts: library attention for sequences with many new rows, our kernel for the others.

`cuda_attention.paged_attention` computes any batch and gives a row the same bits in all of them; from a few hundred
rows on, library kernels are worth more than that. They are torch's own attention over keys and values gathered from the
pages, or, where the package is installed and the pages suit it, flash-attn, which reads the pages itself. So a row that
is computed in a slice of at least `MIN_ROWS` differs in the last bits from the same row computed in a smaller one. With
`min_rows` above any slice the kernel computes everything.

The lengths come from the host, so launch sizes are exact; steps that go here cannot be captured in a CUDA graph.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Sequence
from functools import cache
from itertools import groupby, pairwise
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

from exl2_rag.llm.kernels import cuda_attention, kv_format
from exl2_rag.llm.kernels.cuda_backend import Backend, ceil_div
from exl2_rag.llm.kernels.kv_format import QuantisedPages
from exl2_rag.llm.kernels.paged_batch import PagedBatch, Pages, Scoring

MIN_ROWS: Final = 256
"""New rows of a sequence from which on library attention takes it."""

SCRATCH_BYTES: Final = 256 << 20
"""Bound of the gathered keys and values; where one key head alone exceeds it, that one."""

_FLASH_PAGE_TOKENS: Final = 256  # pages that flash-attn reads have a multiple of this many tokens


def paged_attention(
    backend: Backend,
    q: Tensor,
    k_pages: Pages,
    v_pages: Pages,
    batch: PagedBatch,
    scoring: Scoring,
    *,
    host_starts: Sequence[int],
    host_contexts: Sequence[int],
    min_rows: int = MIN_ROWS,
) -> Tensor:
    """As `cuda_attention.paged_attention`, without groups.

    Args:
        host_starts, host_contexts: the contents of the batch's `query_starts` and `context_lens`.
        min_rows: new rows of a sequence from which on library attention takes it.
    """
    page_table, query_starts, context_lens = batch.page_table, batch.query_starts, batch.context_lens
    has_library = scoring.sinks is None and _suits_library(q, k_pages, scoring)

    def is_long(sequence: int) -> bool:
        return has_library and host_starts[sequence + 1] - host_starts[sequence] >= min_rows

    outputs = []
    for long, run in groupby(range(len(host_contexts)), key=is_long):
        sequences = list(run)
        first, last = sequences[0], sequences[-1] + 1
        rows = q[host_starts[first] : host_starts[last]]
        starts, contexts = host_starts[first : last + 1], host_contexts[first:last]

        def part(own_starts: Tensor, first: int = first, last: int = last, longest: int = max(contexts)) -> PagedBatch:
            return PagedBatch(page_table[first:last], own_starts, context_lens[first:last], max_context=longest)

        if long and _suits_flash(q, k_pages):
            outputs.append(
                _by_flash(
                    rows,
                    k_pages,
                    v_pages,
                    part(query_starts[first : last + 1] - starts[0]),
                    scoring,
                    max_rows=max(end - start for start, end in pairwise(starts)),
                )
            )
        elif long:
            for sequence, context in zip(sequences, contexts, strict=True):
                one = q[host_starts[sequence] : host_starts[sequence + 1]]
                outputs.append(_by_torch(one, k_pages, v_pages, page_table[sequence], context, scoring.softmax_scale))
        else:
            everything = len(sequences) == len(host_contexts)
            whole = part(query_starts if everything else query_starts[first : last + 1] - starts[0])
            outputs.append(cuda_attention.paged_attention(backend, rows, k_pages, v_pages, whole, scoring))
    return outputs[0] if len(outputs) == 1 else torch.cat([q[:0], *outputs])


def _suits_library(q: Tensor, k_pages: Pages, scoring: Scoring) -> bool:
    """Whether torch or flash-attn can take long sequences; what torch lacks, flash-attn may have."""
    stored = torch.float16 if isinstance(k_pages, QuantisedPages) else k_pages.dtype
    if stored != q.dtype:
        return False
    return (scoring.sliding_window == 0 and scoring.softcap == 0) or _suits_flash(q, k_pages)


def _suits_flash(q: Tensor, k_pages: Pages) -> bool:
    return (
        isinstance(k_pages, Tensor)
        and k_pages.dtype == q.dtype
        and q.dtype in (torch.float16, torch.bfloat16)
        and k_pages.shape[1] % _FLASH_PAGE_TOKENS == 0
        and _flash_attn() is not None
    )


@cache
def _flash_attn() -> Any:
    """The flash-attn package, or None where it is not installed."""
    if importlib.util.find_spec("flash_attn") is None:
        return None
    return importlib.import_module("flash_attn")


def _by_flash(
    q: Tensor, k_pages: Pages, v_pages: Pages, batch: PagedBatch, scoring: Scoring, *, max_rows: int
) -> Tensor:
    """[T, H, D] of a batch, causal with the last row at the last key."""
    window = scoring.sliding_window
    result: Tensor = _flash_attn().flash_attn_varlen_func(
        q,
        k_pages,
        v_pages,
        batch.query_starts,
        F.pad(batch.context_lens.cumsum(0, dtype=torch.int32), (1, 0)),
        max_rows,
        batch.max_context,
        softmax_scale=scoring.softmax_scale,
        causal=True,
        window_size=(window - 1 if window else -1, 0 if window else -1),
        softcap=scoring.softcap,
        block_table=batch.page_table.clamp(min=0).contiguous(),
    )
    return result


def _by_torch(
    q: Tensor, k_pages: Pages, v_pages: Pages, page_row: Tensor, context: int, softmax_scale: float
) -> Tensor:
    """[n, H, D] of one sequence, a few key heads at a time."""
    count, heads, head_dim = q.shape
    page_size, kv_heads = (k_pages.codes if isinstance(k_pages, QuantisedPages) else k_pages).shape[1:3]
    repeats = heads // kv_heads
    pages = page_row[: ceil_div(context, page_size)].to(torch.int64)
    # Twice while numbers of quantised pages are in the making.
    head_bytes = 2 * context * head_dim * q.element_size() * (4 if isinstance(k_pages, QuantisedPages) else 1)
    step = max(1, min(kv_heads, SCRATCH_BYTES // max(1, head_bytes)))
    mask: Any = causal_lower_right(count, context)
    result = torch.empty_like(q, memory_format=torch.contiguous_format)
    for first in range(0, kv_heads, step):
        last = min(kv_heads, first + step)
        keys, values = (_gather(part, pages, first, last)[:context] for part in (k_pages, v_pages))
        # Key heads are the batch; the query heads of one share its keys, which are not copied for each.
        queries = q[:, first * repeats : last * repeats].reshape(count, -1, repeats, head_dim).permute(1, 2, 0, 3)
        shared_keys, shared_values = (
            part.permute(1, 0, 2)[:, None].expand(-1, repeats, -1, -1) for part in (keys, values)
        )
        mixed = F.scaled_dot_product_attention(queries, shared_keys, shared_values, attn_mask=mask, scale=softmax_scale)
        result[:, first * repeats : last * repeats] = mixed.permute(2, 0, 1, 3).flatten(1, 2)
    if isinstance(k_pages, QuantisedPages):
        return kv_format.rotate(result).to(q.dtype)
    return result


def _gather(pages: Pages, indices: Tensor, first: int, last: int) -> Tensor:
    """[len * PS, last - first, D]: these pages and key heads, as they are stored."""
    if isinstance(pages, QuantisedPages):
        chosen = QuantisedPages(pages.codes[:, :, first:last][indices], pages.scales[:, :, first:last][indices])
        return kv_format.dequantise_pages(chosen).flatten(0, 1)
    return pages[:, :, first:last][indices].flatten(0, 1)
