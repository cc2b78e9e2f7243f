"""Compiles the C++ kernels into one shared library that links neither torch nor Python.

Used two ways: imported by `native.py`, which builds at first use in a source tree; and run as a script by CMake when a
wheel is built. It needs the standard library only, so it runs without the package installed.

    python library_build.py OUTPUT [--tolerate-failure]
"""

from __future__ import annotations

import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

SOURCE_DIR = Path(__file__).resolve().parent

# Compiled once for each level of processor; the names inside are those of ops.h.
_LEVEL_SOURCES = (
    "exl2_matmul",
    "gptq_matmul",
    "dense_matmul",
    "planes",
    "digits",
    "plane_matmul",
    "norm",
    "activation",
    "embedding",
    "rotary",
    "kv_write",
    "attention",
    "quantise",
)
_COMMON_SOURCES = ("library", "thread_pool")

# -ffp-contract=off: see simd.h. No -ffast-math anywhere: rounding to float16 and the order of sums rely on it.
_FLAGS = ("-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-fno-math-errno", "-Wno-psabi")
_AVX2 = ("-mavx2", "-mfma", "-mf16c")
_AVX512 = (*_AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl")
_X86_LEVELS: dict[str, tuple[str, ...]] = {
    "baseline": (),
    "avx2": _AVX2,
    "avx512": _AVX512,
    "avx512vnni": (*_AVX512, "-mavx512vnni"),
}
_ARM_LEVELS: dict[str, tuple[str, ...]] = {"baseline": (), "dotprod": ("-march=armv8.2-a+dotprod",)}
_COMPILERS = ("c++", "g++", "clang++")


class BuildError(Exception):
    """The library could not be built; the message holds what the compiler said."""


def _levels(machine: str) -> dict[str, tuple[str, ...]]:
    """The levels of a type of processor, as `platform.machine` names it, and the flags of each."""
    if machine.lower() in ("x86_64", "amd64"):
        return _X86_LEVELS
    return _ARM_LEVELS if machine.lower() in ("aarch64", "arm64") else {"baseline": ()}


def _level_define(machine: str) -> list[str]:
    levels = _levels(machine)
    names = {"avx2": "-DEXL2_X86_LEVELS", "dotprod": "-DEXL2_ARM_LEVELS"}
    return [define for level, define in names.items() if level in levels]


def source_hash() -> str:
    """Changes with every source, header, flag and machine type; not with the compiler."""
    digest = hashlib.sha256()
    digest.update(repr((_FLAGS, sorted(_levels(platform.machine()).items()), _LEVEL_SOURCES, _COMMON_SOURCES)).encode())
    sources = [path for path in (SOURCE_DIR / "cpu").iterdir() if path.suffix in (".cpp", ".h")]
    for path in sorted([*sources, SOURCE_DIR / "exl2_layout.h"]):
        digest.update(f"{path.name}\0{path.stat().st_size}\0".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:32]


def find_compiler() -> list[str]:
    """The command of the C++ compiler: $CXX if set, else the first of c++, g++ and clang++.

    Raises:
        BuildError: there is none.
    """
    chosen = os.environ.get("CXX")
    if chosen:
        command = shlex.split(chosen)
        if not command or shutil.which(command[0]) is None:
            raise BuildError(f"the C++ compiler named by CXX, '{chosen}', cannot be found")
        return command
    for name in _COMPILERS:
        if shutil.which(name) is not None:
            return [name]
    raise BuildError(f"there is no C++ compiler: none of {', '.join(_COMPILERS)} is on the PATH, and CXX is not set")


def compiler_version(compiler: list[str]) -> str:
    """What the compiler says of itself."""
    return _run([*compiler, "--version"])


def build(output: Path, compiler: list[str]) -> None:
    """Compile and link; `output` appears complete or not at all.

    Raises:
        BuildError: the compiler failed, or the directory cannot be written to.
    """
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="build-", dir=output.parent) as name:
            linked = _compile_and_link(Path(name), compiler)
            linked.replace(output)
    except OSError as error:
        raise BuildError(f"cannot write the kernel library to {output.parent}: {error}") from error


def _compile_and_link(directory: Path, compiler: list[str]) -> Path:
    objects = compile_sources(directory, compiler, machine=platform.machine())
    library = directory / "library.so"
    _run([*compiler, "-shared", "-pthread", "-o", str(library), *map(str, objects)])
    return library


def compile_sources(directory: Path, compiler: list[str], *, machine: str, flags: tuple[str, ...] = ()) -> list[Path]:
    """Compile every source into `directory`, for each level that `machine` has (as `platform.machine` names it).

    Args:
        compiler: makes code for that machine; may be a cross compiler.
        flags: more flags, after the usual ones.

    Returns:
        The objects: NAME.o, and NAME-LEVEL.o of those that are compiled once a level.

    Raises:
        BuildError: the compiler failed.
    """
    defines = [f'-DEXL2_SOURCE_HASH="{source_hash()}"', *_level_define(machine)]
    jobs = [(name, directory / f"{name}.o", defines) for name in _COMMON_SOURCES]
    for level, level_flags in _levels(machine).items():
        options = [f"-DEXL2_LEVEL={level}", *level_flags]
        jobs += [(name, directory / f"{name}-{level}.o", options) for name in _LEVEL_SOURCES]

    def compile_one(job: tuple[str, Path, list[str]]) -> Path:
        name, target, options = job
        source = SOURCE_DIR / "cpu" / f"{name}.cpp"
        _run([*compiler, *_FLAGS, *options, *flags, "-c", str(source), "-o", str(target)])
        return target

    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        return list(pool.map(compile_one, jobs))


def _run(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    except OSError as error:
        raise BuildError(f"{command[0]} cannot be run: {error}") from error
    if done.returncode != 0:
        said = (done.stderr.strip() or done.stdout.strip() or "(it said nothing)")[-4000:]
        raise BuildError(f"the compiler failed with status {done.returncode}: {shlex.join(command)}\n{said}")
    return done.stdout


def main(arguments: list[str]) -> int:
    """Build for a wheel. With --tolerate-failure the wheel is made without the library."""
    tolerate = "--tolerate-failure" in arguments
    outputs = [argument for argument in arguments if argument != "--tolerate-failure"]
    if len(outputs) != 1:
        print(__doc__, file=sys.stderr)
        return 2
    try:
        build(Path(outputs[0]), find_compiler())
    except BuildError as error:
        print(f"exl2-rag: native kernels are left out: {error}", file=sys.stderr)
        return 0 if tolerate else 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
