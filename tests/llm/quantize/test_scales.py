from __future__ import annotations

import pytest
import torch

from exl2_rag.llm.quantize.scales import P_STEPS, round_to_codes, search_scales, search_scales_weighted
from tests.support.golden import golden


def error_at(x: torch.Tensor, scale: torch.Tensor, bits: int, index: int) -> float:
    """The error the format's converter minimises, in float64."""
    zero = 1 << (bits - 1)
    largest = ((x.abs().amax(0) + 1e-12) / ((2 * zero - 1) / 2)).max()
    factor = 0.70 * (1 - index / (P_STEPS - 1)) + 1.20 * index / (P_STEPS - 1)
    step = (scale.double() / 16) ** 2 * largest * factor
    return float((((x / step).round().clamp(-zero, zero - 1) * step - x).abs() ** 3.5).sum())


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_the_scale_search_agrees_with_the_golden_vectors(bits):
    tensors = golden("quantiser_scale_search").tensors
    x = tensors[f"b{bits}.x"]
    found = search_scales(x, bits)
    assert torch.equal(found.scale, tensors[f"b{bits}.scale_int"].to(torch.int32))
    wanted = int(tensors[f"b{bits}.p_index"][0])
    if found.p_index != wanted:  # two steps may be as close as 1e-5
        errors = [error_at(x.double(), found.scale, bits, index) for index in (found.p_index, wanted)]
        assert abs(found.p_index - wanted) == 1
        assert errors[0] <= errors[1] * (1 + 1e-4)
    else:
        assert torch.equal(found.scale_max[None], tensors[f"b{bits}.scale_max"])
        codes = round_to_codes(x, found.column_scale, bits)
        assert torch.equal(codes, tensors[f"b{bits}.codes"].to(torch.int32))
        dequantised = ((codes - (1 << (bits - 1))) * found.column_scale).to(torch.float16)
        assert torch.equal(dequantised.view(torch.int16), tensors[f"b{bits}.dequant"].view(torch.int16))


def test_the_weighted_search_finds_scales_that_cost_less():
    generator = torch.Generator().manual_seed(3)
    group = torch.randn(64, 96, generator=generator) * torch.rand(96, generator=generator)
    row_weights = torch.rand(64, generator=generator) + 0.1

    def cost(found, bits):
        codes = round_to_codes(group, found.column_scale, bits) - (1 << (bits - 1))
        return float(((codes * found.column_scale - group).square() * row_weights[:, None]).sum())

    for bits, share in ((2, 0.9), (3, 0.9), (4, 0.95), (6, 0.99)):
        assert cost(search_scales_weighted(group, row_weights, bits), bits) < share * cost(
            search_scales(group, bits), bits
        )


def test_a_group_of_zeros_rounds_to_weights_of_zero():
    for found in (
        search_scales(torch.zeros(32, 32), 3),
        search_scales_weighted(torch.zeros(32, 32), torch.ones(32), 3),
    ):
        codes = round_to_codes(torch.zeros(32, 32), found.column_scale, 3)
        assert float(found.scale_max) == 0
        assert torch.equal(codes, torch.full_like(codes, 4))
