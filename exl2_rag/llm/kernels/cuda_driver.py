"""The NVIDIA driver, as far as kernels need it: which cards there are, loading a cubin, launching.

`Driver` is what `cuda_runtime.py` works with, `NvidiaDriver` the real one. Nothing here decides what a failure means
to a user; it is told apart by kind in `DriverError`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final, Protocol

from exl2_rag.llm.kernels.cuda_backend import Dim3

# Numbers of CUresult that are told apart; the rest is "other".
_KINDS: Final = {
    2: "no memory",
    34: "driver too old",  # STUB_LIBRARY: what stands in for a driver at build time was found instead of one
    35: "driver too old",  # INSUFFICIENT_DRIVER
    100: "no card",
    101: "no card",  # INVALID_DEVICE
    200: "cannot load",  # INVALID_IMAGE
    209: "cannot load",  # NO_BINARY_FOR_GPU
    218: "cannot load",  # INVALID_PTX
    222: "cannot load",  # UNSUPPORTED_PTX_VERSION
    500: "not found",
    803: "driver too old",  # SYSTEM_DRIVER_MISMATCH
}


class DriverError(Exception):
    """A call of the driver failed.

    Attributes:
        kind: "no driver", "no card", "driver too old", "no memory", "cannot load", "not found" or "other".
    """

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


@dataclass(frozen=True, slots=True)
class Card:
    """One GPU.

    Attributes:
        arch: compute capability as two or three digits.
        max_shared_bytes: shared memory that a block may ask for.
    """

    name: str
    arch: int
    multiprocessors: int
    max_shared_bytes: int


Handle = Any
"""A loaded module or a kernel of one; only the driver that gave it can read it."""


class Driver(Protocol):
    """What the runtime asks of a driver. Every method raises DriverError."""

    def version(self) -> tuple[int, int]:
        """The CUDA release that the driver goes with."""

    def n_cards(self) -> int:
        """How many cards this process may use."""

    def card(self, index: int) -> Card:
        """What card number `index` is."""

    def bind(self, index: int) -> None:
        """Make the card's context, the one that torch uses, current in the calling thread, if none is."""

    def load(self, cubin: bytes) -> Handle:
        """Load a module, for every card of its architecture."""

    def kernel(self, library: Handle, name: str) -> Handle:
        """An entry point of a loaded module."""

    def parameter_bytes(self, kernel: Handle) -> tuple[int, ...] | None:
        """The size of each parameter; None where the driver is too old to tell."""

    def allow_shared(self, kernel: Handle, index: int, shared_bytes: int) -> None:
        """Let the kernel have this much dynamic shared memory on the card."""

    def launch(self, kernel: Handle, grid: Dim3, block: Dim3, shared_bytes: int, stream: int, parameters: int) -> None:
        """Queue the kernel; `parameters` is the address of an array of the addresses of its parameters."""


class NvidiaDriver:
    """The driver of this machine, through `cuda-bindings`, which `cuda-core` brings along."""

    def __init__(self) -> None:
        try:
            from cuda.bindings import driver
        except ImportError as error:
            raise DriverError("not installed", str(error)) from error
        self._api: Any = driver
        try:
            self._call("initialise the driver", driver.cuInit, 0)
        except DriverError:
            raise
        except Exception as error:  # cuda-pathfinder has its own, by version, for a library that is not there
            raise DriverError("no driver", str(error)) from error

    def version(self) -> tuple[int, int]:
        """The CUDA release that the driver goes with."""
        number = int(self._call("ask for the version", self._api.cuDriverGetVersion))
        return number // 1000, number % 1000 // 10

    def n_cards(self) -> int:
        """How many cards this process may use."""
        return int(self._call("count the cards", self._api.cuDeviceGetCount))

    def card(self, index: int) -> Card:
        """What card number `index` is."""
        device = self._call("find the card", self._api.cuDeviceGet, index)
        names = self._api.CUdevice_attribute

        def attribute(name: str) -> int:
            key = getattr(names, f"CU_DEVICE_ATTRIBUTE_{name}")
            return int(self._call("read what the card is", self._api.cuDeviceGetAttribute, key, device))

        text = self._call("ask for the card's name", self._api.cuDeviceGetName, 128, device)
        major, minor = attribute("COMPUTE_CAPABILITY_MAJOR"), attribute("COMPUTE_CAPABILITY_MINOR")
        return Card(
            name=bytes(text).split(b"\0")[0].decode(),
            arch=10 * major + minor,
            multiprocessors=attribute("MULTIPROCESSOR_COUNT"),
            max_shared_bytes=attribute("MAX_SHARED_MEMORY_PER_BLOCK_OPTIN"),
        )

    def bind(self, index: int) -> None:
        """Make the card's primary context current in the calling thread, if none is."""
        if int(self._call("ask for the context", self._api.cuCtxGetCurrent)) != 0:
            return
        device = self._call("find the card", self._api.cuDeviceGet, index)
        context = self._call("open the card", self._api.cuDevicePrimaryCtxRetain, device)
        self._call("open the card", self._api.cuCtxSetCurrent, context)

    def load(self, cubin: bytes) -> Handle:
        """Load a module."""
        return self._call("load a module", self._api.cuLibraryLoadData, cubin, [], [], 0, [], [], 0)

    def kernel(self, library: Handle, name: str) -> Handle:
        """An entry point of a loaded module."""
        return self._call(f"find the kernel {name}", self._api.cuLibraryGetKernel, library, name.encode())

    def parameter_bytes(self, kernel: Handle) -> tuple[int, ...] | None:
        """The size of each parameter; None where the driver is too old to tell."""
        sizes: list[int] = []
        while True:
            try:
                error, _offset, size = self._api.cuKernelGetParamInfo(kernel, len(sizes))
            except (AttributeError, RuntimeError):  # not in this version of the bindings, or of the driver
                return None
            if int(error) != 0:  # there is no such parameter
                return tuple(sizes)
            sizes.append(int(size))

    def allow_shared(self, kernel: Handle, index: int, shared_bytes: int) -> None:
        """Let the kernel have this much dynamic shared memory on the card."""
        device = self._call("find the card", self._api.cuDeviceGet, index)
        key = self._api.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        self._call("raise the shared memory", self._api.cuKernelSetAttribute, key, shared_bytes, kernel, device)

    def launch(self, kernel: Handle, grid: Dim3, block: Dim3, shared_bytes: int, stream: int, parameters: int) -> None:
        """Queue the kernel on the stream."""
        # The driver takes a kernel of a library wherever it takes a function.
        function = self._api.CUfunction(int(kernel))
        self._call("launch", self._api.cuLaunchKernel, function, *grid, *block, shared_bytes, stream, parameters, 0)

    def _call(self, what: str, function: Any, *arguments: Any) -> Any:
        error, *results = function(*arguments)
        if int(error) != 0:
            kind = _KINDS.get(int(error), "other")
            raise DriverError(kind, f"could not {what}: {getattr(error, 'name', error)}")
        return results[0] if results else None
