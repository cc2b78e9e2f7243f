"""The kernels on Arm: compiled where a cross compiler is installed, executed where qemu's user mode is too."""

from __future__ import annotations

import math
import platform
import shutil
import subprocess
from pathlib import Path

import pytest

from exl2_rag.llm.kernels import library_build

CHECK = Path(__file__).parent / "native_check.cpp"
CROSS_COMPILERS = ("aarch64-linux-gnu-g++", "aarch64-linux-gnu-clang++")
STRICT = (
    "-Wall",
    "-Wextra",
    "-Werror",
    "-O1",
)  # less optimised than in use, which takes three times as long to compile


def cross_compiler() -> list[str]:
    for name in CROSS_COMPILERS:
        if shutil.which(name) is not None:
            return [name]
    pytest.skip(f"there is no cross compiler for Arm: none of {', '.join(CROSS_COMPILERS)} is on the PATH")


def program(directory: Path, compiler: list[str], machine: str, *flags: str) -> Path:
    """The check, linked with the library's objects into one file that needs no other."""
    objects = library_build.compile_sources(directory, compiler, machine=machine, flags=flags)
    target = directory / "native_check"
    own = ["-std=c++17", "-O1", "-I", str(library_build.SOURCE_DIR / "cpu"), str(CHECK)]
    subprocess.run([*compiler, *own, *map(str, objects), "-static", "-pthread", "-o", str(target)], check=True)
    return target


def results(command: list[str], level: str) -> list[list[str]]:
    done = subprocess.run([*command, level], capture_output=True, text=True, check=True)
    lines = [line.split() for line in done.stdout.splitlines()]
    assert lines[0] == ["level", level]
    assert all({"exact", "near"} & set(line) for line in lines[1:]), done.stdout[:2000]
    return lines[1:]


@pytest.fixture(scope="module")
def arm_program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return program(tmp_path_factory.mktemp("arm"), cross_compiler(), "aarch64", *STRICT)


def test_the_kernels_compile_for_arm_without_a_warning_and_use_its_dot_products(arm_program: Path) -> None:
    dump = shutil.which("aarch64-linux-gnu-objdump")
    if dump is None:
        pytest.skip("there is no aarch64-linux-gnu-objdump to look into the objects with")

    def count_dot_products(level: str) -> int:
        path = arm_program.parent / f"plane_matmul-{level}.o"
        return subprocess.run([dump, "-d", path], capture_output=True, text=True, check=True).stdout.count("\tsdot\t")

    assert count_dot_products("dotprod") > 50
    assert count_dot_products("baseline") == 0


@pytest.mark.parametrize("level", ["baseline", "dotprod"])
def test_arm_computes_what_this_machine_computes(arm_program: Path, tmp_path: Path, level: str) -> None:
    emulator = shutil.which("qemu-aarch64") or shutil.which("qemu-aarch64-static")
    if emulator is None:
        pytest.skip("there is no qemu-aarch64 to run Arm programs with")
    if platform.machine() != "x86_64":
        pytest.skip("the other side of the comparison is the portable level of x86-64")
    found = results([emulator, "-cpu", "max", str(arm_program)], level)
    here = program(tmp_path, library_build.find_compiler(), "portable", "-O1")
    wanted = results([str(here)], "baseline")
    assert len(found) == len(wanted) > 15
    for mine, theirs in zip(found, wanted, strict=True):
        if "exact" in theirs:
            assert mine == theirs
            continue
        start = theirs.index("near") + 1
        assert mine[:start] == theirs[:start]
        numbers = [(float(a), float(b)) for a, b in zip(mine[start:], theirs[start:], strict=True)]
        assert all(math.isclose(a, b, rel_tol=2e-5, abs_tol=2e-5) for a, b in numbers), mine[:start]
        assert any(abs(a) > 0.01 for a, _ in numbers)


def test_a_processor_without_dot_products_is_given_the_level_below(arm_program: Path) -> None:
    emulator = shutil.which("qemu-aarch64") or shutil.which("qemu-aarch64-static")
    if emulator is None:
        pytest.skip("there is no qemu-aarch64 to run Arm programs with")
    command = [emulator, "-cpu", "cortex-a57", str(arm_program)]
    refused = subprocess.run([*command, "dotprod"], capture_output=True, text=True, check=False)
    assert refused.returncode == 1
    assert results(command, "baseline")
