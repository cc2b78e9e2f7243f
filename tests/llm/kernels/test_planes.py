"""The precision "fast": activations as whole numbers, weights as planes, at every level of processor."""

from __future__ import annotations

import pytest
import torch

from exl2_rag.errors import DTypeError, ShapeError
from exl2_rag.llm.kernels import ops, reference, reference_planes
from exl2_rag.llm.kernels.weights import Group, PlaneWeights
from tests.llm.kernels.samples import (
    AWKWARD,
    MIXES,
    assert_close,
    exl2_parts,
    generator,
    gptq_parts,
    normal,
    plane_weights,
)

NONE = torch.empty(0, dtype=torch.int32)


def sorted_groups(in_features: int, n_groups: int) -> torch.Tensor:
    """A group for each row, scattered, each group with equally many rows."""
    return (torch.randperm(in_features, generator=generator(3)) % n_groups).to(torch.int32)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_planes_hold_the_codes_in_as_many_bytes(bits):
    codes = torch.randint(0, 1 << bits, (96, 64), generator=generator(bits)).to(torch.int32)
    planes = reference_planes.pack_planes(codes, bits)
    assert planes.shape == (2, 3 * bits, 128)
    assert torch.equal(reference_planes.unpack_planes(planes, bits), codes)


@pytest.mark.parametrize("mix", MIXES)
def test_native_repacking_equals_the_reference(mix, native_level):
    parts = exl2_parts(MIXES[mix], 96)
    weights = ops.exl2_prepare_planes(**parts)
    starts, first = [], 0
    for bits, rows in MIXES[mix]:
        starts.append(Group(bits, first, rows))
        first += rows * bits // 32
    planes, scales = reference_planes.exl2_planes(parts["q_weight"], parts["q_scale"], starts)
    assert torch.equal(weights.planes, planes)
    assert torch.equal(weights.scales, scales)
    exact = ops.exl2_prepare(**parts)
    assert torch.equal(weights.perm, exact.perm)
    assert weights.nbytes == exact.nbytes


@pytest.mark.parametrize("rows", AWKWARD)
def test_whole_numbers_equal_the_reference_to_the_bit(rows, native_level):
    x = normal(rows, 96) * torch.logspace(-3, 3, 96)
    perm = torch.randperm(96, generator=generator(1)).to(torch.int32)
    for order in (perm, NONE):
        made, expected = ops.digits(x, order), reference_planes.digits(x, order)
        assert torch.equal(made.digits, expected.digits)
        assert torch.equal(made.scales, expected.scales)
        assert torch.equal(made.sums, expected.sums)


@pytest.mark.parametrize("rows", [4, 5])
def test_whole_numbers_are_within_half_a_step(rows, native_level):
    x = normal(rows, 64)
    made = ops.digits(x, NONE)
    numbers = reference_planes.numbers_of(made)
    assert int(numbers.abs().max()) == 127 * 128
    scales = made.scales.T if made.is_whole else made.scales
    error = (numbers * scales[..., None]).flatten(1) - x
    largest = x.reshape(rows, 2, 32).abs().amax(-1).repeat_interleave(32, dim=1)
    assert bool((error.abs() <= 0.501 * largest / (127 * 128)).all())


def test_zeros_tiny_numbers_and_infinities_are_whole_numbers_too(native_level):
    x = torch.zeros(1, 128)
    x[0, 33], x[0, 64], x[0, 100] = 1e-38, float("inf"), float("nan")
    made = ops.digits(x, NONE)
    assert not made.digits.any()
    assert made.scales[0, :2].tolist() == [0, 0]
    assert bool(made.scales[0, 2:].isnan().all())
    weights = plane_weights([(4, 128)], 32)
    assert bool(ops.plane_matmul(made, weights).isnan().all())
    assert not ops.plane_matmul(ops.digits(x[:, :64].repeat(1, 2), NONE), weights).any()


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("rows", AWKWARD)
def test_products_are_those_of_the_reference(mix, rows, native_level):
    weights = plane_weights(MIXES[mix], 96)
    made = ops.digits(normal(rows, weights.in_features), weights.perm)
    assert_close("plane_matmul", ops.plane_matmul(made, weights), reference_planes.plane_matmul(made, weights))


def test_products_hold_at_the_largest_codes_and_numbers(native_level):
    for bits in (2, 3, 4, 5, 6, 8):
        parts = exl2_parts([(bits, 128)], 32)
        parts["q_weight"] = torch.full_like(parts["q_weight"], -1)  # every code at its maximum
        weights = ops.exl2_prepare_planes(**parts)
        for sign in (1, -1):
            made = ops.digits(torch.full((5, 128), sign * 3.0), NONE)
            expected = reference_planes.plane_matmul(made, weights)
            torch.testing.assert_close(ops.plane_matmul(made, weights), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("mix", ["4", "6/3/2", "all"])
def test_a_row_depends_on_itself_alone(mix, native_level):
    weights = plane_weights(MIXES[mix], 64)
    x = normal(33, weights.in_features)
    together = ops.plane_matmul(ops.digits(x, weights.perm), weights)
    for first, last in ((0, 1), (1, 3), (3, 6), (6, 10), (10, 33)):
        alone = ops.plane_matmul(ops.digits(x[first:last], weights.perm), weights)
        assert torch.equal(alone, together[first:last])


@pytest.mark.parametrize("rows", [1, 4, 7])
def test_width_bias_and_target_are_honoured(rows, native_level):
    weights = plane_weights(MIXES["8/4"], 96)
    made = ops.digits(normal(rows, weights.in_features), weights.perm)
    bias, target = normal(70, seed=1), normal(rows, 70, seed=2)
    expected = reference_planes.plane_matmul(made, weights, width=70, bias=bias)
    assert_close("plane_matmul", ops.plane_matmul(made, weights, width=70, bias=bias), expected)
    added = ops.plane_matmul(made, weights, width=70, bias=bias, add_to=target)
    assert added is target
    assert_close("plane_matmul", target, normal(rows, 70, seed=2) + expected)


def test_the_number_of_threads_changes_nothing(restore_threads, native_kernels):
    weights = plane_weights([(5, 128)] * 4, 32 * 40)
    made = ops.digits(normal(9, 512), weights.perm)
    results = []
    for threads in (1, 2, 5):
        ops.set_num_threads(threads)
        results.append(ops.plane_matmul(made, weights))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_it_is_near_the_exact_product():
    parts = exl2_parts([(6, 64), (4, 128), (4, 128)], 128)
    x = normal(7, 320)
    exact = reference.exl2_matmul(x, ops.exl2_prepare(**parts))
    planes = ops.exl2_prepare_planes(**parts)
    fast = ops.plane_matmul(ops.digits(x, planes.perm), planes)
    assert float((fast - exact).norm() / exact.norm()) < 5e-4


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("rows", [1, 3, 4, 5, 17])
@pytest.mark.parametrize(("n_groups", "zero_offset"), [(1, 1), (4, 1), (8, 0)])
def test_gptq_goes_the_same_way(rows, n_groups, zero_offset, act_order, native_level):
    g_idx = sorted_groups(256, n_groups) if act_order else None
    parts = gptq_parts(256, 96, n_groups, g_idx=g_idx)
    weights = ops.gptq_prepare_planes(*parts, zero_offset=zero_offset, prescale=0.5)
    assert isinstance(weights, PlaneWeights)
    x = normal(rows, 256)
    made = ops.digits(x, weights.perm)
    product = ops.plane_matmul(made, weights)
    assert_close("plane_matmul", product, reference_planes.plane_matmul(made, weights))
    exact = reference.gptq_matmul(x, ops.gptq_prepare(*parts, zero_offset=zero_offset, prescale=0.5))
    assert float((product - exact).norm() / exact.norm()) < 5e-4


def test_a_gptq_group_that_no_row_names_is_left_out():
    g_idx = sorted_groups(128, 2) * 2  # groups 0 and 2 of 3
    parts = gptq_parts(128, 32, 3, g_idx=g_idx)
    weights = ops.gptq_prepare_planes(*parts)
    assert weights is not None
    assert weights.groups.tolist() == [[4, 64], [4, 64]]
    x = normal(2, 128)
    exact = reference.gptq_matmul(x, ops.gptq_prepare(*parts))
    product = ops.plane_matmul(ops.digits(x, weights.perm), weights)
    assert float((product - exact).norm() / exact.norm()) < 5e-4


def test_gptq_groups_of_no_whole_chunks_have_no_planes():
    g_idx = torch.tensor([0] * 31 + [1] * 33, dtype=torch.int32)
    assert ops.gptq_prepare_planes(*gptq_parts(64, 32, 2, g_idx=g_idx)) is None


def test_what_does_not_fit_is_refused():
    weights = plane_weights([(4, 64)], 64)
    made = ops.digits(normal(2, 64), NONE)
    with pytest.raises(ShapeError, match="K a multiple of 32"):
        ops.digits(normal(2, 40), NONE)
    with pytest.raises(ShapeError, match=r"perm \[K\] or empty"):
        ops.digits(normal(2, 64), torch.zeros(32, dtype=torch.int32))
    with pytest.raises(DTypeError, match="x must be float32"):
        ops.digits(normal(2, 64).half(), NONE)
    with pytest.raises(ShapeError, match="x must have 64 columns, it has 32"):
        ops.plane_matmul(ops.digits(normal(2, 32), NONE), weights)
    with pytest.raises(ShapeError, match="width must be 64 or up to 31 less, it is 32"):
        ops.plane_matmul(made, weights, width=32)
    with pytest.raises(ShapeError, match=r"bias must be \[64\]"):
        ops.plane_matmul(made, weights, bias=normal(63))
    with pytest.raises(ShapeError, match=r"add_to must be \[2, 64\]"):
        ops.plane_matmul(made, weights, add_to=normal(3, 64))
    with pytest.raises(ShapeError, match="not one EXL2 matrix"):
        ops.exl2_prepare_planes(**(exl2_parts([(4, 64)], 64) | {"q_groups": torch.tensor([7, 0], dtype=torch.int16)}))
