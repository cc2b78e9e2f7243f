from __future__ import annotations

import json

import pytest
import torch

from exl2_rag.errors import SettingsError
from exl2_rag.llm.checkpoint import reconstruct
from exl2_rag.llm.quantize import QuantisationPlan, plan_for_bits, quantize_linear_rtn
from tests.support.golden import EXL2_NAMES, golden


def relative_error(weight: torch.Tensor, parts: dict[str, torch.Tensor]) -> float:
    decoded = reconstruct({f"layer.{name}": part for name, part in parts.items()}, "layer").T.float()
    return float((decoded[: weight.shape[0]] - weight).norm() / weight.norm())


# Half way between what was measured for normal weights and twice the step's error.
@pytest.mark.parametrize(("bits", "limit"), [(2, 0.45), (3, 0.24), (4, 0.12), (5, 0.062), (6, 0.032), (8, 0.0085)])
def test_the_error_of_rounding_falls_with_the_width(bits, limit):
    weight = torch.randn(96, 256, generator=torch.Generator().manual_seed(bits)) * 0.02
    error = relative_error(weight, quantize_linear_rtn(weight, bits=bits, group_size=128))
    assert limit / 2 < error < limit


def test_eight_bits_keep_a_quantised_matrix_closely():
    layer = golden("mix_8_5_4_conv")
    weight = reconstruct(layer.tensors, layer.key).T.float()
    assert relative_error(weight, quantize_linear_rtn(weight, bits=8, group_size=32)) < 0.006


def test_outputs_are_padded_with_zeros_to_a_multiple_of_32():
    weight = torch.randn(100, 64, generator=torch.Generator().manual_seed(0))
    parts = quantize_linear_rtn(weight, bits=4, group_size=32, bias=torch.arange(100.0))
    decoded = reconstruct({f"l.{name}": part for name, part in parts.items()}, "l")
    assert decoded.shape == (64, 128)
    assert not decoded[:, 100:].any()
    assert parts["bias"].shape == (128,)
    assert torch.equal(parts["bias"][:100], torch.arange(100.0).half())
    assert not parts["bias"][100:].any()


def test_a_zero_matrix_stays_zero():
    parts = quantize_linear_rtn(torch.zeros(32, 64), bits=3, group_size=32)
    assert not reconstruct({f"l.{name}": part for name, part in parts.items()}, "l").any()


def test_the_weight_given_is_not_modified():
    weight = torch.randn(32, 64, generator=torch.Generator().manual_seed(1))
    before = weight.clone()
    quantize_linear_rtn(weight, bits=4, group_size=32)
    assert torch.equal(weight, before)


@pytest.mark.parametrize("name", [name for name in EXL2_NAMES if "conv" in name or "packpad" in name])
def test_groups_are_laid_out_as_the_format_lays_them_out(name):
    layer = golden(name)
    plan = QuantisationPlan(
        tuple(json.loads(layer.metadata["bits"])),
        tuple(json.loads(layer.metadata["bits_prop"])),
        tuple(json.loads(layer.metadata["group_size"])),
    )
    pairs: list[int] = []
    first = 0
    for bits, rows in plan.groups(int(layer.metadata["in_features"])):
        pairs += [bits, first]
        first += rows * bits // 32
    assert pairs == layer.part("q_groups").tolist()
    assert first == layer.part("q_weight").shape[0]


def test_the_layout_example_of_the_format_document():
    groups = QuantisationPlan((8, 5, 4), (0.05, 0.10, 0.85), (32, 128, 128)).groups(4096)
    assert groups == [(8, 32)] * 7 + [(5, 128)] * 4 + [(4, 128)] * 26 + [(4, 32)]


@pytest.mark.parametrize("bits", [2.5, 3.0, 4.0, 4.25, 5.0, 6.5, 8.3])
@pytest.mark.parametrize("shape", [(256, 256), (352, 96), (1024, 512)])
def test_a_plan_uses_the_bits_it_may_and_no_more(bits, shape):
    in_features, out_features = shape
    plan = plan_for_bits(bits, in_features, out_features)
    attained = plan.total_bits(in_features, out_features) / (in_features * out_features)
    assert attained <= bits
    assert attained > bits - 0.6
    weight = torch.randn(out_features, in_features, generator=torch.Generator().manual_seed(0))
    parts = quantize_linear_rtn(weight, bits=plan.bits, group_size=plan.group_sizes, proportions=plan.proportions)
    assert sum(part.nbytes for part in parts.values()) * 8 == plan.total_bits(in_features, out_features)


def test_more_bits_never_give_a_larger_error():
    weight = torch.randn(128, 256, generator=torch.Generator().manual_seed(5)) * 0.02
    errors = []
    for bits in (2.5, 3.0, 3.5, 4.0, 4.5, 5.0, 6.0, 7.0, 8.5):
        plan = plan_for_bits(bits, 256, 128)
        parts = quantize_linear_rtn(weight, bits=plan.bits, group_size=plan.group_sizes, proportions=plan.proportions)
        errors.append(relative_error(weight, parts))
    assert errors == sorted(errors, reverse=True)


def test_too_few_bits_are_refused_with_the_least_that_works():
    with pytest.raises(SettingsError, match=r"at least 2\.\d+"):
        plan_for_bits(2.0, 256, 256)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 7}, "widths of 2, 3, 4, 5, 6 and 8"),
        ({"bits": (3, 4), "proportions": (0.5, 0.5)}, "must fall"),
        ({"bits": 4, "group_size": 48}, "multiples of 32"),
        ({"bits": (4, 3), "proportions": (0.5, 0.6)}, "sum to 1"),
        ({"bits": (4, 3)}, "equally many"),
    ],
)
def test_settings_the_format_cannot_hold_are_refused(options, message):
    with pytest.raises(SettingsError, match=message):
        quantize_linear_rtn(torch.ones(32, 64), **options)


def test_weights_that_are_not_finite_are_refused():
    weight = torch.ones(32, 64)
    weight[3, 5] = float("inf")
    with pytest.raises(SettingsError, match="not finite"):
        quantize_linear_rtn(weight)


def test_inputs_that_are_no_multiple_of_32_are_refused():
    with pytest.raises(SettingsError, match="multiple of 32 input features, the weight has 40"):
        quantize_linear_rtn(torch.ones(32, 40))
