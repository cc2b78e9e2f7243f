"""Runs the CUDA kernels on CPU tensors: each module compiled by g++ against emulation.h, once for each architecture.

Compiled modules are kept beside the CPU kernels' library, under a name made of everything that goes into them.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Final

import pytest
from filelock import FileLock
from torch import Tensor

from exl2_rag.errors import DeviceError, KernelError
from exl2_rag.llm.kernels import library_build, native
from exl2_rag.llm.kernels.cuda_backend import F32, I32, I64, SOURCE_DIR, Argument, Dim3
from tests.cuda_emulation.guarded_memory import guarded

_HERE: Final = Path(__file__).resolve().parent
_FLAGS: Final = (
    "-std=c++17",
    "-O1",
    "-fPIC",
    "-shared",
    "-fvisibility=hidden",
    "-fno-gnu-unique",  # every module has its own block, though they are all in one process
    "-fno-strict-aliasing",
    "-ffp-contract=off",
    "-fsanitize=alignment,bounds,null",
    "-Wall",
    "-Wno-unknown-pragmas",
    "-Wno-unused-function",
    "-Wno-unused-variable",
    "-Wno-attributes",
)
_MAX_SHARED_BYTES: Final = {75: 64 << 10, 80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10, 120: 99 << 10}
ORDERS: Final = {"forward": 0, "reverse": 1, "shuffled": 2}

_KINDS: Final = {I32: ("i", ctypes.c_int32), I64: ("l", ctypes.c_int64), F32: ("f", ctypes.c_float)}


class EmulatedBackend:
    """A `Backend` on CPU tensors.

    Args:
        arch: the architecture whose code paths are taken.
        multiprocessors: what launchers are told.
        order: in which order the threads of a block run: "forward", "reverse" or "shuffled". Results must not depend
            on it; where they do, a barrier is missing.
        defines: macros to compile with; for planted faults.
        source_dir: where the `.cu` files are; for planted faults, a changed copy.
    """

    def __init__(
        self,
        arch: int = 80,
        *,
        multiprocessors: int = 4,
        order: str = "forward",
        defines: Mapping[str, int] | None = None,
        source_dir: Path = SOURCE_DIR,
    ) -> None:
        if (problem := _without_compiler()) is not None:
            pytest.skip(problem, allow_module_level=True)
        self.arch = arch
        self.multiprocessors = multiprocessors
        self.max_shared_bytes = _MAX_SHARED_BYTES[arch]
        self.launches: list[tuple[str, str]] = []
        self._order = ORDERS[order]
        self._defines = tuple(sorted((defines or {}).items()))
        self._source_dir = source_dir

    def launch(
        self,
        module: str,
        kernel: str,
        grid: Dim3,
        block: Dim3,
        args: Sequence[Argument],
        *,
        shared_bytes: int = 0,
    ) -> None:
        """Run a kernel to its end. Errors of the kernel, such as divergent barriers, raise KernelError."""
        self._check_launch(kernel, grid, block, shared_bytes)
        tensors = [argument for argument in args if isinstance(argument, Tensor)]
        for tensor in tensors:
            if tensor.device.type != "cpu":
                raise DeviceError(f"{kernel}: the emulation takes CPU tensors, one is on {tensor.device}")
        with guarded(tensors) as addresses:
            self._run(module, kernel, grid, block, args, iter(addresses), shared_bytes)

    def _run(
        self,
        module: str,
        kernel: str,
        grid: Dim3,
        block: Dim3,
        args: Sequence[Argument],
        tensor_addresses: Iterator[int],
        shared_bytes: int,
    ) -> None:
        kinds, values = "", []
        for argument in args:
            if argument is None or isinstance(argument, Tensor):
                kinds += "p"
                values.append(ctypes.c_void_p(None if argument is None else next(tensor_addresses)))
            else:
                kind, c_type = _KINDS[type(argument)]
                kinds += kind
                values.append(c_type(argument.value))
        library = _load(module, self.arch, self._defines, self._source_dir)
        try:
            function = getattr(library, f"{kernel}__emulate")
        except AttributeError:
            raise KernelError(f"module '{module}' has no kernel '{kernel}'") from None
        function.restype = ctypes.c_char_p
        addresses = (ctypes.c_void_p * max(1, len(values)))(*(ctypes.addressof(value) for value in values))
        sizes = ctypes.c_uint * 3
        self.launches.append((module, kernel))
        error = function(
            sizes(*grid), sizes(*block), ctypes.c_size_t(shared_bytes), self._order, kinds.encode(), addresses
        )
        if error is not None:
            raise KernelError(f"{module}.{kernel}, grid {grid}, block {block}: {error.decode()}")

    def _check_launch(self, kernel: str, grid: Dim3, block: Dim3, shared_bytes: int) -> None:
        threads = block[0] * block[1] * block[2]
        limits = (2**31 - 1, 65535, 65535)
        if min(grid) < 1 or any(size > limit for size, limit in zip(grid, limits, strict=True)):
            raise KernelError(f"{kernel}: a grid of {grid} blocks cannot be launched")
        if min(block) < 1 or threads > 1024 or block[2] > 64:
            raise KernelError(f"{kernel}: a block of {block} threads cannot be launched")
        if shared_bytes > self.max_shared_bytes:
            raise KernelError(f"{kernel}: {shared_bytes} bytes of shared memory, at most {self.max_shared_bytes}")


@cache
def _without_compiler() -> str | None:
    """Why nothing can be emulated here; None where there is a C++ compiler that runs."""
    try:
        library_build.compiler_version(library_build.find_compiler())
    except library_build.BuildError as error:
        return f"CUDA kernels are emulated by compiled C++, and there is no compiler that works: {error}"
    return None


@cache
def cuda_include_dir() -> Path:
    """CUDA's own headers: those of the `cuda` extra, else those of an installed toolkit."""
    candidates = [Path(entry) / "nvidia" / "cu13" / "include" for entry in sys.path]
    candidates += [Path(os.environ[name]) / "include" for name in ("CUDA_HOME", "CUDA_PATH") if name in os.environ]
    candidates.append(Path("/usr/local/cuda/include"))
    for candidate in candidates:
        if (candidate / "cuda_fp16.h").is_file():
            return candidate
    raise KernelError("there is no cuda_fp16.h: install the 'cuda' extra, or set CUDA_HOME")


@cache
def _load(module: str, arch: int, defines: tuple[tuple[str, int], ...], source_dir: Path) -> ctypes.CDLL:
    compiler = library_build.find_compiler()
    options = [f"-DEXL2_ARCH={arch}", *(f"-D{name}={value}" for name, value in defines)]
    digest = hashlib.sha256(repr((module, options, _FLAGS, compiler)).encode())
    digest.update(library_build.compiler_version(compiler).encode())
    digest.update(str(cuda_include_dir()).encode())
    sources = [source_dir / f"{module}.cu", *source_dir.glob("*.cuh"), *_HERE.glob("*.h")]
    sources.append(SOURCE_DIR.parent / "exl2_layout.h")
    for source in sorted(sources):
        digest.update(source.name.encode() + b"\0" + source.read_bytes())
    path = native.cache_dir() / f"emulated_{module}_{arch}-{digest.hexdigest()[:24]}.so"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_suffix(".lock")):
            if not path.exists():
                _build(module, path, compiler, options, source_dir)
    return ctypes.CDLL(str(path))


def _build(module: str, path: Path, compiler: list[str], options: list[str], source_dir: Path) -> None:
    source = source_dir / f"{module}.cu"
    if not source.is_file():
        raise KernelError(f"there is no module '{module}' in {source_dir}")
    includes = [f"-I{directory}" for directory in (_HERE, source_dir, SOURCE_DIR.parent)]
    includes += ["-isystem", str(cuda_include_dir())]
    common = [*compiler, *_FLAGS, "-DEXL2_EMULATION", *options, *includes, "-include", "emulation.h", "-x", "c++"]
    listed = _run([*common, "-DEXL2_LIST_KERNELS", "-E", str(source)])
    kernels = re.findall(r"exl2_kernel_mark\s+void\s+(\w+)\s*\(", listed)
    if not kernels:
        raise KernelError(f'{source.name} has no entry points; they look like: extern "C" __global__ void name(...)')
    with tempfile.TemporaryDirectory(prefix="build-", dir=path.parent) as name:
        unit, built = Path(name) / "module.cpp", Path(name) / "module.so"
        lines = [f'#include "{source}"', *(f"EXL2_EMULATE({kernel})" for kernel in kernels)]
        unit.write_text("\n".join(lines) + "\n", encoding="utf-8")
        _run([*common, str(unit), "-o", str(built)])
        built.replace(path)


def _run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise KernelError(f"the emulation could not be compiled:\n{done.stderr[-6000:]}")
    return done.stdout
