"""rms_norm, silu_mul and rope_cache_write."""

from __future__ import annotations

import pytest
import torch

from exl2_rag.errors import DTypeError, ShapeError
from exl2_rag.llm.kernels import ops, reference
from tests.llm.kernels.samples import AWKWARD, assert_close, generator, normal

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


# ---- rms_norm ----


@pytest.mark.parametrize("columns", AWKWARD)
def test_rms_norm_agrees_with_the_reference(native_level, columns):
    for rows in (1, 3, 17):
        x, weight = normal(rows, columns, seed=rows) * 3, 1 + normal(columns)
        assert_close("rms_norm", ops.rms_norm(x, weight, 1e-5), reference.rms_norm(x, weight, 1e-5))


def test_rms_norm_of_zeros_is_zero(native_level):
    assert not ops.rms_norm(torch.zeros(2, 5), torch.ones(5), 1e-6).any()


def test_a_row_of_rms_norm_is_the_same_alone_and_in_any_batch(native_level):
    x, weight = normal(33, 129), normal(129, seed=1)
    together = ops.rms_norm(x, weight, 1e-6)
    for row in range(33):
        assert torch.equal(ops.rms_norm(x[row : row + 1], weight, 1e-6)[0], together[row])


def test_rms_norm_refuses_a_weight_of_another_size():
    with pytest.raises(ShapeError, match=r"weight must be \[4\], it is \[5\]"):
        ops.rms_norm(torch.ones(2, 4), torch.ones(5), 1e-5)


# ---- silu_mul ----


@pytest.mark.parametrize("columns", AWKWARD)
def test_silu_mul_agrees_with_the_reference(native_level, columns):
    for rows in (1, 3, 17):
        gate, up = normal(rows, columns) * 4, normal(rows, columns, seed=1)
        assert_close("silu_mul", ops.silu_mul(gate, up), reference.silu_mul(gate, up))


def test_silu_mul_holds_from_one_end_of_float32_to_the_other(native_level):
    gate = torch.tensor([[-1e30, -1000.0, -100.0, -88.0, -20.0, -1e-8, 0.0, 1e-8, 20.0, 88.0, 89.0, 1000.0, 3e38]])
    up = torch.ones_like(gate)
    result = ops.silu_mul(gate, up)
    assert result.isfinite().all()
    assert_close("silu_mul", result, reference.silu_mul(gate, up))


def test_silu_mul_passes_on_what_is_not_a_number(native_level):
    result = ops.silu_mul(torch.tensor([[float("nan"), 1.0]]), torch.ones(1, 2))
    assert result[0, 0].isnan()
    assert not result[0, 1].isnan()


def test_an_element_of_silu_mul_does_not_depend_on_its_place(native_level):
    gate, up = normal(1, 4200), normal(1, 4200, seed=1)
    together = ops.silu_mul(gate, up)
    for place in (0, 1, 7, 8, 4095, 4096, 4199):
        alone = ops.silu_mul(gate[:, place : place + 1], up[:, place : place + 1])
        assert torch.equal(alone[0, 0], together[0, place])


@pytest.mark.parametrize("columns", [1, 5, 4096, 4099])
def test_silu_mul_into_takes_the_place_of_the_gate(native_level, columns):
    gate, up = normal(3, columns), normal(3, columns, seed=1)
    expected = ops.silu_mul(gate, up)
    assert ops.silu_mul_into(gate, up) is gate
    assert torch.equal(gate, expected)


def test_silu_mul_into_refuses_a_gate_that_it_could_not_write_in_place():
    with pytest.raises(ShapeError, match="gate must be contiguous"):
        ops.silu_mul_into(normal(5, 3).T, normal(3, 5))


def test_silu_mul_refuses_unequal_shapes():
    with pytest.raises(ShapeError, match=r"gate is \[2, 4\], up is \[2, 5\]"):
        ops.silu_mul(torch.ones(2, 4), torch.ones(2, 5))


# ---- rope_cache_write ----


def rope_case(tokens, *, heads=4, kv_heads=2, dim=32, rotated=32, dtype=torch.float32, page_size=16, seed=0):
    rng = generator(seed)
    n_pages = tokens // page_size + 3
    angles = torch.rand((200, rotated // 2), generator=rng) * 6.28
    return {
        "q": torch.randn((tokens, heads, dim), generator=rng),
        "k": torch.randn((tokens, kv_heads, dim), generator=rng),
        "v": torch.randn((tokens, kv_heads, dim), generator=rng),
        "cos": angles.cos(),
        "sin": angles.sin(),
        "positions": torch.randint(0, 200, (tokens,), generator=rng),
        "slot_mapping": torch.randperm(n_pages * page_size, generator=rng)[:tokens],
        "k_pages": torch.full((n_pages, page_size, kv_heads, dim), 7.0, dtype=dtype),
        "v_pages": torch.full((n_pages, page_size, kv_heads, dim), 7.0, dtype=dtype),
    }


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", AWKWARD)
def test_rope_cache_write_agrees_with_the_reference(native_level, tokens, dtype):
    for dim, rotated in ((32, 32), (20, 10), (8, 8), (33, 2)):
        case = rope_case(tokens, dim=dim, rotated=rotated, dtype=dtype, seed=tokens)
        expected = case | {"k_pages": case["k_pages"].clone(), "v_pages": case["v_pages"].clone()}
        q = ops.rope_cache_write(**case)
        assert_close("rope_cache_write", q, reference.rope_cache_write(**expected))
        assert torch.equal(case["v_pages"], expected["v_pages"])
        if dtype == torch.float32:
            assert_close("rope_cache_write", case["k_pages"], expected["k_pages"])
        else:  # the same numbers, rounded: equal but for a last bit that float32 rounding may tip
            torch.testing.assert_close(case["k_pages"], expected["k_pages"], atol=1e-6, rtol=0.008)
            assert (case["k_pages"] != expected["k_pages"]).float().mean() < 0.001


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_values_are_rounded_into_pages_exactly_as_torch_rounds(native_level, dtype):
    bits = torch.randint(-(1 << 31), 1 << 31, (4096,), generator=generator(0)).to(torch.int32)
    numbers = torch.cat((bits.view(torch.float32), normal(4096), normal(4096) * 1e-6, torch.tensor([65519.9, 65520.0])))
    numbers = numbers[~numbers.isnan()]
    # Half way between two float16 (bfloat16) numbers, where ties go to the even one.
    halves = torch.cat([torch.arange(1, 4096, 2, dtype=torch.float32) / scale for scale in (4096, 512, 2.0**28)])
    v = torch.cat((numbers, halves, -halves))[:, None, None]
    pages = torch.zeros((len(v), 1, 1, 1), dtype=dtype)
    zeros, positions = torch.zeros(len(v), 1, 1), torch.zeros(len(v), dtype=torch.int64)
    slots = torch.arange(len(v))
    ops.rope_cache_write(zeros, zeros, v, torch.ones(1, 0), torch.zeros(1, 0), positions, slots, pages.clone(), pages)
    assert torch.equal(pages.flatten().view(torch.int16), v.flatten().to(dtype).view(torch.int16))


def test_rotation_is_multiplication_of_complex_numbers(native_level):
    case = rope_case(9, dim=12, rotated=8)
    q, angle = case["q"], torch.complex(case["cos"], case["sin"])[case["positions"]][:, None]
    turned = torch.complex(q[..., :4], q[..., 4:8]) * angle
    expected = torch.cat((turned.real, turned.imag, q[..., 8:]), dim=-1)
    torch.testing.assert_close(ops.rope_cache_write(**case), expected, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(reference.rope_cache_write(**case), expected, atol=1e-6, rtol=1e-6)


def test_only_the_slots_named_are_written(native_level):
    case = rope_case(5)
    ops.rope_cache_write(**case)
    untouched = torch.ones(case["k_pages"].shape[0] * 16, dtype=torch.bool)
    untouched[case["slot_mapping"]] = False
    for pages in (case["k_pages"], case["v_pages"]):
        assert (pages.flatten(0, 1)[untouched] == 7.0).all()
        assert not (pages.flatten(0, 1)[~untouched] == 7.0).all(-1).any()


@pytest.mark.parametrize("implementation", [ops.rope_cache_write, reference.rope_cache_write])
@pytest.mark.parametrize(("name", "value"), [("slot_mapping", 10**6), ("slot_mapping", -1), ("positions", 200)])
def test_rope_cache_write_refuses_to_write_outside_its_tensors(implementation, name, value):
    case = rope_case(5)
    case[name][3] = value
    with pytest.raises(ShapeError, match="rope_cache_write"):
        implementation(**case)
    assert (case["k_pages"] == 7.0).all()


def test_rope_cache_write_refuses_tensors_that_do_not_fit():
    case = rope_case(5)
    with pytest.raises(ShapeError, match="k and v must be"):
        ops.rope_cache_write(**case | {"k": case["k"][:4]})
    with pytest.raises(DTypeError, match="positions must be int64"):
        ops.rope_cache_write(**case | {"positions": case["positions"].int()})
    with pytest.raises(ShapeError, match="R at most 32"):
        ops.rope_cache_write(**case | {"cos": torch.ones(200, 17), "sin": torch.ones(200, 17)})
    with pytest.raises(DTypeError, match="pages must be"):
        ops.rope_cache_write(**case | {"k_pages": case["k_pages"].double()})
    with pytest.raises(ShapeError, match="contiguous"):
        ops.rope_cache_write(**case | {"k_pages": case["k_pages"].transpose(0, 1).contiguous().transpose(0, 1)})
