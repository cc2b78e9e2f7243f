"""Ops around quantised pages, shared prefixes and sampling; part of the door that is `ops.py`, which names them too.

As there: checked here, torch operators underneath, a plain namesake in `reference.py`. On a CPU the reference is what
runs; on a card the kernels do.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from exl2_rag.errors import DTypeError, ShapeError
from exl2_rag.llm.kernels import cuda_attention, cuda_sampling, reference_attention, reference_sampling
from exl2_rag.llm.kernels.checks import FLOATS, check_devices
from exl2_rag.llm.kernels.cuda_backend import Backend
from exl2_rag.llm.kernels.kv_format import QUANT_GROUP, QuantisedPages
from exl2_rag.llm.kernels.sampling_params import RowSampling

Pages = Tensor | QuantisedPages

_ACTIVATIONS = (torch.float32, torch.float16)

_new_library: Any = torch.library.Library  # torch ships it without annotations
_library = _new_library("exl2_rag", "FRAGMENT")
_library.define(
    "attend_pages(Tensor q, Tensor k_pages, Tensor v_pages, Tensor? k_scales, Tensor? v_scales, Tensor page_table, "
    "Tensor query_starts, Tensor context_lens, Tensor? group_starts, Tensor? group_prefix_pages, Tensor? sinks, "
    "float softmax_scale, int sliding_window, float softcap, int max_context, int max_rest) -> Tensor"
)
_library.define(
    "quantise_kv_write(Tensor q, Tensor k, Tensor v, Tensor cos, Tensor sin, Tensor positions, Tensor slot_mapping, "
    "Tensor(a!) k_codes, Tensor(b!) k_scales, Tensor(c!) v_codes, Tensor(d!) v_scales) -> Tensor"
)
_library.define(
    "sample(Tensor logits, Tensor? mask, Tensor temperatures, Tensor top_k, Tensor top_p, Tensor min_p, Tensor seeds, "
    "Tensor steps) -> (Tensor, Tensor)"
)


def paged_attention_shared(
    q: Tensor,
    k_pages: Pages,
    v_pages: Pages,
    page_table: Tensor,
    query_starts: Tensor,
    context_lens: Tensor,
    group_starts: Tensor,
    group_prefix_pages: Tensor,
    *,
    softmax_scale: float,
    sliding_window: int = 0,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    max_context: int = 0,
    max_rest: int = 0,
) -> Tensor:
    """`paged_attention` in which the sequences of a group read the pages that they share once, not once each.

    Args:
        q, page_table, query_starts, context_lens, softmax_scale, sliding_window: as in `ops.paged_attention`, q also
            float16 on a card. With quantised pages q is what `quantise_kv_write` returned.
        k_pages, v_pages: as there, or quantised.
        group_starts: [NG + 1] int32; group g has the sequences group_starts[g] to group_starts[g + 1] of the batch.
        group_prefix_pages: [NG] int32; so many leading pages are the same for all sequences of the group, and full
            before this step's tokens.
        softcap: 0, or c: scores become c * tanh(score / c).
        sinks: [H] float32 or None: a score for each head that takes part in the softmax and has no value.
        max_context, max_rest: bounds that the caller knows, of the context lengths and of the keys of a sequence beyond
            its shared pages; 0: none.

    Returns:
        [T, H, D] in the dtype of `q`, the same bits as without sharing.

    Raises:
        ShapeError, DTypeError, DeviceError, KernelError: a tensor does not fit, or the card cannot take it.
    """
    for name, tensor in (("group_starts", group_starts), ("group_prefix_pages", group_prefix_pages)):
        _check_dtype("paged_attention_shared", name, tensor, torch.int32)
    if group_starts.dim() != 1 or group_prefix_pages.shape != (group_starts.shape[0] - 1,):
        raise ShapeError(
            f"paged_attention_shared: group_starts must be [NG + 1] and group_prefix_pages [NG], they are "
            f"{list(group_starts.shape)} and {list(group_prefix_pages.shape)}"
        )
    return _attend(
        "paged_attention_shared",
        q,
        k_pages,
        v_pages,
        (page_table, query_starts, context_lens),
        (group_starts, group_prefix_pages),
        sinks,
        (softmax_scale, sliding_window, softcap, max_context, max_rest),
    )


def paged_attention_quantised(
    q: Tensor,
    k_pages: QuantisedPages,
    v_pages: QuantisedPages,
    page_table: Tensor,
    query_starts: Tensor,
    context_lens: Tensor,
    *,
    softmax_scale: float,
    sliding_window: int = 0,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    max_context: int = 0,
) -> Tensor:
    """`paged_attention` over q8, q6 or q4 pages, read as they are. Arguments as in `paged_attention_shared`.

    Returns:
        [T, H, D] in the dtype of `q`, rotated back.

    Raises:
        ShapeError, DTypeError, DeviceError, KernelError: a tensor does not fit, or the card cannot take it.
    """
    return _attend(
        "paged_attention_quantised",
        q,
        k_pages,
        v_pages,
        (page_table, query_starts, context_lens),
        (None, None),
        sinks,
        (softmax_scale, sliding_window, softcap, max_context, 0),
    )


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
    """`rope_cache_write` for quantised pages: rotate by position, rotate into the pages' basis, quantise, write.

    Args:
        q: [T, H, D] float32 or float16, D a multiple of 32. k, v: [T, KH, D] likewise.
        cos, sin: [S, R/2] float32, a row per position; as in `rope_cache_write`.
        positions, slot_mapping: [T] int64.
        k_pages, v_pages: written to.

    Returns:
        [T, H, D] in the dtype of `q`: the queries in the pages' basis, for `paged_attention_quantised`.

    Raises:
        ShapeError, DTypeError, DeviceError: a tensor does not fit, or on a CPU a position or slot is out of range.
    """
    op = "quantise_kv_write"
    for name, pages in (("k_pages", k_pages), ("v_pages", v_pages)):
        pages.check(op, name)
    if v_pages.codes.shape != k_pages.codes.shape:
        raise ShapeError(
            f"{op}: k_pages and v_pages must be alike, they have codes {list(k_pages.codes.shape)} and "
            f"{list(v_pages.codes.shape)}"
        )
    if q.dtype not in _ACTIVATIONS or k.dtype != q.dtype or v.dtype != q.dtype:
        raise DTypeError(f"{op}: q, k, v must be all float32 or all float16, they are {q.dtype}, {k.dtype}, {v.dtype}")
    for name, tensor in (("cos", cos), ("sin", sin)):
        _check_dtype(op, name, tensor, torch.float32)
    wanted = (q.shape[0], k_pages.codes.shape[2], k_pages.head_dim)
    if q.dim() != 3 or q.shape[2] != wanted[2] or k.shape != wanted or v.shape != wanted:
        raise ShapeError(
            f"{op}: k and v must be {list(wanted)} and q [{wanted[0]}, H, {wanted[2]}], they are {list(k.shape)}, "
            f"{list(v.shape)} and {list(q.shape)}"
        )
    if cos.dim() != 2 or cos.shape != sin.shape or cos.shape[1] * 2 > q.shape[2]:
        raise ShapeError(f"{op}: cos and sin must be [S, R/2], R at most {q.shape[2]}, they are {list(cos.shape)}")
    for name, tensor in (("positions", positions), ("slot_mapping", slot_mapping)):
        _check_dtype(op, name, tensor, torch.int64)
        if tensor.shape != q.shape[:1]:
            raise ShapeError(f"{op}: {name} must be [{q.shape[0]}], it is {list(tensor.shape)}")
    parts = (k_pages.codes, k_pages.scales, v_pages.codes, v_pages.scales)
    check_devices(op, q, k, v, cos, sin, positions, slot_mapping, *parts)
    result: Tensor = torch.ops.exl2_rag.quantise_kv_write.default(q, k, v, cos, sin, positions, slot_mapping, *parts)
    return result


def sample(logits: Tensor, mask: Tensor | None, rows: RowSampling) -> tuple[Tensor, Tensor]:
    """Draw one token a row: mask, temperature, top-k, top-p, min-p and the draw, with the semantics of `sampler.py`.

    Args:
        logits: [B, V] float32. Not modified.
        mask: [B, ceil(V / 32)] int32 or None: bit i % 32 of word i / 32 says whether token i may come next.
        rows: parameters of the B rows.

    Returns:
        [B] int64 tokens, -1 for a row of which none can be drawn (nothing allowed, or NaN), and [B] float32: the
        token's log-probability by the logits as given, NaN where there is none.

    Raises:
        ShapeError, DTypeError, DeviceError: a tensor does not fit.
    """
    _check_dtype("sample", "logits", logits, torch.float32)
    if logits.dim() != 2:
        raise ShapeError(f"sample: logits must be [B, V], they are {list(logits.shape)}")
    rows.check("sample", logits.shape[0])
    if mask is not None:
        _check_dtype("sample", "mask", mask, torch.int32)
        words = -(-logits.shape[1] // 32)
        if mask.dim() != 2 or mask.shape[0] != logits.shape[0] or mask.shape[1] < words:
            raise ShapeError(f"sample: mask must be [{logits.shape[0]}, {words}], it is {list(mask.shape)}")
        check_devices("sample", logits, mask)
    parts = (rows.temperatures, rows.top_k, rows.top_p, rows.min_p, rows.seeds, rows.steps)
    check_devices("sample", logits, *parts)
    tokens, log_probs = torch.ops.exl2_rag.sample.default(logits, mask, *parts)
    return tokens, log_probs


def _check_dtype(op: str, name: str, tensor: Tensor, dtype: torch.dtype) -> None:
    if tensor.dtype != dtype:
        raise DTypeError(f"{op}: {name} must be {dtype}, it is {tensor.dtype}")


def _check_pages(op: str, k_pages: Pages, v_pages: Pages) -> tuple[Tensor, ...]:
    """The tensors of the pages, k before v, values before scales."""
    if isinstance(k_pages, QuantisedPages) and isinstance(v_pages, QuantisedPages):
        for name, pages in (("k_pages", k_pages), ("v_pages", v_pages)):
            pages.check(op, name)
        if k_pages.codes.shape != v_pages.codes.shape:
            raise ShapeError(f"{op}: k_pages and v_pages must have codes of one shape")
        return k_pages.codes, v_pages.codes, k_pages.scales, v_pages.scales
    if not isinstance(k_pages, Tensor) or not isinstance(v_pages, Tensor):
        raise DTypeError(f"{op}: either both k_pages and v_pages must be quantised, or neither")
    if k_pages.dtype not in FLOATS or v_pages.dtype != k_pages.dtype:
        raise DTypeError(f"{op}: pages must have one floating-point dtype, they are {k_pages.dtype}, {v_pages.dtype}")
    contiguous = k_pages.is_contiguous() and v_pages.is_contiguous()
    if k_pages.dim() != 4 or k_pages.shape != v_pages.shape or not contiguous:
        raise ShapeError(
            f"{op}: k_pages and v_pages must be [P, PS, KH, D], alike and contiguous, they are "
            f"{list(k_pages.shape)} and {list(v_pages.shape)}"
        )
    return k_pages, v_pages


def _attend(
    op: str,
    q: Tensor,
    k_pages: Pages,
    v_pages: Pages,
    batch: tuple[Tensor, Tensor, Tensor],
    groups: tuple[Tensor | None, Tensor | None],
    sinks: Tensor | None,
    numbers: tuple[float, int, float, int, int],
) -> Tensor:
    parts = _check_pages(op, k_pages, v_pages)
    kv_heads = parts[0].shape[2]
    head_dim = parts[2].shape[3] * QUANT_GROUP if len(parts) > 2 else parts[0].shape[3]
    if q.dtype not in _ACTIVATIONS:
        raise DTypeError(f"{op}: q must be float32 or float16, it is {q.dtype}")
    if q.dim() != 3 or q.shape[2] != head_dim or q.shape[1] % kv_heads:
        raise ShapeError(f"{op}: q must be [T, n * {kv_heads}, {head_dim}], it is {list(q.shape)}")
    page_table, query_starts, context_lens = batch
    for name, tensor in zip(("page_table", "query_starts", "context_lens"), batch, strict=True):
        _check_dtype(op, name, tensor, torch.int32)
    n_sequences = context_lens.shape[0]
    if page_table.dim() != 2 or page_table.shape[0] != n_sequences or query_starts.shape != (n_sequences + 1,):
        raise ShapeError(
            f"{op}: page_table must be [B, MP], query_starts [B + 1] and context_lens [B]; they are "
            f"{list(page_table.shape)}, {list(query_starts.shape)} and {list(context_lens.shape)}"
        )
    if numbers[1] < 0 or numbers[2] < 0:
        raise ShapeError(f"{op}: sliding_window and softcap must be 0 (off) or positive, they are {numbers[1:3]}")
    if sinks is not None and (sinks.dtype != torch.float32 or sinks.shape != (q.shape[1],)):
        raise ShapeError(f"{op}: sinks must be [{q.shape[1]}] float32, they are {list(sinks.shape)} {sinks.dtype}")
    check_devices(op, q, *parts, *batch, *(extra for extra in (*groups, sinks) if extra is not None))
    scales = parts[2:] if len(parts) > 2 else (None, None)
    result: Tensor = torch.ops.exl2_rag.attend_pages.default(q, *parts[:2], *scales, *batch, *groups, sinks, *numbers)
    return result


def _backend(tensor: Tensor) -> Backend:
    from exl2_rag.llm.kernels import cuda_runtime  # it loads the driver, which others do not need

    return cuda_runtime.backend(tensor.device)


def _pages(values: Tensor, scales: Tensor | None) -> Pages:
    return values if scales is None else QuantisedPages(values, scales)


def _cpu_attend_pages(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    k_scales: Tensor | None,
    v_scales: Tensor | None,
    page_table: Tensor,
    query_starts: Tensor,
    context_lens: Tensor,
    group_starts: Tensor | None,
    group_prefix_pages: Tensor | None,
    sinks: Tensor | None,
    softmax_scale: float,
    sliding_window: int,
    softcap: float,
    _max_context: int,
    _max_rest: int,
) -> Tensor:
    if group_starts is not None and group_prefix_pages is not None:
        reference_attention.check_groups(group_starts.tolist(), group_prefix_pages.tolist(), page_table)
    return reference_attention.paged_attention(
        q,
        _pages(k_pages, k_scales),
        _pages(v_pages, v_scales),
        page_table,
        query_starts,
        context_lens,
        softmax_scale=softmax_scale,
        sliding_window=sliding_window,
        softcap=softcap,
        sinks=sinks,
    )


def _cuda_attend_pages(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    k_scales: Tensor | None,
    v_scales: Tensor | None,
    page_table: Tensor,
    query_starts: Tensor,
    context_lens: Tensor,
    group_starts: Tensor | None,
    group_prefix_pages: Tensor | None,
    sinks: Tensor | None,
    softmax_scale: float,
    sliding_window: int,
    softcap: float,
    max_context: int,
    max_rest: int,
) -> Tensor:
    return cuda_attention.paged_attention(
        _backend(q),
        q,
        _pages(k_pages, k_scales),
        _pages(v_pages, v_scales),
        page_table,
        query_starts,
        context_lens,
        softmax_scale=softmax_scale,
        sliding_window=sliding_window,
        softcap=softcap,
        sinks=sinks,
        group_starts=group_starts,
        group_prefix_pages=group_prefix_pages,
        max_context=max_context,
        max_rest=max_rest,
    )


def _cpu_quantise_kv_write(
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
    pages = QuantisedPages(k_codes, k_scales), QuantisedPages(v_codes, v_scales)
    return reference_attention.quantise_kv_write(q, k, v, cos, sin, positions, slot_mapping, *pages)


def _cuda_quantise_kv_write(
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
    pages = QuantisedPages(k_codes, k_scales), QuantisedPages(v_codes, v_scales)
    backend = _backend(q)
    return cuda_attention.quantise_kv_write(backend, q, k, v, cos, sin, positions, slot_mapping, *pages)


def _cpu_sample(logits: Tensor, mask: Tensor | None, *rows: Tensor) -> tuple[Tensor, Tensor]:
    return reference_sampling.sample(logits, mask, RowSampling(*rows))


def _cuda_sample(logits: Tensor, mask: Tensor | None, *rows: Tensor) -> tuple[Tensor, Tensor]:
    backend = _backend(logits)
    tokens, log_probs = cuda_sampling.sample(backend, logits, mask, RowSampling(*rows), log_probs=True)
    assert log_probs is not None
    return tokens, log_probs


def _fake_like_first(first: Tensor, *_rest: object) -> Tensor:
    return torch.empty_like(first, memory_format=torch.contiguous_format)


def _fake_sample(logits: Tensor, *_rest: object) -> tuple[Tensor, Tensor]:
    return logits.new_empty(logits.shape[0], dtype=torch.int64), logits.new_empty(logits.shape[0])


for _name, _cpu, _cuda, _fake in (
    ("attend_pages", _cpu_attend_pages, _cuda_attend_pages, _fake_like_first),
    ("quantise_kv_write", _cpu_quantise_kv_write, _cuda_quantise_kv_write, _fake_like_first),
    ("sample", _cpu_sample, _cuda_sample, _fake_sample),
):
    _library.impl(_name, _cpu, "CPU")
    _library.impl(_name, _cuda, "CUDA")
    torch.library.register_fake(f"exl2_rag::{_name}", _fake, lib=_library)
