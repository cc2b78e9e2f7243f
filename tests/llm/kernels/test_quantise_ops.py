"""The inner loops of making EXL2 matrices: C++ against plain torch."""

from __future__ import annotations

import pytest
import torch

from exl2_rag.errors import DTypeError, ShapeError
from exl2_rag.llm.kernels import native
from exl2_rag.llm.kernels.quantise_ops import (
    gptq_rows,
    reference_gptq_rows,
    reference_rounding_costs,
    rounding_costs,
)

SIZES = [(1, 1), (3, 31), (32, 32), (33, 129), (128, 96)]


def group(rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Weights, steps of which one is 0, and an upper factor."""
    generator = torch.Generator().manual_seed(rows * 1000 + columns)
    x = torch.randn(rows, columns, generator=generator)
    steps = (0.1 + torch.rand(columns, generator=generator)).to(torch.float16).to(torch.float32)
    steps[columns // 2] = 0 if columns > 1 else steps[0]
    upper = torch.eye(rows) + torch.triu(torch.randn(rows, rows, generator=generator) * 0.1)
    return x, steps, upper


@pytest.fixture(params=["native", "avx2", "baseline"])
def level(request):
    """Each compiled level that this machine has."""
    library = native.library()
    if library is None:
        pytest.skip("there is no native library here")
    before = library.exl2_cpu_level()
    if request.param != "native" and library.exl2_set_cpu_level(request.param.encode()):
        pytest.skip(f"this processor has no level {request.param}")
    yield
    library.exl2_set_cpu_level(before)


@pytest.mark.parametrize(("rows", "columns"), SIZES)
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_costs_are_those_of_plain_torch(level, rows, columns, bits):
    x, steps, _ = group(rows, columns)
    tried = torch.stack([steps * factor for factor in (0.5, 1.0, 0.01)])
    weights = torch.rand(rows, generator=torch.Generator().manual_seed(1))
    for row_weights in (None, weights):
        found = rounding_costs(x, row_weights, tried, bits)
        wanted = reference_rounding_costs(
            x.double(), None if row_weights is None else weights.double(), tried.double(), bits
        )
        torch.testing.assert_close(found.double(), wanted, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize(("rows", "columns"), SIZES)
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("feedback", [True, False])
def test_rows_are_quantised_as_by_plain_torch(level, rows, columns, bits, feedback):
    x, steps, upper = group(rows, columns)
    codes, values, errors = gptq_rows(x, upper, steps, bits, feedback=feedback)
    wanted_codes, wanted_values, wanted_errors = reference_gptq_rows(x, upper, steps, bits, feedback=feedback)
    # A weight that lies between two codes may go either way by a rounding, and then takes its column along.
    same = (codes == wanted_codes).all(0)
    assert float(same.float().mean()) > (0.98 if columns > 50 else 0.9)
    assert torch.equal(values[:, same], wanted_values[:, same])
    torch.testing.assert_close(errors[:, same], wanted_errors[:, same], rtol=1e-4, atol=1e-4)


def test_values_are_what_the_codes_mean():
    x, steps, upper = group(33, 129)
    codes, values, _ = gptq_rows(x, upper, steps, 4)
    assert torch.equal(values, ((codes.to(torch.int32) - 8) * steps).to(torch.float16).to(torch.float32))


def test_tensors_that_do_not_fit_are_refused():
    x, steps, upper = group(32, 32)
    with pytest.raises(ShapeError, match=r"steps must be \[S, 32\]"):
        rounding_costs(x, None, steps[None, :5], 4)
    with pytest.raises(ShapeError, match="bits must be one of"):
        rounding_costs(x, None, steps[None], 7)
    with pytest.raises(ShapeError, match=r"upper must be \[32, 32\]"):
        gptq_rows(x, upper[:5], steps, 4)
    with pytest.raises(DTypeError, match="x must be float32"):
        gptq_rows(x.half(), upper, steps, 4)
