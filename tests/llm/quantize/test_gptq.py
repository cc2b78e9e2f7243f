from __future__ import annotations

import json

import pytest
import torch

from exl2_rag.errors import CalibrationError
from exl2_rag.llm.checkpoint import exl2_format
from exl2_rag.llm.quantize.gptq import output_error, quantise_matrix
from exl2_rag.llm.quantize.hessian import InputMoments, factorise
from exl2_rag.llm.quantize.rtn import QuantisationPlan
from exl2_rag.llm.quantize.scales import search_scales_weighted
from tests.support.golden import QUANTISER_NAMES, golden

PLAN = QuantisationPlan((4, 3), (0.1, 0.9), (64, 64))


def correlated(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    """[rows, columns] inputs that depend on each other, as activations do."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=generator) * torch.rand(columns, generator=generator)
    return torch.randn(rows, columns, generator=generator) @ mix / columns**0.5


@pytest.mark.parametrize("name", QUANTISER_NAMES)
def test_the_golden_layers_are_reproduced(name):
    layer = golden(name)
    meta = {key: json.loads(layer.metadata[key]) for key in ("bits", "bits_prop", "group_size")}
    plan = QuantisationPlan(tuple(meta["bits"]), tuple(meta["bits_prop"]), tuple(meta["group_size"]))
    weight, hessian = layer.tensors["source_weight"], layer.tensors["hessian"]
    factor = factorise(hessian)
    assert torch.equal(factor.perm, layer.tensors["perm"].to(torch.int64))
    found = quantise_matrix(weight, factor, plan)
    wanted = layer.tensors["expected"].T[: weight.shape[0]]
    assert float((found.weight == wanted).float().mean()) > 0.999
    assert output_error(weight, found.weight, hessian) == pytest.approx(
        float(layer.metadata["hessian_weighted_error"]), rel=1e-3
    )
    for part in ("q_groups", "q_invperm"):
        assert torch.equal(found.parts[part], layer.tensors[f"layer.{part}"])


def test_what_is_written_reads_back_as_the_weight_that_was_promised():
    x = correlated(400, 96)
    factor = factorise(x.T @ x)
    weight = torch.randn(40, 96, generator=torch.Generator().manual_seed(1))
    found = quantise_matrix(weight, factor, PLAN, search=search_scales_weighted)
    assert torch.equal(exl2_format.decode(found.parts, "layer", prescale=1.0)[:, :40].T, found.weight)


def test_making_up_for_errors_and_weighing_them_each_help():
    x = correlated(2000, 128)
    hessian = x.T @ x / 2000
    factor = factorise(hessian)
    weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(1))
    rounded, fed_back, weighted = (
        output_error(weight, quantise_matrix(weight, factor, PLAN, **options).weight, hessian)
        for options in ({"feedback": False}, {}, {"search": search_scales_weighted})
    )
    assert fed_back < 0.9 * rounded
    assert weighted < 0.97 * fed_back


def test_the_factor_is_of_the_inverse():
    x = correlated(300, 64)
    factor = factorise(x.T @ x, damping=0.01)
    ordered = (x.T @ x)[factor.perm][:, factor.perm] + factor.damping * torch.eye(64)
    torch.testing.assert_close(factor.upper.T @ factor.upper @ ordered, torch.eye(64), rtol=0, atol=2e-3)
    assert torch.equal(factor.perm[factor.invperm.long()], torch.arange(64))


def test_features_without_data_are_ordered_as_they_come():
    moments = InputMoments(32)
    assert torch.equal(factorise(moments.take()[0]).perm, torch.arange(32))


def test_moments_do_not_depend_on_how_the_rows_came():
    x = correlated(64, 32)
    shifted = x + 0.1
    whole, parts = InputMoments(32), InputMoments(32)
    whole.add(x, shifted)
    parts.add(x[:32], shifted[:32])
    parts.add(x[32:], shifted[32:])
    (hessian, shift), (halves, half_shifts) = whole.take(), parts.take()
    torch.testing.assert_close(hessian, halves * 2)
    torch.testing.assert_close(shift, half_shifts * 2)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_are_refused(bad):
    weight = torch.ones(32, 64)
    weight[3, 5] = bad
    factor = factorise(torch.eye(64))
    with pytest.raises(CalibrationError, match="weight is not finite"):
        quantise_matrix(weight, factor, PLAN)
    moments = InputMoments(4)
    with pytest.raises(CalibrationError, match="activations that are not finite"):
        moments.add(torch.tensor([[1.0, bad, 2.0, 3.0]]))


def test_inputs_that_do_not_fit_are_refused():
    with pytest.raises(CalibrationError, match="multiple of 32"):
        quantise_matrix(torch.ones(32, 48), factorise(torch.eye(48)), PLAN)
    with pytest.raises(CalibrationError, match="they are of 64"):
        quantise_matrix(torch.ones(32, 96), factorise(torch.eye(64)), PLAN)


def test_a_hessian_that_cannot_be_inverted_is_refused():
    with pytest.raises(CalibrationError, match="more, and more varied"):
        factorise(torch.full((32, 32), float("nan")))
