from __future__ import annotations

import pytest

from exl2_rag.llm.kernels import native, ops

_NONE = "there are no native kernels here: no compiler, or EXL2_RAG_KERNELS forbids them"


def _levels() -> list[str]:
    """The levels of processor that the library has and this machine can run."""
    library = native.library()
    if library is None:
        return []
    names = ("baseline", "avx2", "avx512", "avx512vnni", "avx512amd", "dotprod")
    levels = [level for level in names if library.exl2_set_cpu_level(level.encode()) == 0]
    library.exl2_set_cpu_level(None)  # the best again
    return levels


@pytest.fixture(params=_levels() or [pytest.param("none", marks=pytest.mark.skip(reason=_NONE))])
def native_level(request):
    """Each level in turn."""
    library = native.library()
    assert library.exl2_set_cpu_level(request.param.encode()) == 0
    yield request.param
    library.exl2_set_cpu_level(None)


@pytest.fixture
def native_kernels():
    """The best native kernels, or a skip."""
    if not ops.native_available():
        pytest.skip(_NONE)


@pytest.fixture
def restore_threads():
    """Lets a test change the number of threads."""
    yield
    ops.set_num_threads(native.default_num_threads())
