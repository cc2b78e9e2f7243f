"""Launchers of the CUDA kernels that multiply by quantised matrices.

float16 activations ("fast") are multiplied on tensor cores, float32 ones ("exact") by plain multiply-adds; either way
the weights are exactly the format's float16 numbers and sums are float32. By the number of rows T:

    rows             float16                                     float32
    few (to 8)       exl2_gemv, if the rows fit shared memory    exl2_gemv, four rows a block
    to library_rows  exl2_gemm on rows in stored order           exl2_gemv, four rows a block
    more             tiles of columns to plain numbers, then the library's matrix product

A row's result has the same bits in all packed kernels of one dtype, whatever T is and whatever the other rows are. The
library's differ from them in rounding, and with T; `library_rows=None` keeps to the packed kernels.

Nothing here waits for the card, so all of it can be captured in a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

import torch
from torch import Tensor

from exl2_rag.errors import DeviceError, DTypeError, KernelError, ShapeError
from exl2_rag.llm.kernels.cuda_backend import I32, I64, WARP_THREADS, Argument, Backend, ceil_div
from exl2_rag.llm.kernels.cuda_packing import LANES, UNIT_BYTES
from exl2_rag.llm.kernels.cuda_weights import CudaWeights
from exl2_rag.llm.kernels.weights import CHUNK_ROWS, TILE_COLUMNS

LIBRARY_ROWS: Final = {torch.float16: 64, torch.float32: 16}
"""Rows up to which weights stay packed, unless a caller says otherwise: beyond, decoding them once pays."""

_GEMV_ROWS = 8
_GEMM_ROWS = (8, 16, 32, 64)
_GEMM_WARPS = 8
_STEP_CHUNKS = 2
_DEQUANTISE_WARPS = 8
_SCRATCH_BYTES = 128 << 20  # of decoded columns: never all of a large head at once
_SCRATCH_COLUMNS = 256  # library products like multiples of this
_MAX_GEMV_BLOCKS = 2  # on one multiprocessor; registers allow no more

_STORE_HALF, _STORE_FLOAT, _ADD_FLOAT = 0, 1, 2


def packed_matmul(
    backend: Backend,
    x: Tensor,
    weights: CudaWeights,
    *,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    library_rows: int | None = -1,
) -> Tensor:
    """Multiply activations by a quantised matrix without storing its weights as a whole.

    Args:
        backend: runs the kernels.
        x: [T, K] float16 or float32.
        weights: K x N, on the device of `x`.
        bias: [N] float32, added.
        residual: [T, N] float32 with contiguous rows: the product is added to it in place, and it is returned.
        out_dtype: float16 or float32; None is the dtype of `x`. Not with `residual`.
        library_rows: rows beyond which the library multiplies; None: never; -1: what `LIBRARY_ROWS` says.

    Returns:
        [T, N] in `out_dtype`, or `residual`.

    Raises:
        ShapeError, DTypeError, DeviceError: the tensors do not fit each other.
        KernelError: `library_rows` is None and the card has not the shared memory that the packed kernel takes.
    """
    _check(x, weights, bias, residual, out_dtype)
    if x.shape[0] == 0:
        return x.new_empty((0, weights.out_features), dtype=out_dtype or x.dtype) if residual is None else residual
    if not x.is_contiguous() or x.data_ptr() % UNIT_BYTES:
        x = x.clone(memory_format=torch.contiguous_format)
    if residual is not None:
        y, epilogue = residual, _ADD_FLOAT
    else:
        y = torch.empty((x.shape[0], weights.out_features), dtype=out_dtype or x.dtype, device=x.device)
        epilogue = _STORE_HALF if y.dtype == torch.float16 else _STORE_FLOAT
    limit = LIBRARY_ROWS[x.dtype] if library_rows == -1 else library_rows
    gemv_rows = _gemv_rows(backend, x, weights)
    if limit is not None and (x.shape[0] > limit or (x.dtype == torch.float32 and gemv_rows == 0)):
        _library_matmul(backend, x, weights, bias, y, accumulate=residual is not None)
    elif x.dtype == torch.float32 and gemv_rows == 0:
        raise KernelError(
            f"exl2_gemv: {weights.in_features} float32 activations and the weights under way do not fit the "
            f"{backend.max_shared_bytes} bytes of shared memory of this card; set library_rows"
        )
    elif gemv_rows > 0:
        _gemv(backend, x, weights, bias, y, epilogue, gemv_rows)
    else:
        _gemm(backend, x, weights, bias, y, epilogue)
    return y


def _check(
    x: Tensor, weights: CudaWeights, bias: Tensor | None, residual: Tensor | None, out_dtype: torch.dtype | None
) -> None:
    if x.dtype not in LIBRARY_ROWS:
        raise DTypeError(f"packed_matmul: x must be float16 or float32, it is {x.dtype}")
    if out_dtype is not None and out_dtype not in LIBRARY_ROWS:
        raise DTypeError(f"packed_matmul: out_dtype must be float16 or float32, it is {out_dtype}")
    if x.dim() != 2 or x.shape[1] != weights.in_features:
        raise ShapeError(f"packed_matmul: x must be [T, {weights.in_features}], it is {list(x.shape)}")
    if bias is not None:
        if bias.dtype != torch.float32:
            raise DTypeError(f"packed_matmul: bias must be float32, it is {bias.dtype}")
        if bias.shape != (weights.out_features,) or not bias.is_contiguous() or bias.data_ptr() % UNIT_BYTES:
            raise ShapeError(
                f"packed_matmul: bias must be [{weights.out_features}], contiguous and aligned to {UNIT_BYTES} bytes; "
                f"its shape is {list(bias.shape)}, its address {bias.data_ptr():#x}"
            )
    if residual is not None:
        if out_dtype is not None or residual.dtype != torch.float32:
            raise DTypeError(
                f"packed_matmul: residual must be float32 and out_dtype not given; they are {residual.dtype} and "
                f"{out_dtype}"
            )
        wanted = (x.shape[0], weights.out_features)
        aligned = residual.data_ptr() % UNIT_BYTES == 0 and all(stride % 4 == 0 for stride in residual.stride()[:-1])
        if residual.shape != wanted or residual.stride(-1) != 1 or not aligned:
            raise ShapeError(
                f"packed_matmul: residual must be {list(wanted)} with contiguous rows aligned to {UNIT_BYTES} bytes; "
                f"its shape is {list(residual.shape)}, its strides {list(residual.stride())}"
            )
    for other in (weights.stream, bias, residual):
        if other is not None and other.device != x.device:
            raise DeviceError(f"packed_matmul: all tensors must be on {x.device}, one is on {other.device}")


def _prefix(weights: CudaWeights) -> str:
    return "gptq" if weights.has_zero_points else "exl2"


def _optional(table: Tensor) -> Tensor | None:
    return table if table.numel() else None


# ---- few rows ----


def _ring_bytes(backend: Backend) -> int:
    """Shared memory of a warp's ring: kRingBytes in packed_gemv.cuh."""
    return (8 if backend.arch >= 80 else 4) * LANES * UNIT_BYTES


def _gemv_bytes(backend: Backend, weights: CudaWeights, rows: int, itemsize: int) -> int:
    activations = weights.n_chunks * rows * CHUNK_ROWS * itemsize
    partial = 2 * weights.n_slices * rows * TILE_COLUMNS * 4
    return weights.n_slices * _ring_bytes(backend) + activations + partial


def _gemv_rows(backend: Backend, x: Tensor, weights: CudaWeights) -> int:
    """Rows that one block of the kernel for few rows takes; 0 where it does not serve."""
    if x.dtype == torch.float16:
        choices = [x.shape[0]] if x.shape[0] <= _GEMV_ROWS else []
    else:
        choices = [4, 1] if x.shape[0] > 1 else [1]
    for rows in choices:
        if _gemv_bytes(backend, weights, rows, x.element_size()) <= backend.max_shared_bytes:
            return rows
    return 0


def _gemv(
    backend: Backend, x: Tensor, weights: CudaWeights, bias: Tensor | None, y: Tensor, epilogue: int, rows: int
) -> None:
    n_tiles = weights.tiles.shape[0]
    shared_bytes = _gemv_bytes(backend, weights, rows, x.element_size())
    # As many blocks as run at once: each goes on from tile to tile.
    blocks = backend.multiprocessors * max(1, min(_MAX_GEMV_BLOCKS, backend.max_shared_bytes // shared_bytes))
    module = f"{_prefix(weights)}_gemv" + ("" if x.dtype == torch.float16 else "_f32")
    kernel = f"{module}_f16" if x.dtype == torch.float16 else f"{module}_r{rows}"
    backend.launch(
        module,
        kernel,
        (min(n_tiles, blocks), ceil_div(x.shape[0], rows), 1),
        (weights.n_slices * WARP_THREADS, 1, 1),
        (
            x,
            _optional(weights.stored_rows),
            *_matrix(weights),
            weights.slices,
            weights.spans,
            bias,
            y,
            I64(y.stride(0)),
            I32(epilogue),
            I32(n_tiles),
            I32(weights.in_features),
            I32(weights.n_chunks),
            I32(x.shape[0]),
            I32(weights.n_slices),
            I32(weights.n_sections),
        ),
        shared_bytes=shared_bytes,
    )


def _matrix(weights: CudaWeights) -> tuple[Argument, Argument, Argument]:
    return weights.stream, weights.tiles, weights.chunks


# ---- some dozens of rows ----


def _gemm(backend: Backend, x: Tensor, weights: CudaWeights, bias: Tensor | None, y: Tensor, epilogue: int) -> None:
    n_rows, n_tiles = x.shape[0], weights.tiles.shape[0]
    block_rows = next((rows for rows in _GEMM_ROWS if rows >= n_rows), _GEMM_ROWS[-1])
    n_blocks = ceil_div(n_rows, block_rows)
    stored = torch.empty((n_blocks, weights.n_chunks, block_rows, CHUNK_ROWS), dtype=x.dtype, device=x.device)
    backend.launch(
        "permute_rows",
        "permute_rows_f16",
        (n_blocks * block_rows, 1, 1),
        (512, 1, 1),
        (
            x,
            _optional(weights.stored_rows),
            stored,
            I32(weights.in_features),
            I32(weights.n_chunks),
            I32(n_rows),
            I32(block_rows),
        ),
        shared_bytes=weights.n_chunks * CHUNK_ROWS * 2,
    )
    partial = None
    if weights.n_sections > 1:
        shape = (weights.n_sections, n_rows, weights.out_features)
        partial = torch.empty(shape, dtype=torch.float32, device=x.device)
    chunk_units = weights.max_chunk_bits * CHUNK_ROWS * TILE_COLUMNS // 8 // UNIT_BYTES
    slot_units = 2 * weights.header_units + _STEP_CHUNKS * chunk_units
    stage_bytes = _STEP_CHUNKS * block_rows * CHUNK_ROWS * 2 + _GEMM_WARPS * slot_units * UNIT_BYTES
    backend.launch(
        f"{_prefix(weights)}_gemm",
        f"{_prefix(weights)}_gemm_r{block_rows}",
        (ceil_div(n_tiles, _GEMM_WARPS), weights.n_sections, n_blocks),
        (_GEMM_WARPS * WARP_THREADS, 1, 1),
        (
            stored,
            *_matrix(weights),
            weights.slices,
            bias,
            y,
            partial,
            I64(y.stride(0)),
            I32(epilogue),
            I32(n_tiles),
            I32(weights.n_chunks),
            I32(n_rows),
            I32(weights.n_slices),
            I32(weights.n_sections),
            I32(slot_units),
        ),
        shared_bytes=(4 if backend.arch >= 80 else 2) * stage_bytes,
    )
    if partial is not None:
        backend.launch(
            "add_sections",
            "add_sections",
            (ceil_div(weights.out_features // 4, 256), n_rows, 1),
            (256, 1, 1),
            (
                partial,
                bias,
                y,
                I64(y.stride(0)),
                I32(epilogue),
                I32(weights.out_features),
                I32(weights.n_sections),
            ),
        )


# ---- many rows ----


def dequantise(
    backend: Backend,
    weights: CudaWeights,
    dtype: torch.dtype = torch.float16,
    *,
    first_tile: int = 0,
    last_tile: int | None = None,
) -> Tensor:
    """Weights as plain numbers, in the order of the input features, bit for bit what the format says.

    Args:
        backend: runs the kernel.
        weights: K x N.
        dtype: float16, or float32 with the same numbers.
        first_tile, last_tile: the tiles of 32 columns wanted, the last one excluded; None is all.

    Returns:
        [K, 32 * (last_tile - first_tile)].
    """
    n_tiles = (weights.tiles.shape[0] if last_tile is None else last_tile) - first_tile
    result = torch.empty((weights.in_features, n_tiles * TILE_COLUMNS), dtype=dtype, device=weights.device)
    backend.launch(
        f"{_prefix(weights)}_dequantise",
        f"{_prefix(weights)}_dequantise_{'f16' if dtype == torch.float16 else 'f32'}",
        (ceil_div(weights.n_chunks, _DEQUANTISE_WARPS), n_tiles, 1),
        (_DEQUANTISE_WARPS * WARP_THREADS, 1, 1),
        (*_matrix(weights), _optional(weights.features), result, I32(first_tile), I32(weights.n_chunks)),
    )
    return result


def _library_matmul(
    backend: Backend, x: Tensor, weights: CudaWeights, bias: Tensor | None, y: Tensor, *, accumulate: bool
) -> None:
    """y = x w + bias, or y += x w + bias, some columns of w at a time."""
    n_tiles = weights.tiles.shape[0]
    step = max(1, _SCRATCH_BYTES // (weights.in_features * x.element_size() * TILE_COLUMNS))
    if step > _SCRATCH_COLUMNS // TILE_COLUMNS:
        step -= step % (_SCRATCH_COLUMNS // TILE_COLUMNS)
    with full_precision():
        for first in range(0, n_tiles, step):
            last = min(first + step, n_tiles)
            columns = slice(first * TILE_COLUMNS, last * TILE_COLUMNS)
            decoded = dequantise(backend, weights, x.dtype, first_tile=first, last_tile=last)
            target = y[:, columns]
            if not accumulate and y.dtype == x.dtype and bias is None:
                torch.mm(x, decoded, out=target)
                continue
            product = torch.mm(x, decoded).to(torch.float32)
            if bias is not None:
                product += bias[columns]
            if accumulate:
                target += product
            else:
                target.copy_(product)


@contextmanager
def full_precision() -> Iterator[None]:
    """Library products without TF32 and without float16 sums, whatever the process has set."""
    matmul = torch.backends.cuda.matmul
    reduced = matmul.allow_fp16_reduced_precision_reduction
    precision = matmul.fp32_precision if hasattr(matmul, "fp32_precision") else None
    tf32 = matmul.allow_tf32 if precision is None else None
    matmul.allow_fp16_reduced_precision_reduction = False
    if precision is None:
        matmul.allow_tf32 = False
    else:
        matmul.fp32_precision = "ieee"
    try:
        yield
    finally:
        matmul.allow_fp16_reduced_precision_reduction = reduced
        if precision is None:
            matmul.allow_tf32 = tf32
        else:
            matmul.fp32_precision = precision
