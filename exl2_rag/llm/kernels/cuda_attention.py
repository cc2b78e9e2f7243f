"""Launchers of attention over pages and of the write into quantised pages.

Each takes the backend first, allocates its result and launches; nothing waits for the card, so all of it can be
captured in a CUDA graph. Launch sizes come from shapes and from the bounds that the caller knows. What a row's result
is depends on its position and cache alone, bit for bit, whatever is chosen here: see cuda/attention_batch.cuh.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from exl2_rag.errors import KernelError, ShapeError
from exl2_rag.llm.kernels.cuda_backend import F32, I32, I64, WARP_THREADS, Argument, Backend, ceil_div
from exl2_rag.llm.kernels.kv_format import QuantisedPages, rotation_block, rotation_factor
from exl2_rag.llm.kernels.paged_batch import PagedBatch, Pages, Scoring

SPLIT_KEYS: Final = 256  # kSplitKeys of attention_batch.cuh
MAX_HEAD_DIM: Final = 256

_THREADS: Final = 128
_LOG2_E: Final = 1.4426950408889634
_PASS_ALL, _PASS_PREFIX, _PASS_REST = 0, 1, 2
_SUFFIXES: Final[dict[torch.dtype | int, str]] = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}
_MODULES: Final[dict[torch.dtype | int, str]] = {**_SUFFIXES, 8: "q8", 6: "q6", 4: "q4"}
_KEY_RUN: Final = 16  # keys that must lie in one page
_MAX_UNITS: Final = 1 << 32  # that kernels count the addresses of pages in, see cuda/kv_pages.cuh
_WARPS: Final = 4
_WARP_LINES: Final = 16

# Partial results take memory: up to the first limit where the tiles alone fill the card, up to the second where only
# the splits do. Beyond, one block takes all splits of its tile in turn.
_WORKSPACE_BYTES: Final = 64 << 20
_LARGE_WORKSPACE_BYTES: Final = 1 << 30


@dataclass(frozen=True, slots=True)
class _Kernel:
    """One instance.

    Attributes:
        shared_bytes: dynamic shared memory.
        tile_lines: kTileLines of its source.
        loop_above: lines that a unit must exceed to be taken in turn; `apart_lines` of the tensor-core kernels.
        terms: dtype of the two terms in which it wants each query, or None for queries as they are.
    """

    module: str
    name: str
    shared_bytes: int
    tile_lines: int
    loop_above: int
    terms: torch.dtype | None


def _choose_kernel(backend: Backend, q: Tensor, pages: Pages) -> _Kernel:
    head_dim = q.shape[2]
    n_pages, page_size, kv_heads = (pages.codes if isinstance(pages, QuantisedPages) else pages).shape[:3]
    suffix = _SUFFIXES[q.dtype]
    kind = pages.bits if isinstance(pages, QuantisedPages) else pages.dtype
    if head_dim > MAX_HEAD_DIM:
        raise ShapeError(f"paged_attention: heads of up to {MAX_HEAD_DIM} numbers are supported, these have {head_dim}")
    if kind == torch.float32:
        shared_bytes = 4 * ((16 + 32) * (head_dim + 1) + 16 * 32)
        return _Kernel("paged_attention_f32", f"paged_attention_{suffix}", shared_bytes, 16, 0, None)
    if head_dim % 8 or page_size % _KEY_RUN:
        raise ShapeError(
            f"paged_attention: on CUDA heads must have a multiple of 8 numbers and pages a multiple of {_KEY_RUN} "
            f"tokens, they have {head_dim} and {page_size}; only float32 pages take others"
        )
    vectors = page_size * n_pages * kv_heads
    if vectors * head_dim // 8 * 3 >= _MAX_UNITS:
        raise KernelError(
            f"paged_attention: {n_pages} pages of {page_size} tokens and {kv_heads} key heads of {head_dim} "
            "numbers are more than one layer can address; make the cache smaller"
        )
    if kind == torch.bfloat16 and backend.arch < 80:
        raise KernelError(
            f"paged_attention: bfloat16 pages need compute capability 8.0, this card has "
            f"{backend.arch // 10}.{backend.arch % 10}; use float16 or quantised pages"
        )
    apart_lines = 16 if head_dim <= 128 else 8
    columns = ceil_div(head_dim, 64) * 64
    apart_bytes = _WARPS * 4 * (apart_lines * columns + 2 * _WARP_LINES)
    shared_bytes = max(_WARPS * 4 * _WARP_LINES * columns, apart_bytes)
    is_fast = q.dtype == torch.float16 and kind != torch.bfloat16
    name = "paged_attention_fast" if is_fast else "paged_attention_exact"
    terms = None if is_fast else torch.bfloat16 if kind == torch.bfloat16 else torch.float16
    return _Kernel(f"paged_attention_{_MODULES[kind]}", name, shared_bytes, 64, apart_lines, terms)


def _max_splits(keys: int) -> int:
    """Splits that this many keys in a row touch at most, wherever they begin."""
    return (keys - 1 + SPLIT_KEYS - 1) // SPLIT_KEYS + 1


def paged_attention(
    backend: Backend, q: Tensor, k_pages: Pages, v_pages: Pages, batch: PagedBatch, scoring: Scoring
) -> Tensor:
    """See `ops.paged_attention`. The rows of `batch.page_table` may be apart, so that a wide table can be cut.

    Pages and lengths are not checked: that would wait for the card.

    Raises:
        ShapeError: heads of more than 256 numbers or no multiple of 8, or pages of no multiple of 16 tokens.
        KernelError: bfloat16 pages on a card that has none, or more pages than a kernel can address.
    """
    page_table, query_starts, context_lens = batch.page_table, batch.query_starts, batch.context_lens
    group_starts, group_prefix_pages = batch.group_starts, batch.group_prefix_pages
    sliding_window, softcap = scoring.sliding_window, scoring.softcap
    rows, heads, head_dim = q.shape
    q = q if q.is_contiguous() and q.data_ptr() % 16 == 0 else q.clone(memory_format=torch.contiguous_format)
    result = torch.empty_like(q)
    k, v, k_scales, v_scales = _parts(k_pages, v_pages)
    page_size, kv_heads = k.shape[1], k.shape[2]
    kernel = _choose_kernel(backend, q, k_pages)
    n_sequences = context_lens.shape[0]
    if rows == 0:
        return result

    repeats = heads // kv_heads
    limit = page_table.shape[1] * page_size
    n_splits = ceil_div(max(1, min(batch.max_context, limit) if batch.max_context else limit), SPLIT_KEYS)
    n_slots = min(n_splits, _max_splits(sliding_window)) if sliding_window else n_splits
    rows_of_tile = min(rows, kernel.tile_lines // repeats + 2)
    grid_splits = min(n_splits, _max_splits(sliding_window + rows_of_tile)) if sliding_window else n_splits
    n_tiles = min(rows * repeats // kernel.tile_lines + n_sequences, rows * ceil_div(repeats, kernel.tile_lines))

    entry_bytes = 4 * (head_dim + 2)
    fills_card = n_tiles * kv_heads >= backend.multiprocessors
    workspace_limit = _WORKSPACE_BYTES if fills_card else _LARGE_WORKSPACE_BYTES
    loops = rows > n_sequences and rows * heads * n_slots * entry_bytes > workspace_limit
    entries = n_sequences * kv_heads * kernel.loop_above if loops else rows * heads
    outputs, sums = _workspace(max(1, entries * n_slots), head_dim, q.device)
    total_outputs, total_sums = _workspace(rows * heads, head_dim, q.device) if loops else (None, None)
    queries = q if kernel.terms is None else _terms(backend, q, kernel.terms)
    ends: tuple[Argument, ...] = (outputs, sums, total_outputs, total_sums)

    def attend(which: int, splits: int, tiles: int) -> None:
        backend.launch(
            kernel.module,
            kernel.name,
            (splits, kv_heads, tiles),
            (_THREADS, 1, 1),
            (
                *(
                    queries,
                    k,
                    v,
                    k_scales,
                    v_scales,
                    page_table,
                    query_starts,
                    context_lens,
                    group_starts,
                    group_prefix_pages,
                ),
                *ends,
                I32(n_sequences),
                I32(0 if group_prefix_pages is None else group_prefix_pages.shape[0]),
                I32(page_size),
                I32(page_table.stride(0)),
                I32(heads),
                I32(kv_heads),
                I32(head_dim),
                I32(sliding_window),
                I32(n_slots),
                I32(kernel.loop_above),
                I32(which),
                F32(scoring.softmax_scale * (1.0 if softcap else _LOG2_E)),
                F32(softcap),
            ),
            shared_bytes=kernel.shared_bytes,
        )

    if group_starts is None or group_prefix_pages is None or loops:
        attend(_PASS_ALL, grid_splits, n_tiles)
    else:
        n_groups = group_prefix_pages.shape[0]
        group_tiles = min(rows * repeats // kernel.tile_lines + n_groups, rows * ceil_div(repeats, kernel.tile_lines))
        attend(_PASS_PREFIX, n_splits, group_tiles)
        # Up to a split of the shared pages is left over beside the rest.
        rest = min(grid_splits, _max_splits(batch.max_rest + SPLIT_KEYS)) if batch.max_rest else grid_splits
        attend(_PASS_REST, rest, n_tiles)

    is_quantised = isinstance(k_pages, QuantisedPages)
    backend.launch(
        "attention_combine",
        f"attention_combine_{_SUFFIXES[q.dtype]}",
        (rows, heads, 1),
        (ceil_div(head_dim, WARP_THREADS) * WARP_THREADS, 1, 1),
        (
            *ends,
            query_starts,
            context_lens,
            scoring.sinks,
            result,
            I32(n_sequences),
            I32(heads),
            I32(kv_heads),
            I32(head_dim),
            I32(sliding_window),
            I32(n_slots),
            I32(kernel.loop_above),
            I32(rotation_block(head_dim) if is_quantised else 0),
            F32(rotation_factor(head_dim)),
        ),
    )
    return result


def _parts(k_pages: Pages, v_pages: Pages) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    if isinstance(k_pages, QuantisedPages) and isinstance(v_pages, QuantisedPages):
        return k_pages.codes, v_pages.codes, k_pages.scales, v_pages.scales
    assert isinstance(k_pages, Tensor)
    assert isinstance(v_pages, Tensor)
    return k_pages, v_pages, None, None


def _terms(backend: Backend, q: Tensor, dtype: torch.dtype) -> Tensor:
    """[T, H, D] to [T, H, 2, D]: each number as the sum of two of `dtype`."""
    rows, heads, head_dim = q.shape
    terms = torch.empty((rows, heads, 2, head_dim), dtype=dtype, device=q.device)
    threads = 256
    backend.launch(
        "attention_terms",
        f"attention_terms_{_SUFFIXES[q.dtype]}_{_SUFFIXES[dtype]}",
        (ceil_div(q.numel(), threads), 1, 1),
        (threads, 1, 1),
        (q, terms, I32(head_dim), I64(q.numel())),
    )
    return terms


def _workspace(entries: int, head_dim: int, device: torch.device) -> tuple[Tensor, Tensor]:
    outputs = torch.empty((entries, head_dim), dtype=torch.float32, device=device)
    return outputs, torch.empty((entries, 2), dtype=torch.float32, device=device)


def quantise_kv_write(
    backend: Backend,
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
    """See `ops.quantise_kv_write`. A token whose slot is negative is not written.

    Raises:
        ShapeError: heads of more than 256 numbers.
    """
    rows, heads, head_dim = q.shape
    if head_dim > MAX_HEAD_DIM:
        raise ShapeError(
            f"quantise_kv_write: heads of up to {MAX_HEAD_DIM} numbers are supported, these have {head_dim}"
        )
    q, k, v = (_tokens_apart(tensor) for tensor in (q, k, v))
    result = torch.empty((rows, heads, head_dim), dtype=q.dtype, device=q.device)
    if rows == 0:
        return result
    kv_heads = k.shape[1]
    backend.launch(
        "kv_quantise",
        f"kv_quantise_q{k_pages.bits}_{_SUFFIXES[q.dtype]}",
        (rows, heads + 2 * kv_heads, 1),
        (head_dim, 1, 1),
        (
            q,
            k,
            v,
            I64(q.stride(0)),
            I64(k.stride(0)),
            I64(v.stride(0)),
            cos.contiguous(),
            sin.contiguous(),
            positions,
            slot_mapping,
            k_pages.codes,
            k_pages.scales,
            v_pages.codes,
            v_pages.scales,
            result,
            I32(heads),
            I32(kv_heads),
            I32(head_dim),
            I32(cos.shape[1]),
            I32(rotation_block(head_dim)),
            F32(rotation_factor(head_dim)),
        ),
    )
    return result


def _tokens_apart(x: Tensor) -> Tensor:
    """`x` [T, n, D], each token contiguous in itself; tokens may be apart."""
    inner = x.shape[1] * x.shape[2]
    is_plain = math.prod(x.shape) == 0 or (x.stride(2) == 1 and (x.shape[1] == 1 or x.stride(1) == x.shape[2]))
    return x if is_plain and inner else x.contiguous()
