"""Products with packed EXL2 and GPTQ matrices: bit by bit against the formats, against the reference, with faults."""

from __future__ import annotations

import dataclasses
import itertools
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from exl2_rag.errors import DTypeError, KernelError, ShapeError
from exl2_rag.llm.kernels import cuda_matmul, cuda_packing, cuda_prepare, cuda_weights, ops, reference
from exl2_rag.llm.kernels.cuda_backend import SOURCE_DIR
from exl2_rag.llm.kernels.cuda_matmul import dequantise, packed_matmul
from exl2_rag.llm.kernels.cuda_weights import CudaWeights
from exl2_rag.llm.kernels.weights import EXL2_WIDTHS
from tests.cuda_emulation import EmulatedBackend
from tests.llm.kernels.samples import MIXES, exl2_parts, generator, normal
from tests.support.golden import EXL2_NAMES, GPTQ_NAMES, PRESCALED_NAMES, QUANTISER_NAMES, golden

ROWS = (1, 2, 3, 4, 5, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65)

# Long enough for several slices, with short last groups, and tiles beyond one block's eight.
LONG_MIX = [(8, 32), (6, 96), (5, 64), (4, 128), (3, 64), (2, 64), (2, 32)]


def prepared(parts: dict[str, Tensor], device: torch.device, **options) -> CudaWeights:
    return cuda_prepare.exl2_prepare(**{name: part.to(device) for name, part in parts.items()}, **options)


def exact_weights(parts: dict[str, Tensor], **options) -> Tensor:
    """[K, N] float32: the format's weights, from the reference."""
    weights = ops.exl2_prepare(**parts, **options)
    stored = reference._exl2_decode(weights, reference._groups_of(weights), 0, weights.codes.shape[0])
    return stored[parts["q_invperm"].long()].float()


def gptq_parts(in_features: int, out_features: int, sizes: list[int], *, seed: int = 0, shuffled: bool = False):
    """The on-disk tensors of a random matrix whose groups have the given sizes."""
    rng = generator(seed)
    assert sum(sizes) == in_features

    def words(*shape: int) -> Tensor:
        return torch.randint(-(1 << 31), 1 << 31, shape, generator=rng).to(torch.int32)

    g_idx = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes)).to(torch.int32)
    if shuffled:
        g_idx = g_idx[torch.randperm(in_features, generator=rng)]
    return {
        "qweight": words(in_features // 8, out_features),
        "qzeros": words(len(sizes), out_features // 8),
        "scales": (torch.rand((len(sizes), out_features), generator=rng) * 0.02).half(),
        "g_idx": g_idx,
    }


def exact_gptq(parts: dict[str, Tensor], **options) -> Tensor:
    weights = ops.gptq_prepare(**parts, **options)
    return reference.gptq_decode(weights, 0, weights.codes.shape[0]).float()


def prepared_gptq(parts: dict[str, Tensor], device: torch.device, **options) -> CudaWeights:
    return cuda_prepare.gptq_prepare(**{name: part.to(device) for name, part in parts.items()}, **options)


def assert_near(actual: Tensor, x: Tensor, exact: Tensor) -> None:
    """Within the declared tolerance of the product in float64."""
    tolerance = (ops.HALF_TOLERANCES if actual.dtype == torch.float16 else ops.TOLERANCES)["exl2_matmul"]
    expected = (x.cpu().double() @ exact.double()).float()
    torch.testing.assert_close(actual.cpu().float(), expected, atol=tolerance.absolute, rtol=tolerance.relative)


# ---- the layout ----


@pytest.mark.parametrize("bits", EXL2_WIDTHS)
def test_packed_codes_take_no_more_room_and_unpack_to_themselves(bits):
    codes = torch.randint(0, 1 << bits, (96, 64), generator=generator(bits), dtype=torch.int32)
    packed = cuda_packing.pack_chunks(codes, bits)
    assert packed.numel() * 32 == codes.numel() * bits
    assert torch.equal(cuda_packing.unpack_chunks(packed, bits), codes)


def test_a_matrix_takes_the_room_of_its_codes_and_scales():
    parts = exl2_parts([(4, 128)] * 8, 1024)
    codes_and_scales = parts["q_weight"].nbytes + parts["q_scale"].nbytes
    assert prepared(parts, torch.device("cpu")).stream.nbytes == codes_and_scales


@pytest.mark.parametrize("n_slices", [1, 2, 4, 8, 16])
def test_slices_are_never_empty_and_cost_about_the_same(n_slices):
    for n_chunks in (16, 17, 31, 33, 128, 448):
        costs = torch.randint(4, 11, (n_chunks,), generator=generator(n_chunks)).tolist()
        bounds = cuda_weights._partition(costs, n_slices)
        assert bounds[0] == 0
        assert bounds[-1] == n_chunks
        assert len(bounds) == n_slices + 1
        sums = [sum(costs[a:b]) for a, b in itertools.pairwise(bounds)]
        assert min(sums) > 0
        assert max(sums) <= sum(costs) / n_slices + 10


def test_how_a_matrix_is_cut_depends_on_nothing_but_the_matrix():
    parts = exl2_parts(LONG_MIX, 96)
    weights = prepared(parts, torch.device("cpu"))
    assert weights.n_slices == 4
    assert weights.n_slices % weights.n_sections == 0


def test_preparing_leaves_its_inputs_alone():
    parts = exl2_parts(MIXES["all"], 64)
    before = {name: part.clone() for name, part in parts.items()}
    weights = prepared(parts, torch.device("cpu"), prescale=0.5)
    for tensor in (weights.stream, weights.stored_rows, weights.features):
        tensor.zero_()
    for name, part in parts.items():
        assert torch.equal(part, before[name]), name


# ---- bit for bit ----


@pytest.mark.parametrize("name", EXL2_NAMES + QUANTISER_NAMES)
def test_dequantise_gives_the_golden_weights_bit_for_bit(target, name):
    layer = golden(name)
    parts = layer.parts()
    parts.pop("bias", None)
    weights = prepared(parts, target.device)
    for dtype in (torch.float16, torch.float32):
        actual = dequantise(target.backend, weights, dtype)
        assert actual.dtype == dtype
        assert torch.equal(actual.cpu().float(), layer.tensors["expected"].float())


@pytest.mark.parametrize("name", PRESCALED_NAMES)
def test_dequantise_takes_a_prescale_bit_for_bit(target, name):
    layer = golden(name)
    weights = prepared(layer.parts(), target.device, prescale=layer.prescale)
    actual = dequantise(target.backend, weights)
    assert torch.equal(actual.cpu().float(), layer.tensors["expected_prescaled"].float())


@pytest.mark.parametrize("name", GPTQ_NAMES)
def test_dequantise_gives_the_golden_gptq_weights_bit_for_bit(target, name):
    layer = golden(name)
    parts = layer.parts()
    parts.pop("bias", None)
    weights = prepared_gptq(parts, target.device, zero_offset=0 if layer.checkpoint_format == "gptq_v2" else 1)
    assert torch.equal(dequantise(target.backend, weights).cpu().float(), layer.tensors["expected"].float())


def test_dequantise_gives_any_range_of_tiles(target):
    parts = exl2_parts(MIXES["all"], 160)
    weights, exact = prepared(parts, target.device), exact_weights(parts)
    some = dequantise(target.backend, weights, first_tile=1, last_tile=4)
    assert torch.equal(some.cpu().float(), exact[:, 32:128])


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("permuted", [True, False])
def test_every_packed_kernel_multiplies_by_exactly_the_formats_weights(target, mix, permuted):
    parts = exl2_parts(MIXES[mix], 96, permuted=permuted)
    weights, exact = prepared(parts, target.device), exact_weights(parts)
    identity = torch.eye(weights.in_features, device=target.device)
    assert torch.equal(packed_matmul(target.backend, identity, weights, library_rows=None).cpu(), exact)
    for rows in (1, 3, 8, 16, 32, 64):
        some = packed_matmul(target.backend, identity[-rows:].half(), weights)
        assert torch.equal(some.cpu().float(), exact[-rows:]), rows


@pytest.mark.parametrize("scale_max", [0.001, -0.002, 60000.0])
def test_subnormal_and_huge_scales_are_kept_exactly(target, scale_max):
    parts = exl2_parts([(8, 32), (5, 32)], 64)
    parts["q_scale_max"] = torch.tensor([scale_max, 0.01], dtype=torch.float16)
    weights, exact = prepared(parts, target.device), exact_weights(parts)
    assert (exact != 0).any()
    assert exact.isinf().any() == (scale_max > 1)
    actual = dequantise(target.backend, weights).cpu().float()
    assert torch.equal(actual.nan_to_num(nan=1.5), exact.nan_to_num(nan=1.5))  # 0 times infinity


# ---- against the reference ----


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=["f16", "f32"])
def test_exl2_products_are_as_the_reference(target, rows, dtype):
    for groups, out_features in ((LONG_MIX, 96), ([(3, 32)], 32), ([(4, 128), (4, 128), (4, 32)], 288)):
        parts = exl2_parts(groups, out_features)
        weights = prepared(parts, target.device)
        x = normal(rows, weights.in_features, seed=rows).to(target.device, dtype)
        result = packed_matmul(target.backend, x, weights)
        assert result.dtype == dtype
        assert_near(result, x, exact_weights(parts))


@pytest.mark.parametrize("bits", EXL2_WIDTHS)
def test_exl2_products_of_each_width_are_as_the_reference(target, bits):
    parts = exl2_parts([(bits, 128), (bits, 128), (bits, 96)], 64)
    weights, exact = prepared(parts, target.device), exact_weights(parts)
    for rows in (1, 4, 17, 33):
        x = normal(rows, weights.in_features, seed=rows).to(target.device).half()
        assert_near(packed_matmul(target.backend, x, weights), x, exact)


def test_slices_of_more_chunks_than_a_warp_has_lanes_are_summed(target):
    parts = exl2_parts([(4, 128)] * 10 + [(3, 128)] * 10 + [(2, 32)], 64)
    whole, exact = prepared(parts, target.device), exact_weights(parts)
    cuts = [0, 33, whole.n_chunks]
    weights = dataclasses.replace(
        whole,
        slices=torch.tensor(cuts, dtype=torch.int32, device=target.device),
        spans=cuda_weights._spans(whole.tiles, whole.chunks, cuts, whole.header_units),
        n_slices=2,
        n_sections=1,
    )
    for rows in (2, 9):
        x = normal(rows, weights.in_features).to(target.device).half()
        assert_near(packed_matmul(target.backend, x, weights), x, exact)


def test_a_block_goes_on_to_its_next_tiles():
    backend = EmulatedBackend(80, multiprocessors=1)  # two blocks for eleven tiles
    parts = exl2_parts(LONG_MIX, 352)
    weights, exact = prepared(parts, torch.device("cpu")), exact_weights(parts)
    for dtype in (torch.float16, torch.float32):
        x = normal(3, weights.in_features).to(dtype)
        assert_near(packed_matmul(backend, x, weights), x, exact)


def test_a_card_of_little_shared_memory_takes_other_kernels():
    backend = EmulatedBackend(75)
    parts = exl2_parts([(4, 128)] * 4 + [(2, 128)], 64)
    weights, exact = prepared(parts, torch.device("cpu")), exact_weights(parts)
    x = normal(3, weights.in_features)
    needed = cuda_matmul._gemv_bytes(backend, weights, 1, 4)
    backend.max_shared_bytes = needed - 1
    backend.launches.clear()
    assert_near(packed_matmul(backend, x, weights), x, exact)
    assert backend.launches == [("exl2_dequantise", "exl2_dequantise_f32")]
    with pytest.raises(KernelError, match="set library_rows"):
        packed_matmul(backend, x, weights, library_rows=None)
    backend.max_shared_bytes = 48 << 10
    cramped = cuda_matmul._gemv_bytes(backend, weights, 3, 2)
    backend.max_shared_bytes = cramped - 1
    backend.launches.clear()
    assert_near(packed_matmul(backend, x.half(), weights), x.half(), exact)
    assert ("exl2_gemm", "exl2_gemm_r8") in backend.launches


# ---- a row depends on itself alone ----


@pytest.mark.parametrize("groups", [LONG_MIX, [(4, 128)] * 8], ids=["mixed", "plain"])
def test_a_row_has_the_same_bits_in_every_packed_kernel_and_batch(target, groups):
    parts = exl2_parts(groups, 96)
    weights = prepared(parts, target.device)
    assert weights.n_sections > 1
    x = normal(70, weights.in_features).to(target.device).half()
    together = packed_matmul(target.backend, x, weights, library_rows=None, out_dtype=torch.float32)
    for rows in (1, 2, 5, 8, 9, 16, 17, 32, 33, 64):
        some = packed_matmul(target.backend, x[:rows], weights, out_dtype=torch.float32)
        assert torch.equal(some, together[:rows]), rows
    for row in (8, 63, 69):
        alone = packed_matmul(target.backend, x[row : row + 1], weights, out_dtype=torch.float32)
        assert torch.equal(alone[0], together[row])


def test_a_row_of_float32_has_the_same_bits_alone_and_in_any_batch(target):
    weights = prepared(exl2_parts(LONG_MIX, 96), target.device)
    x = normal(19, weights.in_features).to(target.device)
    together = packed_matmul(target.backend, x, weights, library_rows=None)
    for rows in (1, 2, 3, 4, 5, 16):
        assert torch.equal(packed_matmul(target.backend, x[:rows], weights), together[:rows])


EARLY_COPIES = {"EXL2_EMU_EARLY_COPIES": 1}


@pytest.mark.parametrize("order", ["reverse", "shuffled"])
@pytest.mark.parametrize(("arch", "defines"), [(75, {}), (80, {}), (80, EARLY_COPIES)])
def test_results_do_not_depend_on_the_order_of_threads_and_copies(arch, defines, order):
    forward, other = EmulatedBackend(arch), EmulatedBackend(arch, order=order, defines=defines)
    matrices = [prepared_gptq(gptq_parts(1536, 288, [128] * 12), torch.device("cpu"))]
    if not defines:  # the kernels differ in the format alone, and this one takes long to compile
        matrices.append(prepared(exl2_parts([*[(8, 64)] * 8, *[(4, 128)] * 8], 288), torch.device("cpu")))
    for weights in matrices:
        x = normal(33, weights.in_features)
        for rows, dtype in ((3, torch.float16), (33, torch.float16), (3, torch.float32)):
            some = x[:rows].to(dtype)
            assert torch.equal(packed_matmul(forward, some, weights), packed_matmul(other, some, weights))


# ---- several matrices in one launch ----


def test_stacked_matrices_of_different_widths_give_each_ones_product(target):
    mixes = ([(6, 128), (4, 128), (4, 128), (4, 128)], [(3, 32)] * 16, [(8, 64), (2, 448)])
    parts = [exl2_parts(list(mix), columns) for mix, columns in zip(mixes, (160, 32, 64), strict=True)]
    for one in parts:
        one["q_invperm"] = parts[0]["q_invperm"]
    matrices = [prepared(one, target.device) for one in parts]
    assert cuda_weights.can_stack(matrices)
    stacked = cuda_weights.stack(matrices)
    exact = torch.cat([exact_weights(one) for one in parts], dim=1)
    assert stacked.widths == (160, 32, 64)
    assert torch.equal(dequantise(target.backend, stacked).cpu().float(), exact)
    for rows, dtype in ((1, torch.float16), (20, torch.float16), (2, torch.float32), (70, torch.float16)):
        x = normal(rows, stacked.in_features).to(target.device, dtype)
        assert_near(packed_matmul(target.backend, x, stacked), x, exact)


def test_a_block_goes_from_one_stacked_matrix_to_the_next():
    parts = [exl2_parts(mix, 96) for mix in ([(5, 256)], [(2, 32)] * 8, [(8, 32), (3, 224)])]
    for one in parts:
        one["q_invperm"] = parts[0]["q_invperm"]
    stacked = cuda_weights.stack([prepared(one, torch.device("cpu")) for one in parts])
    exact = torch.cat([exact_weights(one) for one in parts], dim=1)
    x = normal(2, stacked.in_features).half()
    assert_near(packed_matmul(EmulatedBackend(80, multiprocessors=1), x, stacked), x, exact)


def test_matrices_of_different_inputs_are_not_stacked():
    one = prepared(exl2_parts([(4, 64)], 32), torch.device("cpu"))
    other = prepared(exl2_parts([(4, 64)], 32, seed=1), torch.device("cpu"))
    assert not cuda_weights.can_stack([one, other])
    with pytest.raises(ShapeError, match="same input features"):
        cuda_weights.stack([one, other])


# ---- gptq ----

GPTQ_SIZES = [[128, 128, 128], [32] * 8, [8], [40, 24, 64, 8], [1, 2, 3, 100, 30], [200, 0, 56]]


@pytest.mark.parametrize("sizes", GPTQ_SIZES, ids=str)
@pytest.mark.parametrize("shuffled", [True, False])
def test_gptq_groups_of_any_size_are_exact_in_every_kernel(target, sizes, shuffled):
    parts = gptq_parts(sum(sizes), 64, sizes, shuffled=shuffled)
    weights, exact = prepared_gptq(parts, target.device), exact_gptq(parts)
    assert torch.equal(dequantise(target.backend, weights).cpu().float(), exact)
    identity = torch.eye(weights.in_features, device=target.device)
    assert torch.equal(packed_matmul(target.backend, identity, weights, library_rows=None).cpu(), exact)
    for rows in (1, 5, 16, 32, 64):
        some = packed_matmul(target.backend, identity[-rows:].half(), weights)
        assert torch.equal(some.cpu().float(), exact[-rows:]), rows


@pytest.mark.parametrize("rows", [1, 4, 17, 64, 65])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=["f16", "f32"])
def test_gptq_products_are_as_the_reference(target, rows, dtype):
    for sizes, columns in (([128] * 4, 288), ([104, 24, 128], 32)):
        parts = gptq_parts(sum(sizes), columns, sizes, shuffled=True)
        weights = prepared_gptq(parts, target.device, prescale=0.5, zero_offset=0)
        x = normal(rows, weights.in_features, seed=rows).to(target.device, dtype)
        exact = exact_gptq(parts, prescale=0.5, zero_offset=0)
        assert_near(packed_matmul(target.backend, x, weights), x, exact)


def test_gptq_without_a_group_table_takes_equal_groups(target):
    parts = gptq_parts(200, 32, [128, 72])
    del parts["g_idx"]
    weights = prepared_gptq(parts, target.device)
    assert torch.equal(dequantise(target.backend, weights).cpu().float(), exact_gptq(parts))


# ---- what else a call can ask for ----


@pytest.mark.parametrize("rows", [1, 20, 70])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=["f16", "f32"])
def test_bias_and_residual_are_added_in_float32(target, rows, dtype):
    parts = exl2_parts(LONG_MIX, 96)
    weights, exact = prepared(parts, target.device), exact_weights(parts)
    x = normal(rows, weights.in_features).to(target.device, dtype)
    bias = normal(96, seed=1).to(target.device)
    product = x.cpu().double() @ exact.double()

    biased = packed_matmul(target.backend, x, weights, bias=bias, out_dtype=torch.float32)
    # The library rounds products of float16 to float16 before they are added.
    tolerance = 2e-3 if dtype == torch.float16 and rows > 64 else 2e-5
    torch.testing.assert_close(biased.cpu(), (product + bias.cpu()).float(), atol=tolerance, rtol=tolerance)

    wide = normal(rows, 128, seed=2).to(target.device)
    before = wide.clone()
    result = packed_matmul(target.backend, x, weights, bias=bias, residual=wide[:, 4:100])
    assert result.data_ptr() == wide[:, 4:].data_ptr()
    expected = (product + bias.cpu() + before[:, 4:100].cpu()).float()
    torch.testing.assert_close(result.cpu(), expected, atol=tolerance, rtol=tolerance)
    assert torch.equal(wide[:, :4], before[:, :4])
    assert torch.equal(wide[:, 100:], before[:, 100:])


def test_many_rows_are_multiplied_some_columns_at_a_time(target, monkeypatch):
    parts = exl2_parts(MIXES["all"], 1120)
    weights, exact = prepared(parts, target.device), exact_weights(parts)
    monkeypatch.setattr(cuda_matmul, "_SCRATCH_BYTES", weights.in_features * 2 * 600)
    widths = []

    def noted(*args, **options):
        widths.append(options["last_tile"] - options["first_tile"])
        return dequantise(*args, **options)

    monkeypatch.setattr(cuda_matmul, "dequantise", noted)
    x = normal(66, weights.in_features).to(target.device).half()
    assert_near(packed_matmul(target.backend, x, weights), x, exact)
    assert widths == [16, 16, 3]


def test_no_rows_give_no_rows_and_strided_rows_are_taken(target):
    weights = prepared(exl2_parts(MIXES["4"], 32), target.device)
    empty = torch.empty((0, weights.in_features), device=target.device)
    assert packed_matmul(target.backend, empty, weights).shape == (0, 32)
    wide = normal(6, 2 * weights.in_features).to(target.device).half()
    strided = wide[:, ::2]
    assert torch.equal(
        packed_matmul(target.backend, strided, weights), packed_matmul(target.backend, strided.contiguous(), weights)
    )
    flat = normal(1, weights.in_features + 1).to(target.device).half()[:, 1:]  # contiguous, at an odd address
    assert torch.equal(
        packed_matmul(target.backend, flat, weights), packed_matmul(target.backend, flat.clone(), weights)
    )


def test_the_processs_own_precision_settings_are_left_as_they_were(target):
    settings = torch.backends.cuda.matmul
    before = settings.allow_fp16_reduced_precision_reduction
    weights = prepared(exl2_parts(MIXES["4"], 32), target.device)
    packed_matmul(target.backend, torch.ones((70, weights.in_features), device=target.device), weights)
    assert settings.allow_fp16_reduced_precision_reduction == before


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"x": torch.ones(2, 32)}, ShapeError, r"x must be \[T, 160\], it is \[2, 32\]"),
        ({"x": torch.ones(2, 160, dtype=torch.bfloat16)}, DTypeError, "float16 or float32, it is torch.bfloat16"),
        ({"out_dtype": torch.bfloat16}, DTypeError, "out_dtype must be"),
        ({"bias": torch.ones(32).half()}, DTypeError, "bias must be float32"),
        ({"bias": torch.ones(31)}, ShapeError, r"bias must be \[32\]"),
        ({"residual": torch.ones(2, 32).half()}, DTypeError, "residual must be float32"),
        ({"residual": torch.ones(1, 32)}, ShapeError, r"residual must be \[2, 32\]"),
        ({"residual": torch.ones(2, 33)[:, 1:]}, ShapeError, "aligned"),
        ({"residual": torch.ones(2, 32), "out_dtype": torch.float32}, DTypeError, "out_dtype not given"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(options, error, message):
    weights = prepared(exl2_parts(MIXES["4"], 32), torch.device("cpu"))
    arguments = {"x": torch.ones(2, 160)} | options
    with pytest.raises(error, match=message):
        packed_matmul(EmulatedBackend(80), arguments.pop("x"), weights, **arguments)


@pytest.mark.parametrize(
    ("part", "change", "error", "message"),
    [
        ("q_weight", lambda t: t.long(), DTypeError, "q_weight must be torch.int32"),
        ("q_weight", lambda t: t[:, :40], ShapeError, "multiple of 32 columns, it has 40"),
        ("q_weight", lambda t: t[:-1], ShapeError, "packed rows"),
        ("q_groups", lambda t: t[None], ShapeError, "1 dimension"),
        ("q_scale", lambda t: t[:1], ShapeError, r"q_scale \[1, 8\]"),
        ("q_scale_max", lambda t: t[:1], ShapeError, "2 groups, q_scale_max 1"),
        ("q_scale_max", lambda t: t.float(), DTypeError, "float16"),
        ("q_invperm", lambda t: t[1:], ShapeError, r"q_invperm is \[95\]"),
        ("q_invperm", lambda t: t.clamp(min=1), ShapeError, "each of the 96 stored rows once"),
    ],
)
def test_what_is_no_exl2_matrix_is_refused(part, change, error, message):
    parts = exl2_parts([(4, 64), (3, 32)], 64)
    parts[part] = change(parts[part])
    with pytest.raises(error, match=message):
        cuda_prepare.exl2_prepare(**parts)


@pytest.mark.parametrize(
    ("part", "value", "error", "message"),
    [
        ("qweight", torch.zeros(2, 32), DTypeError, "qweight must be int32"),
        ("qweight", torch.zeros(2, 40, dtype=torch.int32), ShapeError, "multiple of 32"),
        ("qzeros", torch.zeros(1, 5, dtype=torch.int32), ShapeError, "do not describe one matrix"),
        ("g_idx", torch.full((16,), 2, dtype=torch.int32), ShapeError, "values 0 to 1"),
        ("g_idx", torch.zeros(8, dtype=torch.int32), ShapeError, r"g_idx must be \[16\]"),
    ],
)
def test_what_is_no_gptq_matrix_is_refused(part, value, error, message):
    with pytest.raises(error, match=message):
        cuda_prepare.gptq_prepare(**gptq_parts(16, 32, [8, 8]) | {part: value})


def test_a_matrix_of_more_rows_than_can_be_named_is_refused():
    words = torch.zeros(8200, 32, dtype=torch.int32)
    with pytest.raises(ShapeError, match="may have 65504 rows"):
        cuda_prepare.gptq_prepare(words, torch.zeros(1, 4, dtype=torch.int32), torch.ones(1, 32))


# ---- the tests above notice faults ----


@dataclass(frozen=True)
class Fault:
    """A change to a kernel that a product of `rows` rows must show, with copies done late or early."""

    rows: int
    early: bool
    file: str
    sound: str
    broken: str


_WAIT = "cp_async_wait<groups_under_way(kBits, kHeaderUnits)>()"
_CLEAR = "acc[n / 8][n / 4 % 2][n % 4] = 0.0f;\n                }"
_STEP = "        __syncthreads();  // the copies of all"

FAULTS = {
    "a ring not waited for": Fault(3, False, "packed_gemv.cuh", _WAIT, "cp_async_wait<kRingGroups>()"),
    "a ring filled too early": Fault(3, True, "packed_gemv.cuh", "<= kRingBytes - kGroupBytes)", "<= kRingBytes)"),
    "sums read without a barrier": Fault(3, False, "packed_gemv.cuh", "lane);\n        __syncthreads();", "lane);"),
    "a wrong fragment": Fault(3, False, "packed_product.cuh", "weights[2 * i + 1][2 * s]", "weights[2 * i + 1][3 * s]"),
    "a stage not waited for": Fault(12, False, "packed_gemm.cuh", "_wait<kStages - 2>()", "_wait<kStages>()"),
    "a stage filled too early": Fault(12, True, "packed_gemm.cuh", _STEP, "        // the copies of all"),
    "sums of a slice kept": Fault(12, False, "packed_gemm.cuh", _CLEAR, "}"),
}


def faulty(directory: Path, name: str, sound: str, broken: str, **options) -> EmulatedBackend:
    """A backend of kernels with one change."""
    shutil.copytree(SOURCE_DIR, directory / "cuda")
    path = directory / "cuda" / name
    text = path.read_text(encoding="utf-8")
    assert text.count(sound) == 1
    path.write_text(text.replace(sound, broken), encoding="utf-8")
    return EmulatedBackend(80, order="shuffled", source_dir=directory / "cuda", **options)


def notices(backend: EmulatedBackend, rows: int) -> bool:
    """Whether a product differs from the reference's, or fails."""
    parts = gptq_parts(3104, 288, [128] * 24 + [32])
    weights, exact = prepared_gptq(parts, torch.device("cpu")), exact_gptq(parts)
    x = normal(rows, weights.in_features).half()
    try:
        assert_near(packed_matmul(backend, x, weights), x, exact)
    except (AssertionError, KernelError):
        return True
    return False


@pytest.mark.parametrize("rows", [3, 12])
def test_sound_kernels_pass_what_shows_faults(rows):
    assert not notices(EmulatedBackend(80, order="shuffled"), rows)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_noticed(tmp_path, fault):
    one = FAULTS[fault]
    backend = faulty(tmp_path, one.file, one.sound, one.broken, defines=EARLY_COPIES if one.early else {})
    assert notices(backend, one.rows)


def test_a_wrong_layout_of_the_tensor_cores_is_noticed():
    assert notices(EmulatedBackend(80, defines={"EXL2_FAULT_MMA": 1}), 3)


def test_a_dropped_bit_plane_is_noticed(tmp_path):
    parts = exl2_parts([(5, 32), (3, 32)], 32)
    weights, exact = prepared(parts, torch.device("cpu")), exact_weights(parts)
    assert torch.equal(dequantise(EmulatedBackend(80), weights).float(), exact)
    backend = faulty(tmp_path, "packed_stream.cuh", "words[kBits - 1] = ", "words[kBits - 1] = 0 * ")
    assert not torch.equal(dequantise(backend, weights).float(), exact)
