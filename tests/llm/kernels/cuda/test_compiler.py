"""The cache of compiled modules, without NVRTC; and with it, that every kernel compiles for every architecture."""

from __future__ import annotations

import logging
import multiprocessing
import os
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from exl2_rag.errors import DeviceError, KernelError
from exl2_rag.llm.kernels import cuda_compiler
from exl2_rag.llm.kernels.cuda_backend import ARCHITECTURES, modules
from exl2_rag.llm.kernels.cuda_compiler import KernelUsage, ModuleCache, Nvrtc, build_all, parse_usage

REPORT = """ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'beta' for 'sm_80'
ptxas info    : Function properties for beta
    8 bytes stack frame, 12 bytes spill stores, 16 bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers, 8 bytes cumulative stack size, 128 bytes smem, 400 bytes cmem[0]
ptxas info    : Compiling entry function 'alpha' for 'sm_80'
ptxas info    : Function properties for alpha
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 10 registers, used 0 barriers
"""


class CountingToolchain:
    """Compiles nothing; says how often it was asked."""

    def __init__(self, include_dir: Path, version: tuple[int, int] = (13, 0)) -> None:
        self.version = version
        self.include_dir = include_dir
        self.n_compiled = 0
        self.gate = threading.Event()
        self.gate.set()

    def supports(self, arch: int) -> bool:
        return arch < 200

    def compile(self, source, name, arch, include_dirs):
        self.gate.wait(10)
        self.n_compiled += 1
        return f"{name} {arch} {len(source)}".encode() + bytes(range(256)), REPORT


@pytest.fixture
def source_dir(tmp_path) -> Path:
    directory = tmp_path / "kernels" / "cuda"
    directory.mkdir(parents=True)
    (directory / "one.cu").write_text("first")
    (directory / "shared.cuh").write_text("header")
    return directory


def cache_of(source_dir: Path, toolchain=None) -> tuple[ModuleCache, CountingToolchain]:
    toolchain = toolchain or CountingToolchain(source_dir)
    return ModuleCache(toolchain, source_dir.parent / "cache", source_dir=source_dir), toolchain


@pytest.fixture(autouse=True)
def cache_folder(source_dir):
    (source_dir.parent / "cache").mkdir()


def test_registers_and_spills_are_read_from_the_assemblers_report():
    assert parse_usage(REPORT) == (KernelUsage("alpha", 10, 0, 0, 0), KernelUsage("beta", 40, 128, 8, 28))


def test_a_module_is_compiled_once_and_kept(source_dir):
    cache, toolchain = cache_of(source_dir)
    first = cache.get("one", 80)
    assert cache.get("one", 80) == first
    again, _ = cache_of(source_dir, toolchain)
    assert again.get("one", 80) == first
    assert toolchain.n_compiled == 1
    assert [kernel.name for kernel in first.kernels] == ["alpha", "beta"]


def test_whatever_goes_into_a_module_makes_it_another(source_dir):
    cache, toolchain = cache_of(source_dir)
    cache.get("one", 80)
    cache.get("one", 90)
    (source_dir / "one.cu").write_text("other")
    cache.get("one", 80)
    (source_dir / "shared.cuh").write_text("other header")
    cache_of(source_dir, toolchain)[0].get("one", 80)
    toolchain.version = (13, 1)
    cache_of(source_dir, toolchain)[0].get("one", 80)
    assert toolchain.n_compiled == 5


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "foreign"])
def test_a_damaged_file_is_compiled_again(damage, source_dir, caplog):
    cache, toolchain = cache_of(source_dir)
    whole = cache.get("one", 80)
    (path,) = cache.directory.glob("*.cubin")
    data = path.read_bytes()
    flipped = data[:-5] + bytes([data[-5] ^ 1]) + data[-4:]
    path.write_bytes({"cut": data[:-1], "flipped": flipped, "empty": b"", "foreign": b"\x7fELF" + data}[damage])
    with caplog.at_level(logging.WARNING):
        assert cache.get("one", 80) == whole
    assert toolchain.n_compiled == 2
    assert "is damaged" in caplog.text
    assert path.read_bytes() == data


def test_threads_that_want_the_same_module_wait_for_one_to_compile_it(source_dir):
    cache, toolchain = cache_of(source_dir)
    toolchain.gate.clear()
    with ThreadPoolExecutor(8) as pool:
        results = [pool.submit(cache.get, "one", 80) for _ in range(8)]
        toolchain.gate.set()
        assert len({result.result() for result in results}) == 1
    assert toolchain.n_compiled == 1


def _compile_in_process(source_dir: Path) -> int:
    cache, toolchain = cache_of(source_dir)
    cache.get("one", 80)
    return toolchain.n_compiled


def test_processes_that_want_the_same_module_wait_for_one_to_compile_it(source_dir):
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        assert sum(pool.map(_compile_in_process, [source_dir] * 4)) == 1


def test_nothing_is_left_behind_by_a_compiler_that_fails(source_dir):
    cache, toolchain = cache_of(source_dir)

    def fail(*_arguments):
        raise KernelError("one.cu(3): error: expected a ;")

    toolchain.compile = fail
    with pytest.raises(KernelError, match="expected a ;"):
        cache.get("one", 80)
    assert not list(cache.directory.glob("*cubin*"))


def test_an_unknown_module_and_an_unknown_architecture_are_named(source_dir):
    cache, _ = cache_of(source_dir)
    with pytest.raises(KernelError, match="no CUDA module 'two'"):
        cache.get("two", 80)
    with pytest.raises(DeviceError, match=r"NVRTC 13\.0 cannot compile for sm_300; install a newer one"):
        cache.get("one", 300)


def test_a_folder_that_fills_up_is_an_error_that_says_where(source_dir, monkeypatch):
    cache, _ = cache_of(source_dir)

    def full(*_arguments, **_options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cuda_compiler.tempfile, "mkstemp", full)
    with pytest.raises(KernelError, match=r"No space left on device.*EXL2_RAG_CACHE"):
        cache.get("one", 80)


def test_where_nothing_can_be_kept_a_temporary_directory_serves_with_one_notice(tmp_path, monkeypatch, caplog):
    (tmp_path / "file").write_text("not a directory")
    monkeypatch.setenv("EXL2_RAG_CACHE", str(tmp_path / "file"))
    cuda_compiler._process_directory.cache_clear()
    with caplog.at_level(logging.WARNING):
        first, second = cuda_compiler.cache_directory(), cuda_compiler.cache_directory()
    cuda_compiler._process_directory.cache_clear()
    assert first == second
    assert first.is_dir()
    assert caplog.text.count("cannot be kept") == 1
    assert "set EXL2_RAG_CACHE" in caplog.text


def test_without_the_extra_it_is_said_how_to_install_it(monkeypatch):
    for name in ("cuda", "cuda.core", "cuda.bindings"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(DeviceError, match=r"need the packages of the 'cuda' extra.*pip install 'exl2-rag\[cuda\]'"):
        Nvrtc()


def test_a_kernel_that_does_not_compile_says_where(tmp_path):
    pytest.importorskip("cuda.bindings")
    (tmp_path / "broken.cu").write_text('extern "C" __global__ void broken(float* y) { y[0] = missing; }\n')
    with pytest.raises(KernelError, match=r'broken.cu.* identifier "missing" is undefined'):
        ModuleCache(Nvrtc(), tmp_path, source_dir=tmp_path).get("broken", 80)


@pytest.fixture(scope="module")
def built():
    """Every module for every architecture; minutes at first, an instant once it is in the cache."""
    pytest.importorskip("cuda.bindings")
    return build_all(ARCHITECTURES, jobs=os.cpu_count() or 1)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_every_kernel_compiles_for_every_architecture(built):
    assert [f"{result.module} sm_{result.arch}: {result.error}" for result in built if result.error is not None] == []
    assert len(built) == len(modules()) * len(ARCHITECTURES)
    assert all(result.compiled.kernels for result in built), "the assembler reported nothing"


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_no_kernel_spills_registers(built):
    spilled = [
        f"{kernel.name} on sm_{result.arch}: {kernel.spill_bytes} bytes"
        for result in built
        for kernel in result.compiled.kernels
        if kernel.spill_bytes > 0
    ]
    assert spilled == []
