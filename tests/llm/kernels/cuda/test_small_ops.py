from __future__ import annotations

import pytest
import torch

from exl2_rag.llm.kernels import cuda_small_ops, reference
from tests.cuda_emulation import EmulatedBackend
from tests.llm.kernels.samples import AWKWARD, normal

FLOATS = {"f32": torch.float32, "f16": torch.float16}


def assert_near(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Within the rounding of the result's dtype and the float32 sums behind it."""
    limit = 2e-6 if actual.dtype == torch.float32 else 1e-3
    torch.testing.assert_close(actual.float(), expected.float(), atol=limit, rtol=limit)


@pytest.mark.parametrize("columns", [*AWKWARD, 64, 1000, 4100])
@pytest.mark.parametrize("rows", [1, 3])
def test_rms_norm_is_as_the_reference(target, rows, columns):
    x = normal(rows, columns).to(target.device)
    weight = normal(columns, seed=1).to(target.device)
    actual = cuda_small_ops.rms_norm(target.backend, x, weight, 1e-5)
    assert_near(actual, reference.rms_norm(x, weight, 1e-5))


@pytest.mark.parametrize("out_dtype", FLOATS.values(), ids=FLOATS)
@pytest.mark.parametrize("dtype", FLOATS.values(), ids=FLOATS)
def test_rms_norm_takes_and_gives_either_dtype(target, dtype, out_dtype):
    x = normal(5, 132).to(target.device, dtype)
    weight = normal(132, seed=1).to(target.device)
    actual = cuda_small_ops.rms_norm(target.backend, x, weight, 1e-5, out_dtype)
    assert actual.dtype == out_dtype
    assert_near(actual, reference.rms_norm(x.float(), weight, 1e-5))


def test_a_row_of_rms_norm_does_not_depend_on_the_others_or_on_strides(target):
    wide = normal(7, 259).to(target.device)
    weight = normal(128, seed=1).to(target.device)
    x = wide[:, 3:131]
    together = cuda_small_ops.rms_norm(target.backend, x, weight, 1e-6)
    for row in range(7):
        alone = cuda_small_ops.rms_norm(target.backend, x[row : row + 1].clone(), weight, 1e-6)
        assert torch.equal(alone[0], together[row])


@pytest.mark.parametrize("order", ["reverse", "shuffled"])
def test_rms_norm_does_not_depend_on_the_order_of_threads(order):
    x, weight = normal(3, 516), normal(516, seed=1)
    forward = cuda_small_ops.rms_norm(EmulatedBackend(80), x, weight, 1e-6)
    assert torch.equal(forward, cuda_small_ops.rms_norm(EmulatedBackend(80, order=order), x, weight, 1e-6))


@pytest.mark.parametrize("dtype", FLOATS.values(), ids=FLOATS)
@pytest.mark.parametrize("columns", [1, 33, 128, 1000])
def test_add_rms_norm_adds_in_place_and_norms_the_sum(target, columns, dtype):
    residual = normal(5, columns).to(target.device)
    delta = normal(5, columns, seed=1).to(target.device, dtype)
    weight = normal(columns, seed=2).to(target.device)
    wanted = residual + delta.float()
    actual = cuda_small_ops.add_rms_norm(target.backend, residual, delta, weight, 1e-5, torch.float16)
    assert torch.equal(residual, wanted)
    assert torch.equal(actual, cuda_small_ops.rms_norm(target.backend, wanted, weight, 1e-5, torch.float16))


def test_rms_norm_of_huge_and_tiny_rows_stays_finite(target):
    x = torch.tensor([[1e15] * 8, [1e-15] * 8, [0.0] * 8], device=target.device)
    actual = cuda_small_ops.rms_norm(target.backend, x, torch.ones(8, device=target.device), 1e-6)
    assert_near(actual, reference.rms_norm(x, torch.ones(8, device=target.device), 1e-6))


ACTIVATIONS = {
    "silu": torch.nn.functional.silu,
    "gelu_tanh": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
    "gelu": torch.nn.functional.gelu,
}


@pytest.mark.parametrize("dtype", FLOATS.values(), ids=FLOATS)
@pytest.mark.parametrize("kind", ACTIVATIONS)
@pytest.mark.parametrize("columns", [1, 31, 33, 1024, 1100])
def test_gated_activations_are_as_torch_has_them(target, columns, kind, dtype):
    both = (4 * normal(3, 2 * columns)).to(target.device, dtype)
    gate, up = both[:, :columns], both[:, columns:]
    actual = cuda_small_ops.gated_activation(target.backend, kind, gate, up)
    assert actual.dtype == dtype
    assert_near(actual, ACTIVATIONS[kind](gate.double()) * up.double())


def test_silu_of_very_negative_numbers_is_zero(target):
    gate = torch.tensor([[-1e4, -100.0, -88.0, 1e4]], device=target.device)
    actual = cuda_small_ops.gated_activation(target.backend, "silu", gate, torch.ones_like(gate))
    assert_near(actual, reference.silu_mul(gate, torch.ones_like(gate)))


PAGES = {**FLOATS, "bf16": torch.bfloat16}


@pytest.mark.parametrize("dtype", PAGES.values(), ids=PAGES)
@pytest.mark.parametrize("columns", [1, 33, 2052])
def test_embedding_widens_the_rows(target, columns, dtype):
    table = normal(7, columns).to(target.device, dtype)
    ids = torch.tensor([6, 0, 3, 3], device=target.device)
    actual = cuda_small_ops.embedding(target.backend, table, ids)
    assert actual.dtype == torch.float32
    assert torch.equal(actual, table.float()[ids])


@pytest.mark.parametrize("page_dtype", PAGES.values(), ids=PAGES)
@pytest.mark.parametrize("dtype", FLOATS.values(), ids=FLOATS)
@pytest.mark.parametrize(("head_dim", "rotary_dim"), [(2, 2), (64, 64), (80, 32), (128, 128), (256, 64)])
@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (7, 1), (4, 2)])
def test_rope_cache_write_is_as_the_reference(target, heads, kv_heads, head_dim, rotary_dim, dtype, page_dtype):
    rows, page_size = 5, 16
    both = normal(rows, (heads + 2 * kv_heads) * head_dim).to(target.device, dtype)
    q, k, v = (
        part.unflatten(1, (-1, head_dim)) for part in both.split([n * head_dim for n in (heads, kv_heads, kv_heads)], 1)
    )
    cos, sin = (normal(40, rotary_dim // 2, seed=seed).to(target.device) for seed in (1, 2))
    positions = torch.tensor([0, 39, 7, 8, 9], device=target.device)
    slots = torch.tensor([47, 0, 17, 16, 3], device=target.device)
    pages = [torch.zeros((3, page_size, kv_heads, head_dim), dtype=page_dtype, device=target.device) for _ in range(4)]
    actual = cuda_small_ops.rope_cache_write(target.backend, q, k, v, cos, sin, positions, slots, *pages[:2])
    wanted = reference.rope_cache_write(q.float(), k.float(), v.float(), cos, sin, positions, slots, *pages[2:])
    assert actual.dtype == dtype
    assert_near(actual, wanted)
    # A page number lies between two that bfloat16 has; which one it becomes may hang on the last bit before.
    for page, expected in zip(pages[:2], pages[2:], strict=True):
        limit = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}[page_dtype]
        torch.testing.assert_close(page.float(), expected.float(), atol=limit, rtol=limit)
    assert torch.equal(pages[1], pages[3])  # values are only rounded


def test_a_negative_slot_is_not_written(target):
    q, k, v = (normal(2, 1, 8, seed=seed).to(target.device) for seed in range(3))
    table = torch.ones((1, 4), device=target.device)
    pages = [torch.full((1, 16, 1, 8), 7.0, device=target.device) for _ in range(2)]
    slots = torch.tensor([-1, 2], device=target.device)
    positions = torch.zeros(2, dtype=torch.int64, device=target.device)
    cuda_small_ops.rope_cache_write(target.backend, q, k, v, table, table, positions, slots, *pages)
    for page in pages:
        assert (page[0, [0, 1, *range(3, 16)]] == 7.0).all()
        assert (page[0, 2] != 7.0).all()


@pytest.mark.parametrize("weight_dtype", PAGES.values(), ids=PAGES)
@pytest.mark.parametrize("dtype", FLOATS.values(), ids=FLOATS)
@pytest.mark.parametrize(("in_features", "out_features"), [(1, 1), (33, 3), (256, 5), (1032, 33)])
@pytest.mark.parametrize("rows", [1, 2, 5])
def test_dense_gemv_is_as_the_reference(target, rows, in_features, out_features, dtype, weight_dtype):
    x = normal(rows, in_features).to(target.device, dtype)
    weight = normal(out_features, in_features, seed=1).to(target.device, weight_dtype)
    bias = normal(out_features, seed=2).to(target.device)
    actual = cuda_small_ops.dense_gemv(target.backend, x, weight, bias=bias, out_dtype=torch.float32)
    torch.testing.assert_close(actual, reference.dense_matmul(x, weight) + bias, atol=2e-5, rtol=2e-5)
    residual = normal(rows, out_features, seed=3).to(target.device)
    wanted = residual + reference.dense_matmul(x, weight)
    assert cuda_small_ops.dense_gemv(target.backend, x, weight, residual=residual) is residual
    torch.testing.assert_close(residual, wanted, atol=2e-5, rtol=2e-5)
    alone = cuda_small_ops.dense_gemv(target.backend, x[rows - 1 :], weight, bias=bias, out_dtype=torch.float32)
    assert torch.equal(alone[0], actual[rows - 1])


def test_ops_of_no_rows_launch_nothing(target):
    nothing, weight = torch.empty((0, 8), device=target.device), torch.ones(8, device=target.device)
    assert cuda_small_ops.rms_norm(target.backend, nothing, weight, 1e-5).shape == (0, 8)
    assert cuda_small_ops.gated_activation(target.backend, "silu", nothing, nothing).shape == (0, 8)
    assert cuda_small_ops.dense_gemv(target.backend, nothing, torch.ones((3, 8), device=target.device)).shape == (0, 3)
