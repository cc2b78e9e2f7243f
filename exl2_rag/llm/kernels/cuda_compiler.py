"""From a `.cu` file to a cubin, by NVRTC: needs the `cuda` extra, but neither a card, nor a driver, nor nvcc.

A compiled module is kept on disk under a name made of everything that goes into it: source, headers, options, target
and compiler version. Files appear complete or not at all, carry a checksum, and are made again if it does not match.
Threads and processes that want the same module at once wait for the one that compiles it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import logging
import os
import re
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any, Final, Protocol

from exl2_rag.errors import DeviceError, KernelError
from exl2_rag.llm.kernels import native
from exl2_rag.llm.kernels.cuda_backend import SOURCE_DIR, modules
from exl2_rag.llm.kernels.library_build import BuildError

_logger = logging.getLogger(__name__)

_MAGIC: Final = b"exl2-rag cubin 1\n"
_LOCK_TIMEOUT_S: Final = 600
# Not --use_fast_math: subnormal float16 scales and exact rounding matter. -v makes ptxas report registers and spills.
_OPTIONS: Final = ("std=c++17", "ptxas=-v")
_CUDA_HEADERS: Final = ("cuda_fp16.h", "cuda_fp16.hpp", "cuda_bf16.h", "cuda_bf16.hpp")

INSTALL_HINT: Final = "pip install 'exl2-rag[cuda]' (for drivers of CUDA 12: 'exl2-rag[cuda12]')"


@dataclasses.dataclass(frozen=True, slots=True)
class KernelUsage:
    """What one kernel takes of a multiprocessor.

    Attributes:
        registers: of one thread.
        shared_bytes: static shared memory of a block; what a launch adds is not in it.
        stack_bytes: local memory of a thread for its stack.
        spill_bytes: registers written to local memory for want of room, stores and loads together.
    """

    name: str
    registers: int
    shared_bytes: int
    stack_bytes: int
    spill_bytes: int


@dataclasses.dataclass(frozen=True, slots=True)
class CompiledModule:
    """A `.cu` file compiled for one architecture."""

    module: str
    arch: int
    cubin: bytes
    kernels: tuple[KernelUsage, ...]


class Toolchain(Protocol):
    """A CUDA compiler."""

    @property
    def version(self) -> tuple[int, int]:
        """CUDA release it belongs to."""

    @property
    def include_dir(self) -> Path:
        """CUDA's own headers."""

    def supports(self, arch: int) -> bool:
        """Whether it can compile for this compute capability."""

    def compile(self, source: str, name: str, arch: int, include_dirs: Sequence[Path]) -> tuple[bytes, str]:
        """The cubin and what the assembler reported. Raises KernelError with what the compiler said."""


class Nvrtc:
    """NVRTC, reached through `cuda-core`.

    Raises:
        DeviceError: the packages of the `cuda` extra are missing or do not work.
    """

    def __init__(self) -> None:
        try:
            from cuda import core
            from cuda.bindings import nvrtc

            if not hasattr(core, "Program"):  # before its version 1
                from cuda.core import experimental as core
            self._program: Any = core.Program
            self._options: Any = core.ProgramOptions
            self._nvrtc: Any = nvrtc
            error, major, minor = nvrtc.nvrtcVersion()
        except (ImportError, AttributeError) as missing:
            raise DeviceError(
                f"CUDA kernels need the packages of the 'cuda' extra, but one is missing ({missing}); {INSTALL_HINT}"
            ) from missing
        except RuntimeError as broken:  # the bindings are there, the library they load is not
            raise DeviceError(f"NVRTC, the CUDA compiler, cannot be loaded ({broken}); {INSTALL_HINT}") from broken
        if int(error) != 0:
            raise DeviceError(f"NVRTC, the CUDA compiler, does not answer ({error}); {INSTALL_HINT}")
        self._version = (int(major), int(minor))

    @property
    def version(self) -> tuple[int, int]:
        """CUDA release it belongs to."""
        return self._version

    @property
    def include_dir(self) -> Path:
        """CUDA's own headers: of the `cuda` extra, else of an installed toolkit."""
        return cuda_include_dir()

    def supports(self, arch: int) -> bool:
        """Whether this NVRTC can compile for the compute capability."""
        error, known = self._nvrtc.nvrtcGetSupportedArchs()
        return int(error) != 0 or arch in known

    def compile(self, source: str, name: str, arch: int, include_dirs: Sequence[Path]) -> tuple[bytes, str]:
        """The cubin and ptxas' report. Raises KernelError with what the compiler said."""
        options = self._options(
            name=name,
            arch=f"sm_{arch}",
            std="c++17",
            include_path=[str(directory) for directory in include_dirs],
            ptxas_options=["-v"],
        )
        log = io.StringIO()
        try:
            code = self._program(source, "c++", options).compile("cubin", logs=log).code
        except Exception as error:  # cuda-core has several, none of them shared by its versions
            raise KernelError(f"{name} cannot be compiled for sm_{arch}: {error}\n{log.getvalue()}") from error
        return bytes(code), log.getvalue()


@cache
def cuda_include_dir() -> Path:
    """The directory of cuda_fp16.h: that of the `cuda` extra, else of an installed toolkit.

    Raises:
        DeviceError: there is none.
    """
    candidates: list[Path] = []
    try:
        from cuda import pathfinder

        found = pathfinder.find_nvidia_header_directory("cudart")
        candidates += [] if found is None else [Path(found)]
    except (ImportError, AttributeError, RuntimeError):
        pass  # an old or absent pathfinder: look in the usual places
    candidates += [Path(os.environ[name]) / "include" for name in ("CUDA_HOME", "CUDA_PATH") if name in os.environ]
    candidates.append(Path("/usr/local/cuda/include"))
    for candidate in candidates:
        if (candidate / "cuda_fp16.h").is_file():
            return candidate
    raise DeviceError(f"CUDA's headers (cuda_fp16.h) are nowhere to be found; {INSTALL_HINT}, or set CUDA_HOME")


def parse_usage(report: str) -> tuple[KernelUsage, ...]:
    """Registers, shared memory and spills of each kernel from what `ptxas -v` reported."""
    found: dict[str, KernelUsage] = {}
    name: str | None = None
    for line in report.splitlines():
        if entry := re.search(r"Compiling entry function '(\w+)'", line):
            name = entry.group(1)
            found[name] = KernelUsage(name, 0, 0, 0, 0)
        elif name is not None and "spill stores" in line:
            # Functions that are not inlined are listed besides the kernel; what they spill is the kernel's.
            stack, stores, loads = (int(number) for number in re.findall(r"(\d+) bytes", line))
            one = found[name]
            found[name] = dataclasses.replace(
                one, stack_bytes=one.stack_bytes + stack, spill_bytes=one.spill_bytes + stores + loads
            )
        elif name is not None and (used := re.search(r"Used (\d+) registers", line)):
            shared = re.search(r"(\d+) bytes smem", line)
            found[name] = dataclasses.replace(
                found[name], registers=int(used.group(1)), shared_bytes=int(shared.group(1)) if shared else 0
            )
    return tuple(found[key] for key in sorted(found))


def cache_directory() -> Path:
    """Where compiled modules go: beside the CPU kernels' library.

    Where that cannot be written to, a directory of this process, with a warning: every start then compiles anew, which
    takes a minute, but a read-only home (as in many containers) does not keep the engine from running.
    """
    try:
        directory = native.cache_dir()
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            return directory
    except (OSError, BuildError) as error:
        return _process_directory(str(error))


@cache
def _process_directory(reason: str) -> Path:
    _logger.warning(
        "compiled CUDA kernels cannot be kept (%s): they go into a temporary directory and are compiled again at every "
        "start; set EXL2_RAG_CACHE to a directory that can be written to",
        reason,
    )
    # Kept until the process ends: removing it is left to the object.
    _temporary.append(tempfile.TemporaryDirectory(prefix="exl2-rag-cuda-"))
    return Path(_temporary[-1].name)


_temporary: list[tempfile.TemporaryDirectory[str]] = []


class ModuleCache:
    """Compiled modules in one directory.

    Args:
        toolchain: compiles what is not there.
        directory: where modules are kept; None is `cache_directory()`.
        source_dir: where the `.cu` files are.
    """

    def __init__(self, toolchain: Toolchain, directory: Path | None = None, *, source_dir: Path = SOURCE_DIR) -> None:
        self._toolchain = toolchain
        self.directory = cache_directory() if directory is None else directory
        self._source_dir = source_dir
        self._headers = _read_headers(source_dir, toolchain.include_dir)

    def has(self, module: str, arch: int) -> bool:
        """Whether the module is kept, whole or not."""
        return self._path(module, self._source(module), arch).exists()

    def get(self, module: str, arch: int) -> CompiledModule:
        """The module, compiled now if it is not kept yet or what is kept is damaged.

        Raises:
            KernelError: there is no such module, it does not compile, or another process has held the lock too long.
            DeviceError: the compiler does not know the architecture.
        """
        from filelock import FileLock, Timeout

        source = self._source(module)
        path = self._path(module, source, arch)
        kept = _read(path, module, arch)
        if kept is not None:
            return kept
        if not self._toolchain.supports(arch):
            version = ".".join(map(str, self._toolchain.version))
            raise DeviceError(
                f"NVRTC {version} cannot compile for sm_{arch}; install a newer one: pip install --upgrade "
                "'exl2-rag[cuda]'"
            )
        try:
            with FileLock(path.with_suffix(".lock"), timeout=_LOCK_TIMEOUT_S):
                kept = _read(path, module, arch)
                if kept is not None:
                    return kept
                if path.exists():
                    _logger.warning("%s is damaged; compiling it again", path)
                return self._compile(module, source, arch, path)
        except Timeout as error:
            raise KernelError(f"another process has held {error.lock_file} for {_LOCK_TIMEOUT_S} s") from error
        except OSError as error:
            raise KernelError(
                f"compiled CUDA kernels cannot be written to {self.directory} ({error}); free space there, or set "
                "EXL2_RAG_CACHE to a directory that can be written to"
            ) from error

    def _source(self, module: str) -> str:
        path = self._source_dir / f"{module}.cu"
        if not path.is_file():
            raise KernelError(f"there is no CUDA module '{module}' in {self._source_dir}")
        return path.read_text(encoding="utf-8")

    def _path(self, module: str, source: str, arch: int) -> Path:
        parts = (module, arch, _OPTIONS, self._toolchain.version, hashlib.sha256(source.encode()).hexdigest())
        key = hashlib.sha256(f"{parts!r}{self._headers}".encode()).hexdigest()[:32]
        return self.directory / f"cuda_{module}_{arch}-{key}.cubin"

    def _compile(self, module: str, source: str, arch: int, path: Path) -> CompiledModule:
        _logger.info("compiling %s for sm_%d", module, arch)
        includes = (self._source_dir, self._source_dir.parent, self._toolchain.include_dir)
        cubin, report = self._toolchain.compile(source, f"{module}.cu", arch, includes)
        compiled = CompiledModule(module, arch, cubin, parse_usage(report))
        _write(path, compiled)
        return compiled


def _read_headers(source_dir: Path, include_dir: Path) -> str:
    digest = hashlib.sha256()
    own = [*source_dir.glob("*.cuh"), *source_dir.parent.glob("*.h")]
    for path in [*sorted(own), *(include_dir / name for name in _CUDA_HEADERS)]:
        if path.is_file():
            content = path.read_bytes()
            digest.update(f"{path.name}\0{len(content)}\0".encode())
            digest.update(content)
    return digest.hexdigest()


def _write(path: Path, compiled: CompiledModule) -> None:
    usage = json.dumps([dataclasses.asdict(kernel) for kernel in compiled.kernels]).encode() + b"\n"
    content = usage + compiled.cubin
    handle, name = tempfile.mkstemp(prefix="cubin-", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(_MAGIC + hashlib.sha256(content).hexdigest().encode() + b"\n" + content)
        Path(name).replace(path)
    except OSError:
        Path(name).unlink(missing_ok=True)
        raise


def _read(path: Path, module: str, arch: int) -> CompiledModule | None:
    """What `_write` wrote; None if it is not there or not whole."""
    try:
        data = path.read_bytes()
    except OSError:
        return None
    head, content = data[: len(_MAGIC) + 65], data[len(_MAGIC) + 65 :]
    if head != _MAGIC + hashlib.sha256(content).hexdigest().encode() + b"\n":
        return None
    usage, _, cubin = content.partition(b"\n")
    return CompiledModule(module, arch, cubin, tuple(KernelUsage(**kernel) for kernel in json.loads(usage)))


class Compilers:
    """The one `ModuleCache` of this process, made at first use."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._cache: ModuleCache | None = None

    def module_cache(self) -> ModuleCache:
        """Raises DeviceError where the `cuda` extra is not installed."""
        with self._lock:
            if self._cache is None:
                self._cache = ModuleCache(Nvrtc())
            return self._cache


_compilers = Compilers()


def module_cache() -> ModuleCache:
    """The modules compiled by NVRTC into `cache_directory()`.

    Raises:
        DeviceError: the `cuda` extra is not installed.
    """
    return _compilers.module_cache()


@dataclasses.dataclass(frozen=True, slots=True)
class BuildResult:
    """How the build of one module went: `compiled`, or an error."""

    module: str
    arch: int
    compiled: CompiledModule | None
    error: str | None


def build_all(architectures: Sequence[int], names: Sequence[str] | None = None, *, jobs: int = 1) -> list[BuildResult]:
    """Compile modules for architectures into the cache, `jobs` at a time.

    NVRTC compiles one module at a time in a process, so each gets a process of its own. Those are started as programs:
    `multiprocessing` would run the caller's script again.

    Args:
        architectures: compute capabilities.
        names: modules; None is all of them.
        jobs: processes at the same time; 1 compiles in this one.
    """
    kept = module_cache()
    tasks = [(module, arch) for module in (modules() if names is None else names) for arch in architectures]

    def build(task: tuple[str, int]) -> BuildResult:
        module, arch = task
        try:
            if jobs > 1 and not kept.has(module, arch):
                # What goes wrong there goes wrong here too, with its message.
                command = [sys.executable, "-m", __spec__.name, str(kept.directory), module, str(arch)]
                subprocess.run(command, capture_output=True, check=False)
            return BuildResult(module, arch, kept.get(module, arch), None)
        except KernelError as error:
            return BuildResult(module, arch, None, str(error))

    with ThreadPoolExecutor(jobs) as pool:
        return list(pool.map(build, tasks))


def main(arguments: Sequence[str]) -> int:
    """Compile one module: DIRECTORY MODULE ARCH. What `build_all` starts."""
    directory, module, arch = arguments
    try:
        ModuleCache(Nvrtc(), Path(directory)).get(module, int(arch))
    except KernelError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
