from __future__ import annotations

import os
from dataclasses import dataclass

import pytest
import torch

from exl2_rag.llm.kernels import cuda_runtime
from exl2_rag.llm.kernels.cuda_backend import ARCHITECTURES, Backend
from tests.cuda_emulation import EmulatedBackend


@dataclass(frozen=True)
class CudaTarget:
    """Where kernels run in a test: `backend` launches them on tensors of `device`."""

    backend: Backend
    device: torch.device


def _why_no_card() -> str | None:
    if not torch.cuda.is_available():
        return "there is no card that torch can use"
    return cuda_runtime.unusable_because(0)


_NO_CARD = _why_no_card()
_CARD = pytest.param(
    None, id="card", marks=[pytest.mark.gpu, pytest.mark.skipif(_NO_CARD is not None, reason=_NO_CARD or "")]
)
_TARGETS = [*(pytest.param(arch, id=f"emulated-sm_{arch}") for arch in (75, 80)), _CARD]


@pytest.fixture(params=_TARGETS)
def target(request) -> CudaTarget:
    """Each code path in the emulation, and a card if there is one."""
    if request.param is None:
        return CudaTarget(cuda_runtime.backend(torch.device("cuda", 0)), torch.device("cuda", 0))
    assert request.param in ARCHITECTURES
    return CudaTarget(EmulatedBackend(request.param), torch.device("cpu"))


@pytest.fixture(params=_TARGETS[1:])
def backend(request) -> Backend:
    """For tests that need not see sm_75, and move their tensors themselves (see `place_of`)."""
    return EmulatedBackend(request.param) if request.param else cuda_runtime.backend(torch.device("cuda", 0))


def place_of(backend: Backend) -> torch.device:
    """Where its tensors must be."""
    return torch.device("cpu") if isinstance(backend, EmulatedBackend) else torch.device("cuda", 0)


def pytest_collection_modifyitems(config, items):
    """EXL2_RAG_TEST_CASES=few keeps of each test on a card its first and its last case: for tools that slow it down."""
    if os.environ.get("EXL2_RAG_TEST_CASES") != "few":
        return
    by_function: dict[object, list[pytest.Item]] = {}
    for item in items:
        by_function.setdefault((item.path, getattr(item, "originalname", item.name)), []).append(item)
    kept = {id(cases[place]) for cases in by_function.values() for place in (0, -1)}
    config.hook.pytest_deselected(items=[item for item in items if id(item) not in kept])
    items[:] = [item for item in items if id(item) in kept]


@pytest.fixture(autouse=True)
def poison_unwritten_results():
    """Lets torch.empty hold NaN (or the largest integer), so that what a kernel leaves unwritten shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before)
