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
