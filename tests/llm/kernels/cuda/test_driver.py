"""The layer over the NVIDIA driver, with a stub in its place: that what is asked for arrives as it was meant."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from exl2_rag.llm.kernels import library_build

ROOT = Path(__file__).parents[4]

pytest.importorskip("cuda.bindings")
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the stub is a shared library of Linux")

SCRIPT = """
import ctypes
from exl2_rag.llm.kernels.cuda_driver import DriverError, NvidiaDriver

driver = NvidiaDriver()
print(driver.version(), driver.n_cards(), driver.card(0))
driver.bind(0)
kernel = driver.kernel(driver.load(b"\\x7fELF..."), "alpha")
print(driver.parameter_bytes(kernel))
driver.allow_shared(kernel, 0, 100000)
values = (ctypes.c_uint64 * 3)(0xDEADBEEF12, 7, 0x3FC00000)
first = ctypes.addressof(values)
addresses = (ctypes.c_uint64 * 3)(first, first + 8, first + 16)
driver.launch(kernel, (1, 2, 3), (4, 5, 6), 77, 0x5000, ctypes.addressof(addresses))
for ask in (
    lambda: driver.card(7), lambda: driver.load(b"what"), lambda: driver.kernel(driver.load(b"\\x7fELF"), "missing")
):
    try:
        ask()
    except DriverError as error:
        print(error.kind)
"""


@pytest.fixture(scope="module")
def stub_dir(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("stub")
    source = ROOT / "tests" / "cuda_emulation" / "libcuda_stub.cpp"
    command = [*library_build.find_compiler(), "-shared", "-fPIC", "-o", str(directory / "libcuda.so.1"), str(source)]
    subprocess.run([*command, "-ldl"], check=True)
    return directory


def run(script: str, library_dir: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"LD_LIBRARY_PATH": str(library_dir), "PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False)


def test_every_call_arrives_as_it_was_meant(stub_dir):
    done = run(SCRIPT, stub_dir)
    assert done.returncode == 0, done.stderr
    ours = [
        line for line in done.stdout.splitlines() if not line.startswith(("context", "load", "kernel", "a", "launch"))
    ]
    assert ours == [
        "(13, 1) 1 Card(name='Stub', arch=90, multiprocessors=132, max_shared_bytes=232448)",
        "(8, 4, 4)",
        "no card",
        "cannot load",
        "not found",
    ]
    for line in (
        "context 0x1000",
        "load ELF 0 0",
        "kernel 0x2000 alpha",
        "attribute 8 100000 0x3000 0",
        "launch 0x3000 (1 2 3) (4 5 6) 77 0x5000 1: 0xdeadbeef12 7 1.5",
    ):
        assert line in done.stdout.splitlines()


@pytest.mark.skipif(torch.version.cuda is not None, reason="torch would try to use the stub as well")
def test_the_same_messages_reach_the_user(stub_dir):
    script = """
from exl2_rag.llm.kernels import cuda_runtime
print(cuda_runtime.unusable_because(3))
print(cuda_runtime.unusable_because(0))
"""
    done = run(script, stub_dir)
    assert done.returncode == 0, done.stderr
    third, first = done.stdout.strip().splitlines()
    assert "'cuda:3' was asked for, but there are 1 card(s)" in third
    assert "Stub is there, but this torch" in first
