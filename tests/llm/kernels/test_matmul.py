"""exl2_matmul, gptq_matmul and dense_matmul: each implementation against the reference, and row by row."""

from __future__ import annotations

import pytest
import torch

from exl2_rag.errors import DTypeError, ShapeError
from exl2_rag.llm.kernels import ops, reference
from tests.llm.kernels.samples import (
    AWKWARD,
    MIXES,
    assert_close,
    exl2_parts,
    exl2_weights,
    generator,
    gptq_weights,
    normal,
)
from tests.support.golden import EXL2_NAMES, GPTQ_NAMES, PRESCALED_NAMES, QUANTISER_NAMES, golden

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


# ---- exl2 ----


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("out_features", [32, 96])
def test_exl2_matmul_agrees_with_the_reference_for_every_mix(native_level, mix, out_features):
    weights = exl2_weights(MIXES[mix], out_features)
    for rows in (1, 5, 17):
        x = normal(rows, weights.in_features, seed=rows)
        assert_close("exl2_matmul", ops.exl2_matmul(x, weights), reference.exl2_matmul(x, weights))


@pytest.mark.parametrize("rows", AWKWARD)
def test_exl2_matmul_agrees_with_the_reference_at_awkward_sizes(native_level, rows):
    for groups in ([(4, 32)], [(3, 32), (2, 64)], [(5, 128), (5, 32)], [(6, 256), (4, 96)]):
        for permuted in (True, False):
            weights = exl2_weights(groups, 64, permuted=permuted)
            x = normal(rows, weights.in_features, seed=rows)
            assert_close("exl2_matmul", ops.exl2_matmul(x, weights), reference.exl2_matmul(x, weights))


@pytest.mark.parametrize("name", EXL2_NAMES + QUANTISER_NAMES)
def test_exl2_matmul_by_the_identity_gives_the_golden_weights_bit_for_bit(native_level, name):
    layer = golden(name)
    parts = layer.parts()
    parts.pop("bias", None)
    weights = ops.exl2_prepare(**parts)
    assert torch.equal(ops.exl2_matmul(torch.eye(weights.in_features), weights), layer.tensors["expected"].float())


@pytest.mark.parametrize("name", PRESCALED_NAMES)
def test_exl2_matmul_takes_a_prescale_bit_for_bit(native_level, name):
    layer = golden(name)
    weights = ops.exl2_prepare(**layer.parts(), prescale=layer.prescale)
    expected = layer.tensors["expected_prescaled"].float()
    assert torch.equal(ops.exl2_matmul(torch.eye(weights.in_features), weights), expected)


def test_the_reference_gives_the_golden_weights_too():
    layer = golden("mix_8_6_5_4_3_2_random")
    weights = ops.exl2_prepare(**layer.parts())
    identity = torch.eye(weights.in_features)
    assert torch.equal(reference.exl2_matmul(identity, weights), layer.tensors["expected"].float())


def test_a_row_of_exl2_matmul_is_the_same_alone_and_in_any_batch(native_level):
    weights = exl2_weights(MIXES["all"], 96)
    x = normal(129, weights.in_features)
    together = ops.exl2_matmul(x, weights)
    for row in range(129):
        assert torch.equal(ops.exl2_matmul(x[row : row + 1], weights)[0], together[row])
    for rows in AWKWARD:
        assert torch.equal(ops.exl2_matmul(x[5 : 5 + rows], weights), together[5 : 5 + rows])


@pytest.mark.usefixtures("native_kernels", "restore_threads")
def test_results_are_the_same_for_any_number_of_threads():
    weights, dense, packed = exl2_weights([(4, 512)], 1024), normal(1024, 512), gptq_weights(512, 1024, 4)
    x = normal(33, 512)
    case_q = normal(33, 512)
    outputs = []
    for threads in (1, 2, 5, 3):
        ops.set_num_threads(threads)
        outputs.append(
            (
                ops.exl2_matmul(x, weights),
                ops.gptq_matmul(x, packed),
                ops.dense_matmul(x, dense),
                ops.silu_mul(case_q, x),
                ops.rms_norm(x, dense[0], 1e-5),
            )
        )
    for output in outputs[1:]:
        for one, other in zip(output, outputs[0], strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("bits", [8, 6, 5, 4, 3])
@pytest.mark.parametrize("scale_max", [30000.0, 65504.0, -60000.0])
def test_weights_beyond_float16_become_infinite_as_the_format_says(native_level, scale_max, bits):
    parts = exl2_parts([(bits, 32), (2, 32)], 32, seed=4)
    parts["q_scale_max"] = torch.tensor([scale_max, 0.01], dtype=torch.float16)
    weights = ops.exl2_prepare(**parts, prescale=16.0)
    expected = reference.exl2_matmul(torch.eye(64), weights)
    decoded = reference._exl2_decode(weights, reference._groups_of(weights), 0, 1)
    finite = decoded.isfinite().all(0)  # columns of small scales: their weights must still be exact
    assert decoded.isinf().any()
    assert finite.any() or bits == 8 or abs(scale_max) > 30000
    assert torch.equal(ops.exl2_matmul(torch.eye(64), weights)[:, finite], expected[:, finite])
    assert not ops.exl2_matmul(torch.ones(1, 64), weights)[:, ~finite].isfinite().any()


def test_exl2_prepare_leaves_its_inputs_alone():
    parts = exl2_parts(MIXES["all"], 64)
    before = {name: part.clone() for name, part in parts.items()}
    weights = ops.exl2_prepare(**parts, prescale=0.5)
    weights.codes.zero_()
    weights.group_scales.zero_()
    for name, part in parts.items():
        assert torch.equal(part, before[name]), name


def test_codes_stay_packed_in_memory():
    weights = exl2_weights([(4, 1024)], 1024)
    assert weights.nbytes < 1024 * 1024 * 4.2 / 8


def test_no_rows_give_no_rows():
    weights = exl2_weights([(4, 32)], 32)
    assert ops.exl2_matmul(torch.empty(0, 32), weights).shape == (0, 32)
    assert ops.dense_matmul(torch.empty(0, 8), torch.ones(5, 8)).shape == (0, 5)


def test_strided_activations_are_taken(native_level):
    weights = exl2_weights([(4, 64)], 32)
    wide = normal(6, 128)
    assert torch.equal(ops.exl2_matmul(wide[:, ::2], weights), ops.exl2_matmul(wide[:, ::2].contiguous(), weights))


# ---- gptq ----


@pytest.mark.parametrize("rows", AWKWARD)
@pytest.mark.parametrize("act_order", [False, True])
def test_gptq_matmul_agrees_with_the_reference(native_level, rows, act_order):
    for in_features, out_features, n_groups in ((8, 32, 1), (136, 32, 2), (256, 96, 4)):
        weights = gptq_weights(in_features, out_features, n_groups, act_order=act_order)
        x = normal(rows, in_features, seed=rows)
        assert_close("gptq_matmul", ops.gptq_matmul(x, weights), reference.gptq_matmul(x, weights))


@pytest.mark.parametrize("name", GPTQ_NAMES)
def test_gptq_matmul_by_the_identity_gives_the_golden_weights_bit_for_bit(native_level, name):
    layer = golden(name)
    parts = layer.parts()
    parts.pop("bias", None)
    weights = ops.gptq_prepare(**parts, zero_offset=0 if layer.checkpoint_format == "gptq_v2" else 1)
    assert torch.equal(ops.gptq_matmul(torch.eye(weights.in_features), weights), layer.tensors["expected"].float())


def test_a_row_of_gptq_matmul_is_the_same_alone_and_in_any_batch(native_level):
    weights = gptq_weights(264, 64, 3, act_order=True)
    x = normal(33, 264)
    together = ops.gptq_matmul(x, weights)
    for row in range(33):
        assert torch.equal(ops.gptq_matmul(x[row : row + 1], weights)[0], together[row])


def test_gptq_weights_beyond_float16_become_infinite(native_level):
    scales = torch.full((1, 32), 60000.0)
    codes = torch.zeros((1, 32), dtype=torch.int32)
    codes[0, 0] = 0x0000_0003
    weights = ops.gptq_prepare(codes, torch.zeros((1, 4), dtype=torch.int32), scales)
    x = torch.zeros(1, 8)
    x[0, 0] = 1.0
    product = ops.gptq_matmul(x, weights)
    assert product[0, 0] == float("inf")  # (3 - 1) * 60000
    assert product[0, 1] == -60000.0


# ---- dense ----


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", AWKWARD)
def test_dense_matmul_agrees_with_the_reference_at_awkward_sizes(native_level, dtype, rows):
    for in_features in AWKWARD:
        for out_features in (1, 2, 17, 33):
            x = normal(rows, in_features, seed=rows)
            weight = (normal(out_features, in_features, seed=in_features) * 0.2).to(dtype)
            assert_close("dense_matmul", ops.dense_matmul(x, weight), reference.dense_matmul(x, weight))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_of_dense_matmul_is_the_same_alone_and_in_any_batch(native_level, dtype):
    weight = normal(37, 131).to(dtype)
    x = normal(33, 131)
    together = ops.dense_matmul(x, weight)
    for row in range(33):
        assert torch.equal(ops.dense_matmul(x[row : row + 1], weight)[0], together[row])
    for rows in AWKWARD[:-1]:
        assert torch.equal(ops.dense_matmul(x[:rows], weight), together[:rows])


def test_every_float16_number_is_widened_exactly(native_level):
    numbers = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(torch.float16)
    numbers = numbers[numbers.isfinite()]
    product = ops.dense_matmul(torch.ones(1, 1), numbers[:, None].contiguous())
    assert torch.equal(product[0], numbers.float())


# ---- what is refused ----


def test_tensors_that_do_not_fit_are_refused_with_both_sizes():
    weights = exl2_weights([(4, 64)], 32)
    with pytest.raises(ShapeError, match=r"x must be \[T, 64\], it is \[2, 32\]"):
        ops.exl2_matmul(torch.ones(2, 32), weights)
    with pytest.raises(DTypeError, match="x must be float32"):
        ops.exl2_matmul(torch.ones(2, 64, dtype=torch.float16), weights)
    with pytest.raises(ShapeError, match="must have 2 dimensions"):
        ops.exl2_matmul(torch.ones(64), weights)
    with pytest.raises(ShapeError, match=r"weight must be \[N, 3\] and contiguous"):
        ops.dense_matmul(torch.ones(2, 3), torch.ones(3, 5).T)
    with pytest.raises(DTypeError, match="weight must be"):
        ops.dense_matmul(torch.ones(2, 3), torch.ones(5, 3, dtype=torch.float64))
    with pytest.raises(ShapeError, match=r"x must be \[T, 16\]"):
        ops.gptq_matmul(torch.ones(2, 8), gptq_weights(16, 32, 1))


@pytest.mark.parametrize(
    ("part", "change", "error", "message"),
    [
        ("q_weight", lambda t: t.long(), DTypeError, "q_weight must be torch.int32"),
        ("q_weight", lambda t: t[:, :40], ShapeError, "multiple of 32 columns, it has 40"),
        ("q_weight", lambda t: t[:-1], ShapeError, "packed rows"),
        ("q_groups", lambda t: t[None], ShapeError, "1 dimension"),
        ("q_groups", lambda t: t[:2], ShapeError, "q_scale_max 2"),
        ("q_scale", lambda t: t[:1], ShapeError, r"q_scale \[1, 8\]"),
        ("q_scale_max", lambda t: t.float(), DTypeError, "float16"),
        ("q_invperm", lambda t: t[1:], ShapeError, r"q_invperm is \[95\]"),
    ],
)
def test_tensors_that_are_not_one_exl2_matrix_are_refused(part, change, error, message):
    parts = exl2_parts([(4, 64), (3, 32)], 64)
    parts[part] = change(parts[part])
    with pytest.raises(error, match=message):
        ops.exl2_prepare(**parts)


@pytest.mark.parametrize(
    ("part", "value", "error", "message"),
    [
        ("qweight", torch.zeros(2, 32), DTypeError, "qweight must be int32"),
        ("qweight", torch.zeros(2, 40, dtype=torch.int32), ShapeError, "multiple of 32"),
        ("qzeros", torch.zeros(1, 5, dtype=torch.int32), ShapeError, "do not describe one matrix"),
        ("scales", torch.ones(2, 32, dtype=torch.int32), DTypeError, "floating point"),
        ("g_idx", torch.full((16,), 2, dtype=torch.int32), ShapeError, "values 0 to 1"),
        ("g_idx", torch.zeros(8, dtype=torch.int32), ShapeError, r"g_idx must be \[16\]"),
    ],
)
def test_tensors_that_are_not_one_gptq_matrix_are_refused(part, value, error, message):
    parts = {
        "qweight": torch.zeros(2, 32, dtype=torch.int32),
        "qzeros": torch.zeros(2, 4, dtype=torch.int32),
        "scales": torch.ones(2, 32),
        "g_idx": torch.zeros(16, dtype=torch.int32),
    }
    with pytest.raises(error, match=message):
        ops.gptq_prepare(**parts | {part: value})


def test_gptq_prepare_leaves_its_inputs_alone():
    parts = {
        "qweight": torch.randint(0, 99, (2, 32), generator=generator(0)).to(torch.int32),
        "qzeros": torch.randint(0, 99, (2, 4), generator=generator(1)).to(torch.int32),
        "scales": torch.ones(2, 32, dtype=torch.float16),
        "g_idx": torch.arange(16, dtype=torch.int32) // 8,
    }
    before = {name: part.clone() for name, part in parts.items()}
    weights = ops.gptq_prepare(**parts, prescale=0.5)
    for tensor in (weights.codes, weights.scales, weights.zeros, weights.row_groups):
        tensor.zero_()
    for name, part in parts.items():
        assert torch.equal(part, before[name]), name
