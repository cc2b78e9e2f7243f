"""Finds, builds and loads the C++ library of the CPU kernels.

A wheel carries the library beside this file. Where it is absent, or a source has been edited since, the library is
compiled at first use into a cache directory, under a name made of everything that goes into it. Without library and
compiler the reference kernels take over, with one warning in the log.

    EXL2_RAG_KERNELS      "native" or "reference" forces one of them; unset or "auto" takes native where it can be had
    EXL2_RAG_NUM_THREADS  threads of one op; by default the processors this process may use
    EXL2_RAG_CACHE        where compiled libraries go; by default ~/.cache/exl2-rag
    EXL2_RAG_CPU_LEVEL    "baseline", "avx2", "avx512", "avx512vnni", "avx512amd" or "dotprod": for tests, a
                          lower level than the best
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import threading
from pathlib import Path
from typing import TYPE_CHECKING

from exl2_rag.errors import KernelError, SettingsError
from exl2_rag.llm.kernels import library_build
from exl2_rag.llm.kernels.library_build import BuildError

if TYPE_CHECKING:
    from torch import Tensor

ABI_VERSION = 3
PACKAGED_LIBRARY = Path(__file__).resolve().parent / "libexl2_cpu.so"

_logger = logging.getLogger(__name__)
_BUILD_TIMEOUT_S = 600


class _State:
    """What the first use found out."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.decided = False
        self.library: ctypes.CDLL | None = None
        self.forced_failure: str | None = None
        self.num_threads: int | None = None


_state = _State()


def library() -> ctypes.CDLL | None:
    """The loaded library; None where the reference kernels are to be used. Builds it at the first call if need be.

    Raises:
        KernelError: EXL2_RAG_KERNELS is "native", but there is no library; says why.
        SettingsError: an environment variable holds something it should not.
    """
    if not _state.decided:
        with _state.lock:
            if not _state.decided:
                _decide()
                _state.decided = True
    if _state.forced_failure is not None:
        raise KernelError(_state.forced_failure)
    return _state.library


def native_available() -> bool:
    """Whether ops run in C++."""
    return library() is not None


def cpu_level() -> str:
    """The level that ops are compiled for (see above: EXL2_RAG_CPU_LEVEL); "reference" without a library."""
    loaded = library()
    if loaded is None:
        return "reference"
    name: bytes = loaded.exl2_cpu_level()
    return name.decode()


def set_num_threads(count: int) -> None:
    """Threads that work on one op. No effect on the reference kernels, which use torch's own."""
    if count < 1:
        raise SettingsError(f"the number of threads must be at least 1, it is {count}")
    with _state.lock:
        _state.num_threads = count
        if _state.library is not None:
            _state.library.exl2_set_num_threads(count)


def read_memory(memory: Tensor) -> None:
    """Read all bytes of a contiguous CPU tensor once with all threads, to measure what memory gives a matmul.

    Raises:
        KernelError: there is no native library.
    """
    loaded = library()
    if loaded is None:
        raise KernelError("memory is read by the native library, and there is none; see the notice about kernels")
    loaded.exl2_read_memory(memory.data_ptr(), memory.nbytes)


def _decide() -> None:
    mode = os.environ.get("EXL2_RAG_KERNELS") or "auto"
    if mode not in ("auto", "native", "reference"):
        raise SettingsError(f"EXL2_RAG_KERNELS must be 'native', 'reference' or 'auto', it is '{mode}'")
    threads = _state.num_threads or default_num_threads()
    if mode == "reference":
        return
    try:
        loaded = _load()
    except BuildError as error:
        if mode == "native":
            _state.forced_failure = f"EXL2_RAG_KERNELS is 'native', but there are no native kernels: {error}"
        else:
            _logger.warning("using the slow reference kernels, because there are no native ones: %s", error)
        return
    level = os.environ.get("EXL2_RAG_CPU_LEVEL")
    if level and loaded.exl2_set_cpu_level(level.encode()) != 0:
        raise SettingsError(f"EXL2_RAG_CPU_LEVEL is '{level}', which this processor or library does not have")
    loaded.exl2_set_num_threads(threads)
    _state.library = loaded


def default_num_threads() -> int:
    """What EXL2_RAG_NUM_THREADS says, else the processors this process may use."""
    text = os.environ.get("EXL2_RAG_NUM_THREADS")
    if text:
        if not text.isdecimal() or int(text) < 1:
            raise SettingsError(f"EXL2_RAG_NUM_THREADS must be a positive whole number, it is '{text}'")
        return int(text)
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _load() -> ctypes.CDLL:
    wanted = library_build.source_hash()
    if PACKAGED_LIBRARY.exists():
        packaged = _open(PACKAGED_LIBRARY)
        if _hash_of(packaged) == wanted:
            return packaged
    path = _cached_library(wanted)
    loaded = _open(path)
    if _hash_of(loaded) != wanted:
        raise BuildError(f"{path} was built from other sources than its name says; remove it")
    return loaded


def _cached_library(sources: str) -> Path:
    """The library in the cache, built now if it is not there."""
    from filelock import FileLock, Timeout

    compiler = library_build.find_compiler()
    version = library_build.compiler_version(compiler)
    key = hashlib.sha256(f"{sources}\0{compiler}\0{version}".encode()).hexdigest()[:32]
    path = cache_dir() / f"exl2_cpu-{key}.so"
    if path.exists():
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Processes that start together wait for the one that compiles. A file appears complete or not at all.
        with FileLock(path.with_suffix(".lock"), timeout=_BUILD_TIMEOUT_S):
            if not path.exists():
                _logger.info("compiling the kernels with %s", compiler[0])
                library_build.build(path, compiler)
    except Timeout as error:
        raise BuildError(f"another process has held {error.lock_file} for {_BUILD_TIMEOUT_S} s") from error
    except OSError as error:
        raise BuildError(f"cannot write to {path.parent}: {error}") from error
    return path


def cache_dir() -> Path:
    """Where compiled libraries are kept.

    Raises:
        BuildError: nothing says where the user's home is.
    """
    chosen = os.environ.get("EXL2_RAG_CACHE")
    try:
        return (Path(chosen) if chosen else Path.home() / ".cache" / "exl2-rag") / "kernels"
    except RuntimeError as error:
        raise BuildError(f"there is no home directory for compiled kernels ({error}); set EXL2_RAG_CACHE") from error


def _open(path: Path) -> ctypes.CDLL:
    try:
        loaded = ctypes.CDLL(str(path))
        loaded.exl2_abi_version.restype = ctypes.c_int
        version = int(loaded.exl2_abi_version())
    except (OSError, AttributeError) as error:
        raise BuildError(f"{path} cannot be loaded: {error}") from error
    if version != ABI_VERSION:
        raise BuildError(f"{path} has the interface version {version}, expected {ABI_VERSION}")
    loaded.exl2_source_hash.restype = ctypes.c_char_p
    loaded.exl2_cpu_level.restype = ctypes.c_char_p
    loaded.exl2_set_cpu_level.argtypes = [ctypes.c_char_p]
    loaded.exl2_set_num_threads.argtypes = [ctypes.c_int]
    loaded.exl2_set_num_threads.restype = None
    loaded.exl2_op_index.argtypes = [ctypes.c_char_p]
    loaded.exl2_run_tape.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p]
    loaded.exl2_read_memory.argtypes = [ctypes.c_void_p, ctypes.c_int64]
    loaded.exl2_read_memory.restype = ctypes.c_uint64
    return loaded


def _hash_of(loaded: ctypes.CDLL) -> str:
    value: bytes = loaded.exl2_source_hash()
    return value.decode()
