"""CUDA kernels on cards: which card can be used, and the `Backend` that launches on it.

A card is usable if there is a driver, the driver is not older than NVRTC's major release, and the card is sm_75 or
newer; each way of not being usable has its own message, which says what to do. Modules are compiled at first use
(`cuda_compiler.py`) and loaded once. Launches go to torch's current stream and do not wait, so they can be captured in
a CUDA graph, provided that the kernels have been launched once before: loading one is not allowed during a capture.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import os
import struct
import threading
from collections.abc import Callable, Sequence
from typing import Final, Protocol

import torch
from torch import Tensor

from exl2_rag.errors import DeviceError, DeviceMemoryError, KernelError
from exl2_rag.llm.kernels import cuda_compiler
from exl2_rag.llm.kernels.cuda_backend import F32, I32, MIN_ARCHITECTURE, Argument, Backend, Dim3, modules
from exl2_rag.llm.kernels.cuda_compiler import INSTALL_HINT, CompiledModule
from exl2_rag.llm.kernels.cuda_driver import Card, Driver, DriverError, Handle, NvidiaDriver

_logger = logging.getLogger(__name__)

_SHARED_WITHOUT_ASKING: Final = 48 << 10  # bytes; a kernel must be allowed more


class Modules(Protocol):
    """Where compiled modules come from; `cuda_compiler.ModuleCache` is one."""

    def get(self, module: str, arch: int) -> CompiledModule:
        """The module for the architecture."""


def check_card(driver: Driver, index: int, compiler_version: tuple[int, int]) -> Card:
    """The card, if kernels can run on it.

    Raises:
        DeviceError: there is no such card, it is too old, or the driver is.
    """
    try:
        count = driver.n_cards()
        if count == 0:
            raise DriverError("no card", "it counts none")
        if index >= count:
            raise DeviceError(
                f"device 'cuda:{index}' was asked for, but there are {count} card(s), 'cuda:0' to 'cuda:{count - 1}'; "
                "CUDA_VISIBLE_DEVICES may hide others"
            )
        card, version = driver.card(index), driver.version()
    except DriverError as error:
        raise _explain(error, "device 'cuda' was asked for") from error
    if card.arch < MIN_ARCHITECTURE:
        raise DeviceError(
            f"{card.name} (sm_{card.arch}) is too old: kernels need sm_{MIN_ARCHITECTURE} (Turing) or newer; use "
            "device='cpu'"
        )
    if version[0] < compiler_version[0]:
        raise DeviceError(
            f"the NVIDIA driver is of CUDA {version[0]}.{version[1]}, older than the installed NVRTC "
            f"{compiler_version[0]}.{compiler_version[1]}, whose programs it cannot load; update the driver, or "
            f"install the packages for CUDA {version[0]}: pip install 'exl2-rag[cuda{version[0]}]'"
        )
    return card


def _explain(error: DriverError, what: str) -> KernelError:
    """The error as a user can act on it."""
    messages: dict[str, str] = {
        "not installed": f"{what}, but the packages of the 'cuda' extra are missing ({error}); {INSTALL_HINT}",
        "no driver": f"{what}, but there is no NVIDIA driver ({error}); install one, or use device='cpu'",
        "no card": f"{what}, but the NVIDIA driver finds no card ({error}): check `nvidia-smi` and "
        "CUDA_VISIBLE_DEVICES, or use device='cpu'",
        "driver too old": f"{what}, but the NVIDIA driver is too old or not whole ({error}); update it",
        "cannot load": f"{what}, but the NVIDIA driver cannot load the compiled kernels ({error}); it is older than "
        "the installed NVRTC: update the driver, or install the packages of its CUDA release",
    }
    if error.kind == "no memory":
        return DeviceMemoryError(
            f"{what}, but the card has no memory left ({error}); close other programs that use it (`nvidia-smi` lists "
            "them), or use a smaller model, cache_tokens or max_batched_tokens"
        )
    if error.kind in messages:
        return DeviceError(messages[error.kind])
    return KernelError(f"{what}, but the NVIDIA driver failed: {error}")


class _Kernel:
    """A loaded kernel and how much dynamic shared memory it may have."""

    def __init__(self, handle: Handle, parameter_bytes: tuple[int, ...] | None) -> None:
        self.handle = handle
        self.parameter_bytes = parameter_bytes
        self.shared_limit = _SHARED_WITHOUT_ASKING


class CudaBackend:
    """A `Backend` on one card.

    Args:
        index: number of the card, as torch counts.
        driver: launches.
        modules: compiles.
        card: what `check_card` gave.
        stream_of: the raw handle of the current stream of a card; torch's unless a test says otherwise.
    """

    def __init__(
        self,
        index: int,
        driver: Driver,
        modules: Modules,
        card: Card,
        *,
        stream_of: Callable[[int], int] | None = None,
    ) -> None:
        self.index = index
        self.card = card
        self._driver = driver
        self._modules = modules
        self._kernels: dict[tuple[str, str], _Kernel] = {}
        self._libraries: dict[str, Handle] = {}
        self._lock = threading.Lock()
        self._thread = threading.local()
        self._stream_of = _torch_stream if stream_of is None else stream_of

    @property
    def arch(self) -> int:
        """Compute capability as two or three digits."""
        return self.card.arch

    @property
    def multiprocessors(self) -> int:
        """Streaming multiprocessors of the card."""
        return self.card.multiprocessors

    @property
    def max_shared_bytes(self) -> int:
        """Dynamic shared memory that a block may have."""
        return self.card.max_shared_bytes

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
        """Queue a kernel on torch's current stream of the card; see `Backend.launch`."""
        found = self._kernels.get((module, kernel)) or self._load(module, kernel)
        slots, n_bytes = self._pack(kernel, args)
        if found.parameter_bytes is not None and n_bytes != found.parameter_bytes:
            raise KernelError(
                f"{module}.{kernel}: the parameters have {found.parameter_bytes} bytes, the arguments {n_bytes}"
            )
        try:
            if not getattr(self._thread, "is_bound", False):
                self._driver.bind(self.index)
                self._thread.is_bound = True
            if shared_bytes > found.shared_limit:
                self._driver.allow_shared(found.handle, self.index, shared_bytes)
                found.shared_limit = shared_bytes
            first = ctypes.addressof(slots)
            addresses = (ctypes.c_uint64 * len(slots))(*range(first, first + 8 * len(slots), 8))
            self._driver.launch(
                found.handle, grid, block, shared_bytes, self._stream_of(self.index), ctypes.addressof(addresses)
            )
        except DriverError as error:
            where = (
                f"{module}.{kernel} (grid {grid}, block {block}, {shared_bytes} bytes of shared memory) was launched"
            )
            raise _explain(error, where) from error

    def _pack(self, kernel: str, args: Sequence[Argument]) -> tuple[ctypes.Array[ctypes.c_uint64], tuple[int, ...]]:
        """The parameters, eight bytes apart, and how many bytes of each count."""
        values: list[int] = []
        n_bytes: list[int] = []
        for argument in args:
            if isinstance(argument, Tensor):
                if argument.device.type != "cuda" or argument.device.index != self.index:
                    raise DeviceError(
                        f"{kernel}: all tensors must be on cuda:{self.index}, one is on {argument.device}"
                    )
                values.append(argument.data_ptr())
                n_bytes.append(8)
            elif argument is None:
                values.append(0)
                n_bytes.append(8)
            elif isinstance(argument, F32):
                values.append(int.from_bytes(struct.pack("<f", argument.value), "little"))
                n_bytes.append(4)
            else:  # the low bytes come first, so a 32-bit number may lie in eight bytes
                values.append(argument.value & 0xFFFF_FFFF_FFFF_FFFF)
                n_bytes.append(4 if isinstance(argument, I32) else 8)
        return (ctypes.c_uint64 * max(1, len(values)))(*values), tuple(n_bytes)

    def _load(self, module: str, kernel: str) -> _Kernel:
        with self._lock:
            found = self._kernels.get((module, kernel))
            if found is None:
                try:
                    library = self._libraries.get(module)
                    if library is None:
                        library = self._driver.load(self._modules.get(module, self.arch).cubin)
                        self._libraries[module] = library
                    handle = self._driver.kernel(library, kernel)
                    found = _Kernel(handle, self._driver.parameter_bytes(handle))
                except DriverError as error:
                    if error.kind == "not found":
                        raise KernelError(f"module '{module}' has no kernel '{kernel}'") from error
                    raise _explain(error, f"module '{module}' was loaded") from error
                self._kernels[module, kernel] = found
            return found


def _torch_stream(index: int) -> int:
    return int(torch.cuda.current_stream(index).cuda_stream)


@functools.cache
def _driver() -> Driver:
    return NvidiaDriver()


_backends: dict[int, CudaBackend] = {}
_backends_lock = threading.Lock()


def backend(device: torch.device) -> CudaBackend:
    """The backend of a card; one a card and process.

    Raises:
        DeviceError: the card cannot be used; says why and what to do.
    """
    index = _index_of(device)
    found = _backends.get(index)
    if found is None:
        with _backends_lock:
            found = _backends.get(index)
            if found is None:
                found = open_card(index)
                _backends[index] = found
    return found


def _index_of(device: torch.device) -> int:
    found: int | None = device.index
    if found is not None:
        return found
    # Without a card torch has no current one; `open_card` then says why.
    return torch.cuda.current_device() if torch.cuda.is_available() else 0


def open_card(index: int) -> CudaBackend:
    """A new backend of the card, after checking everything it needs.

    Raises:
        DeviceError: the card cannot be used; says why and what to do.
    """
    compiler = cuda_compiler.Nvrtc()
    try:
        driver = _driver()
    except DriverError as error:
        raise _explain(error, "device 'cuda' was asked for") from error
    card = check_card(driver, index, compiler.version)
    if not torch.cuda.is_available():
        raise DeviceError(
            f"{card.name} is there, but this torch ({torch.__version__}) cannot use it; install a torch built for CUDA"
        )
    return CudaBackend(index, driver, cuda_compiler.module_cache(), card)


def prepare(backend: Backend) -> None:
    """Compile every module for the card, as many at a time as there are processors; nothing to do if they are kept.

    At first use one by one they would take minutes. A module that does not compile says so when it is launched.
    """
    kept = cuda_compiler.module_cache()
    missing = [module for module in modules() if not kept.has(module, backend.arch)]
    if missing:
        _logger.warning("compiling %d CUDA modules for sm_%d: once, for a minute or so", len(missing), backend.arch)
        cuda_compiler.build_all([backend.arch], missing, jobs=os.cpu_count() or 1)


def unusable_because(index: int = 0) -> str | None:
    """Why kernels cannot run on the card; None if they can."""
    try:
        backend(torch.device("cuda", index))
    except KernelError as error:
        return str(error)
    return None
