"""The runtime on a driver that is none: what it asks of one, and what it says when something is wrong."""

from __future__ import annotations

import ctypes
import struct
import threading

import pytest
import torch

from exl2_rag.errors import DeviceError, DeviceMemoryError, KernelError
from exl2_rag.llm.kernels import cuda_runtime
from exl2_rag.llm.kernels.cuda_backend import F32, I32, I64
from exl2_rag.llm.kernels.cuda_compiler import CompiledModule
from exl2_rag.llm.kernels.cuda_driver import Card, DriverError
from exl2_rag.llm.kernels.cuda_runtime import CudaBackend, check_card

H200 = Card("NVIDIA H200", 90, 132, 232_448)


class FakeDriver:
    """A driver with one card, which remembers what was asked of it; `errors` maps methods to what they raise."""

    def __init__(
        self, *, card: Card = H200, version: tuple[int, int] = (13, 0), parameters: tuple[int, ...] | None = None
    ):
        self.the_card = card
        self.the_version = version
        self.parameters = parameters
        self.errors: dict[str, DriverError] = {}
        self.calls: list[tuple] = []
        self.launches: list[tuple] = []

    def _ask(self, name: str, *arguments) -> None:
        self.calls.append((name, *arguments))
        if name in self.errors:
            raise self.errors[name]

    def version(self):
        self._ask("version")
        return self.the_version

    def n_cards(self):
        self._ask("n_cards")
        return 1

    def card(self, index):
        self._ask("card", index)
        return self.the_card

    def bind(self, index):
        self._ask("bind", index, threading.get_ident())

    def load(self, cubin):
        self._ask("load", cubin)
        return cubin

    def kernel(self, library, name):
        self._ask("kernel", name)
        if name.startswith("missing"):
            raise DriverError("not found", "CUDA_ERROR_NOT_FOUND")
        return (library, name)

    def parameter_bytes(self, kernel):
        return self.parameters

    def allow_shared(self, kernel, index, shared_bytes):
        self._ask("allow_shared", shared_bytes)

    def launch(self, kernel, grid, block, shared_bytes, stream, parameters):
        self._ask("launch")
        count = 0 if self.parameters is None else len(self.parameters)
        addresses = (ctypes.c_uint64 * max(1, count)).from_address(parameters)
        values = [
            ctypes.string_at(address, size) for address, size in zip(addresses, self.parameters or (), strict=False)
        ]
        self.launches.append((kernel[1], grid, block, shared_bytes, stream, values))


class Modules:
    def __init__(self) -> None:
        self.asked: list[tuple[str, int]] = []

    def get(self, module: str, arch: int) -> CompiledModule:
        self.asked.append((module, arch))
        return CompiledModule(module, arch, module.encode(), ())


def backend_of(driver: FakeDriver) -> CudaBackend:
    return CudaBackend(0, driver, Modules(), H200, stream_of=lambda index: 77 + index)


class CardTensor(torch.Tensor):
    """A CPU tensor that says it is on the card."""

    @property
    def device(self):
        return torch.device("cuda", 0)


def on_card(*shape: int) -> torch.Tensor:
    return torch.zeros(*shape).as_subclass(CardTensor)


def test_parameters_arrive_as_the_kernel_reads_them():
    driver = FakeDriver(parameters=(8, 8, 4, 4, 8, 4))
    x = on_card(3)
    backend_of(driver).launch(
        "one", "alpha", (2, 3, 4), (32, 1, 1), (x, None, I32(-5), F32(1.5), I64(-(2**40)), I32(7)), shared_bytes=100
    )
    ((name, grid, block, shared, stream, values),) = driver.launches
    assert (name, grid, block, shared, stream) == ("alpha", (2, 3, 4), (32, 1, 1), 100, 77)
    assert values == [
        struct.pack("<Q", x.data_ptr()), bytes(8), struct.pack("<i", -5), struct.pack("<f", 1.5),
        struct.pack("<q", -(2**40)), struct.pack("<i", 7),
    ]  # fmt: skip


def test_a_module_is_compiled_and_loaded_once_for_all_its_kernels():
    driver = FakeDriver()
    backend = backend_of(driver)
    for kernel in ("alpha", "beta", "alpha"):
        backend.launch("one", kernel, (1, 1, 1), (32, 1, 1), ())
    assert backend._modules.asked == [("one", 90)]
    assert [call[0] for call in driver.calls].count("load") == 1
    assert [call[1] for call in driver.calls if call[0] == "kernel"] == ["alpha", "beta"]


def test_each_thread_that_launches_has_the_cards_context():
    driver = FakeDriver()
    backend = backend_of(driver)

    def launch_twice() -> None:
        for _ in range(2):
            backend.launch("one", "alpha", (1, 1, 1), (32, 1, 1), ())

    launch_twice()
    thread = threading.Thread(target=launch_twice)
    thread.start()
    thread.join()
    bound = [call[2] for call in driver.calls if call[0] == "bind"]
    assert len(bound) == 2
    assert len(set(bound)) == 2


def test_more_shared_memory_than_usual_is_asked_for_once():
    driver = FakeDriver()
    backend = backend_of(driver)
    for shared in (48 << 10, 100_000, 60_000, 120_000):
        backend.launch("one", "alpha", (1, 1, 1), (32, 1, 1), (), shared_bytes=shared)
    assert [call[1] for call in driver.calls if call[0] == "allow_shared"] == [100_000, 120_000]


def test_arguments_that_are_not_the_kernels_parameters_are_refused():
    backend = backend_of(FakeDriver(parameters=(8, 4)))
    with pytest.raises(KernelError, match=r"one.alpha: the parameters have \(8, 4\) bytes, the arguments \(8, 8\)"):
        backend.launch("one", "alpha", (1, 1, 1), (32, 1, 1), (on_card(1), I64(3)))


def test_tensors_elsewhere_are_refused():
    with pytest.raises(DeviceError, match="all tensors must be on cuda:0, one is on cpu"):
        backend_of(FakeDriver()).launch("one", "alpha", (1, 1, 1), (32, 1, 1), (torch.zeros(1),))


def test_a_kernel_that_is_not_there_is_named():
    with pytest.raises(KernelError, match="module 'one' has no kernel 'missing_one'"):
        backend_of(FakeDriver()).launch("one", "missing_one", (1, 1, 1), (32, 1, 1), ())


@pytest.mark.parametrize(
    ("method", "kind", "error", "words"),
    [
        (
            "load",
            "cannot load",
            DeviceError,
            "module 'one' was loaded.*older than the installed NVRTC: update the driver",
        ),
        ("load", "no memory", DeviceMemoryError, "no memory left.*nvidia-smi.*cache_tokens"),
        ("launch", "no memory", DeviceMemoryError, r"one\.alpha .*was launched, but the card has no memory left"),
        ("launch", "other", KernelError, r"one\.alpha \(grid \(1, 1, 1\).*the NVIDIA driver failed"),
        ("allow_shared", "other", KernelError, "200000 bytes of shared memory.*the NVIDIA driver failed"),
    ],
)
def test_what_the_driver_refuses_is_explained(method, kind, error, words):
    driver = FakeDriver()
    driver.errors[method] = DriverError(kind, "CUDA_ERROR_SOMETHING")
    with pytest.raises(error, match=words):
        backend_of(driver).launch("one", "alpha", (1, 1, 1), (32, 1, 1), (), shared_bytes=200_000)


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("no card", "the NVIDIA driver finds no card.*nvidia-smi.*CUDA_VISIBLE_DEVICES.*device='cpu'"),
        ("driver too old", "driver is too old.*update it"),
        ("no driver", "there is no NVIDIA driver.*install one, or use device='cpu'"),
    ],
)
def test_why_there_is_no_card_is_said(kind, words):
    driver = FakeDriver()
    driver.errors["n_cards"] = DriverError(kind, "CUDA_ERROR_SOMETHING")
    with pytest.raises(DeviceError, match=words):
        check_card(driver, 0, (13, 0))


def test_a_card_that_is_not_there_is_refused_by_number():
    with pytest.raises(DeviceError, match=r"'cuda:3' was asked for, but there are 1 card\(s\)"):
        check_card(FakeDriver(), 3, (13, 0))


def test_too_old_a_card_is_refused_by_name():
    with pytest.raises(DeviceError, match=r"GTX 1080 \(sm_61\) is too old: kernels need sm_75"):
        check_card(FakeDriver(card=Card("GTX 1080", 61, 20, 49_152)), 0, (13, 0))


def test_a_driver_older_than_the_compiler_is_refused_with_both_versions():
    with pytest.raises(
        DeviceError, match=r"driver is of CUDA 12.4, older than the installed NVRTC 13.5.*exl2-rag\[cuda12\]"
    ):
        check_card(FakeDriver(version=(12, 4)), 0, (13, 5))


def test_a_driver_of_the_same_major_release_serves():
    assert check_card(FakeDriver(version=(13, 0)), 0, (13, 5)) == H200
    assert check_card(FakeDriver(version=(14, 0)), 0, (13, 5)) == H200


def test_a_torch_without_cuda_is_told_apart_from_a_missing_card(monkeypatch):
    pytest.importorskip("cuda.bindings")
    monkeypatch.setattr(cuda_runtime, "_driver", FakeDriver)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(DeviceError, match=r"NVIDIA H200 is there, but this torch .* install a torch built for CUDA"):
        cuda_runtime.open_card(0)
