"""Attention over pages, the write into quantised ones, and sampling; part of the door that is `ops.py`.

As there: checked here, torch operators underneath, a plain namesake in `reference.py`. Sampling has kernels on a card
alone; on a CPU the reference is what runs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from exl2_rag.errors import ShapeError
from exl2_rag.llm.kernels import (
    cpu_attention,
    cuda_attention,
    cuda_sampling,
    native,
    reference_attention,
    reference_sampling,
)
from exl2_rag.llm.kernels.checks import check_activations, check_devices, check_dtype
from exl2_rag.llm.kernels.cuda_backend import Backend
from exl2_rag.llm.kernels.kv_format import QuantisedPages
from exl2_rag.llm.kernels.paged_batch import SCHEMA, PagedBatch, Pages, Scoring, check_pages, flatten, unflatten
from exl2_rag.llm.kernels.sampling_params import RowSampling

_new_library: Any = torch.library.Library  # torch ships it without annotations
_library = _new_library("exl2_rag", "FRAGMENT")
_library.define(
    f"paged_attention(Tensor q, Tensor k_pages, Tensor v_pages, Tensor? k_scales, Tensor? v_scales, {SCHEMA}) -> Tensor"
)
_library.define(
    "quantise_kv_write(Tensor q, Tensor k, Tensor v, Tensor cos, Tensor sin, Tensor positions, Tensor slot_mapping, "
    "Tensor(a!) k_codes, Tensor(b!) k_scales, Tensor(c!) v_codes, Tensor(d!) v_scales) -> Tensor"
)
_library.define(
    "sample(Tensor logits, Tensor? mask, Tensor temperatures, Tensor top_k, Tensor top_p, Tensor min_p, Tensor seeds, "
    "Tensor steps) -> (Tensor, Tensor)"
)


def paged_attention(q: Tensor, k_pages: Pages, v_pages: Pages, batch: PagedBatch, scoring: Scoring) -> Tensor:
    """Causal attention over the paged cache: prefill, decode and both in one batch, with grouped queries.

    Pages that the sequences of a group share are read once for all of them; the result has the same bits as without
    groups.

    Args:
        q: [T, H, D] float32, on a card also float16; rotated; H a multiple of KH. With quantised pages, what
            `quantise_kv_write` returned.
        k_pages, v_pages: [P, PS, KH, D] float32, float16 or bfloat16, or quantised; the new tokens are in them already.
        batch: which rows belong to which sequence, and its pages.
        scoring: scale, sliding window, softcap, sinks.

    Returns:
        [T, H, D] in the dtype of `q`, rotated back where pages are quantised.

    Raises:
        ShapeError, DTypeError, DeviceError: a tensor does not fit; on a CPU also: a page or length is out of range, or
            a group does not share the pages it says.
        KernelError: the card cannot take it.
    """
    op = "paged_attention"
    check_activations(op, "q", q, 3)
    numbers, values, k_scales, v_scales = check_pages(op, k_pages, v_pages)
    head_dim = k_pages.head_dim if isinstance(k_pages, QuantisedPages) else numbers.shape[3]
    if q.shape[2] != head_dim or q.shape[1] % numbers.shape[2]:
        raise ShapeError(
            f"{op}: q must be [T, n * {numbers.shape[2]}, {head_dim}], D the same and the query heads a multiple of "
            f"the key heads of the pages; it is {list(q.shape)}"
        )
    batch.check(op, q)
    scoring.check(op, q)
    check_devices(op, q, *(part for part in (numbers, values, k_scales, v_scales) if part is not None))
    result: Tensor = torch.ops.exl2_rag.paged_attention.default(
        q, numbers, values, k_scales, v_scales, *flatten(batch, scoring)
    )
    return result


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
        q: [T, H, D] float32, on a card also float16, D a multiple of 32. k, v: [T, KH, D] likewise.
        cos, sin: [S, R/2] float32, a row per position; as in `rope_cache_write`.
        positions, slot_mapping: [T] int64.
        k_pages, v_pages: written to.

    Returns:
        [T, H, D] in the dtype of `q`: the queries in the pages' basis, for `paged_attention_quantised`.

    Raises:
        ShapeError, DTypeError, DeviceError: a tensor does not fit, or on a CPU a position or slot is out of range.
    """
    op = "quantise_kv_write"
    check_pages(op, k_pages, v_pages)
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        check_activations(op, name, tensor, 3)
        check_dtype(op, name, tensor, (q.dtype,))
    for name, tensor in (("cos", cos), ("sin", sin)):
        check_dtype(op, name, tensor, (torch.float32,))
    wanted = (q.shape[0], k_pages.codes.shape[2], k_pages.head_dim)
    if q.shape[2] != wanted[2] or k.shape != wanted or v.shape != wanted:
        raise ShapeError(
            f"{op}: k and v must be {list(wanted)} and q [{wanted[0]}, H, {wanted[2]}], they are {list(k.shape)}, "
            f"{list(v.shape)} and {list(q.shape)}"
        )
    if cos.dim() != 2 or cos.shape != sin.shape or cos.shape[1] * 2 > q.shape[2]:
        raise ShapeError(f"{op}: cos and sin must be [S, R/2], R at most {q.shape[2]}, they are {list(cos.shape)}")
    for name, tensor in (("positions", positions), ("slot_mapping", slot_mapping)):
        check_dtype(op, name, tensor, (torch.int64,))
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
    check_dtype("sample", "logits", logits, (torch.float32,))
    if logits.dim() != 2:
        raise ShapeError(f"sample: logits must be [B, V], they are {list(logits.shape)}")
    rows.check("sample", logits.shape[0])
    if mask is not None:
        check_dtype("sample", "mask", mask, (torch.int32,))
        words = -(-logits.shape[1] // 32)
        if mask.dim() != 2 or mask.shape[0] != logits.shape[0] or mask.shape[1] < words:
            raise ShapeError(f"sample: mask must be [{logits.shape[0]}, {words}], it is {list(mask.shape)}")
        check_devices("sample", logits, mask)
    parts = (rows.temperatures, rows.top_k, rows.top_p, rows.min_p, rows.seeds, rows.steps)
    check_devices("sample", logits, *parts)
    tokens, log_probs = torch.ops.exl2_rag.sample.default(logits, mask, *parts)
    return tokens, log_probs


def _backend(tensor: Tensor) -> Backend:
    from exl2_rag.llm.kernels import cuda_runtime  # it loads the driver, which others do not need

    return cuda_runtime.backend(tensor.device)


def _pages(values: Tensor, scales: Tensor | None) -> Pages:
    return values if scales is None else QuantisedPages(values, scales)


def _cpu_paged_attention(
    q: Tensor, k: Tensor, v: Tensor, k_scales: Tensor | None, v_scales: Tensor | None, *rest: Any
) -> Tensor:
    batch, scoring = unflatten(rest)
    library = native.library()
    if library is not None:
        return cpu_attention.paged_attention(library, q, k, v, k_scales, v_scales, batch, scoring)
    return reference_attention.paged_attention(q, _pages(k, k_scales), _pages(v, v_scales), batch, scoring)


def _cuda_paged_attention(
    q: Tensor, k: Tensor, v: Tensor, k_scales: Tensor | None, v_scales: Tensor | None, *rest: Any
) -> Tensor:
    pages = _pages(k, k_scales), _pages(v, v_scales)
    return cuda_attention.paged_attention(_backend(q), q, *pages, *unflatten(rest))


def _cpu_quantise_kv_write(*arguments: Tensor) -> Tensor:
    library = native.library()
    if library is not None:
        return cpu_attention.quantise_kv_write(library, *arguments)
    q, k, v, cos, sin, positions, slots, *pages = arguments
    return reference_attention.quantise_kv_write(q, k, v, cos, sin, positions, slots, *_both_pages(*pages))


def _cuda_quantise_kv_write(*arguments: Tensor) -> Tensor:
    q, k, v, cos, sin, positions, slots, *pages = arguments
    return cuda_attention.quantise_kv_write(_backend(q), q, k, v, cos, sin, positions, slots, *_both_pages(*pages))


def _both_pages(
    k_codes: Tensor, k_scales: Tensor, v_codes: Tensor, v_scales: Tensor
) -> tuple[QuantisedPages, QuantisedPages]:
    return QuantisedPages(k_codes, k_scales), QuantisedPages(v_codes, v_scales)


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
    ("paged_attention", _cpu_paged_attention, _cuda_paged_attention, _fake_like_first),
    ("quantise_kv_write", _cpu_quantise_kv_write, _cuda_quantise_kv_write, _fake_like_first),
    ("sample", _cpu_sample, _cuda_sample, _fake_sample),
):
    _library.impl(_name, _cpu, "CPU")
    _library.impl(_name, _cuda, "CUDA")
    torch.library.register_fake(f"exl2_rag::{_name}", _fake, lib=_library)
