"""Calls into the C++ library for attention over pages; as `cpu_ops.py`, whose helpers it uses."""

from __future__ import annotations

import ctypes

from torch import Tensor

from exl2_rag.errors import ShapeError
from exl2_rag.llm.kernels import kv_format, reference_attention, work_memory
from exl2_rag.llm.kernels.cpu_ops import DTYPES, at, at_or_null, call, structure
from exl2_rag.llm.kernels.paged_batch import PagedBatch, Scoring

_CODES = {8: 3, 6: 4, 4: 5}  # bits of quantised pages, as ops.h numbers them

_PagedAttention = structure(
    "PagedAttention",
    "*:q *:k_pages *:v_pages *:k_scales *:v_scales i:dtype *:page_table *:query_starts *:context_lens *:group_starts "
    "*:group_prefix_pages l:rows l:heads l:kv_heads l:dim l:n_pages l:page_size l:batch l:table_width l:n_groups "
    "f:softmax_scale l:window f:softcap *:sinks f:rotation_factor *:y",
)
_QuantiseKvWrite = structure(
    "QuantiseKvWrite",
    "*:q *:k *:v *:cos *:sin *:positions *:slots l:rows l:heads l:kv_heads l:dim l:n_positions l:half l:n_slots "
    "*:k_codes *:k_scales *:v_codes *:v_scales i:bits f:rotation_factor *:q_rotated",
)


def paged_attention(
    library: ctypes.CDLL,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_scales: Tensor | None,
    v_scales: Tensor | None,
    batch: PagedBatch,
    scoring: Scoring,
) -> Tensor:
    """See `ops.paged_attention`; `k` and `v` are plain pages, or codes whose scales are given."""
    q, page_table = q.contiguous(), batch.page_table.contiguous()
    starts, lengths = batch.query_starts.contiguous(), batch.context_lens.contiguous()
    group_starts = None if batch.group_starts is None else batch.group_starts.contiguous()
    prefix_pages = None if batch.group_prefix_pages is None else batch.group_prefix_pages.contiguous()
    sinks = None if scoring.sinks is None else scoring.sinks.contiguous()
    rows, heads, dim = q.shape
    n_pages, page_size, kv_heads, row_bytes = k.shape
    y = work_memory.empty(tuple(q.shape), q.dtype)
    arguments = _PagedAttention(
        at(q),
        at(k),
        at(v),
        at_or_null(k_scales),
        at_or_null(v_scales),
        DTYPES[k.dtype] if k_scales is None else _CODES[row_bytes * 8 // dim],
        at(page_table),
        at(starts),
        at(lengths),
        at_or_null(group_starts),
        at_or_null(prefix_pages),
        rows,
        heads,
        kv_heads,
        dim,
        n_pages,
        page_size,
        lengths.shape[0],
        page_table.shape[1],
        0 if prefix_pages is None else prefix_pages.shape[0],
        scoring.softmax_scale,
        scoring.sliding_window,
        scoring.softcap,
        at_or_null(sinks),
        kv_format.rotation_factor(dim),
        at(y),
    )
    try:
        call(library, "paged_attention", arguments)
    except ShapeError:
        # The reference names the sequence or group at fault.
        reference_attention.check_batch(
            starts.tolist(), lengths.tolist(), n_rows=rows, limit_tokens=page_table.shape[1] * page_size
        )
        if group_starts is not None and prefix_pages is not None:
            reference_attention.check_groups(group_starts.tolist(), prefix_pages.tolist(), page_table)
        raise
    return y


def quantise_kv_write(
    library: ctypes.CDLL,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    slot_mapping: Tensor,
    k_codes: Tensor,
    k_scales: Tensor,
    v_codes: Tensor,
    v_scales: Tensor,
) -> Tensor:
    """See `ops.quantise_kv_write`."""
    q, k, v, cos, sin = q.contiguous(), k.contiguous(), v.contiguous(), cos.contiguous(), sin.contiguous()
    positions, slot_mapping = positions.contiguous(), slot_mapping.contiguous()
    rotated = work_memory.empty(tuple(q.shape), q.dtype)
    rows, heads, dim = q.shape
    n_pages, page_size, kv_heads, row_bytes = k_codes.shape
    if rows:
        arguments = _QuantiseKvWrite(
            at(q),
            at(k),
            at(v),
            at(cos),
            at(sin),
            at(positions),
            at(slot_mapping),
            rows,
            heads,
            kv_heads,
            dim,
            cos.shape[0],
            cos.shape[1],
            n_pages * page_size,
            at(k_codes),
            at(k_scales),
            at(v_codes),
            at(v_scales),
            row_bytes * 8 // dim,
            kv_format.rotation_factor(dim),
            at(rotated),
        )
        try:
            call(library, "quantise_kv_write", arguments)
        except ShapeError:
            # The reference names what is out of range.
            reference_attention.check_range("quantise_kv_write", "positions", positions, cos.shape[0])
            reference_attention.check_range("quantise_kv_write", "slot_mapping", slot_mapping, n_pages * page_size)
            raise
    return rotated
