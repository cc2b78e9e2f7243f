from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from exl2_rag.llm.kernels.cuda_backend import ARCHITECTURES, Backend
from tests.cuda_emulation import EmulatedBackend


@dataclass(frozen=True)
class CudaTarget:
    """Where kernels run in a test: `backend` launches them on tensors of `device`."""

    backend: Backend
    device: torch.device


_TARGETS = [pytest.param(arch, id=f"emulated-sm_{arch}") for arch in (75, 80)]


@pytest.fixture(params=_TARGETS)
def target(request) -> CudaTarget:
    """Each code path in the emulation."""
    assert request.param in ARCHITECTURES
    return CudaTarget(EmulatedBackend(request.param), torch.device("cpu"))


@pytest.fixture(autouse=True)
def poison_unwritten_results():
    """Lets torch.empty hold NaN (or the largest integer), so that what a kernel leaves unwritten shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before)
