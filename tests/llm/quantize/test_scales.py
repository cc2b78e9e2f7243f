from __future__ import annotations

import pytest
import torch

from exl2_rag.llm.quantize.scales import P_STEPS, round_to_codes, search_scales
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
    found = search_scales(x[None], bits)
    assert torch.equal(found.scale[0], tensors[f"b{bits}.scale_int"].to(torch.int32))
    wanted = int(tensors[f"b{bits}.p_index"][0])
    if int(found.p_index[0]) != wanted:  # two steps may be as close as 1e-5
        errors = [error_at(x.double(), found.scale[0], bits, index) for index in (int(found.p_index[0]), wanted)]
        assert abs(int(found.p_index[0]) - wanted) == 1
        assert errors[0] <= errors[1] * (1 + 1e-4)
    else:
        assert torch.equal(found.scale_max, tensors[f"b{bits}.scale_max"])
        codes = round_to_codes(x[None], found.column_scale, bits)[0]
        assert torch.equal(codes, tensors[f"b{bits}.codes"].to(torch.int32))
        dequantised = ((codes - (1 << (bits - 1))) * found.column_scale[0]).to(torch.float16)
        assert torch.equal(dequantised.view(torch.int16), tensors[f"b{bits}.dequant"].view(torch.int16))


def test_groups_searched_together_get_what_they_get_alone():
    groups = torch.randn(5, 32, 64, generator=torch.Generator().manual_seed(3))
    together = search_scales(groups, 4)
    for index in range(5):
        alone = search_scales(groups[index : index + 1], 4)
        assert torch.equal(together.scale[index], alone.scale[0])
        assert torch.equal(together.scale_max[index], alone.scale_max[0])


def test_a_group_of_zeros_rounds_to_weights_of_zero():
    found = search_scales(torch.zeros(1, 32, 32), 3)
    codes = round_to_codes(torch.zeros(1, 32, 32), found.column_scale, 3)
    assert float(found.scale_max[0]) == 0
    assert torch.equal(codes, torch.full_like(codes, 4))
