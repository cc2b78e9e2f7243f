"""Checks the CUDA side on a machine with a card, from the source tree: `make gpu-check PYTHON=python3`.

    python tools/gpu_check.py [--skip-sanitizer] [--skip-benchmark] [--quick]

In this order, each reported at the end with its time:

    build       every module for this card, by NVRTC; the next steps need the cubins
    tests       the kernel tests and the engine on the card            needs pytest
    memcheck    compute-sanitizer over some of them: bad addresses     needs pytest and compute-sanitizer
    racecheck   the same for races in shared memory                    needs pytest and compute-sanitizer
    benchmark   benchmarks/gpu.py; its JSON goes to benchmarks/results

Uses the interpreter it is run with: torch for CUDA, numpy, filelock and cuda-core; no installation, no network. Exit
codes: 0 all passed, 1 something failed, 2 something could not be run (what, and what it needs, is said), 3 no card
that kernels can run on.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]

PASSED, FAILED, NOT_RUN = "passed", "FAILED", "NOT RUN"
NEEDED = ("torch", "numpy", "filelock", "cuda.core")
KERNEL_TESTS = "tests/llm/kernels/cuda"
ENGINE_TESTS = "tests/llm/test_on_card.py"


@dataclass
class Outcome:
    """How one step went."""

    name: str
    state: str
    detail: str = ""
    seconds: float = 0.0


def missing_packages() -> list[str]:
    """Which of the packages that everything needs are absent."""

    def is_missing(name: str) -> bool:
        try:
            return importlib.util.find_spec(name) is None
        except ModuleNotFoundError:
            return True

    return [name for name in NEEDED if is_missing(name)]


def run(name: str, command: list[str], timeout_s: int, environment: dict[str, str] | None = None) -> Outcome:
    """Run a step; its output goes where ours does."""
    print(f"\n== {name}: {' '.join(command)}", flush=True)
    start = time.perf_counter()
    try:
        done = subprocess.run(command, cwd=ROOT, env=os.environ | (environment or {}), timeout=timeout_s, check=False)
    except subprocess.TimeoutExpired:
        return Outcome(name, FAILED, f"took more than {timeout_s} s", time.perf_counter() - start)
    state = PASSED if done.returncode == 0 else FAILED
    return Outcome(name, state, "" if state == PASSED else f"exit code {done.returncode}", time.perf_counter() - start)


def pytest_command(*arguments: str) -> list[str]:
    """pytest without the project's settings, which name plugins that this machine may not have."""
    options = ["-q", "-c", str(ROOT / "tools" / "gpu_pytest.ini"), "--rootdir", str(ROOT), "-p", "no:cacheprovider"]
    return [sys.executable, "-m", "pytest", *options, *arguments]


def build() -> Outcome:
    """Compile every module for the card in parallel."""
    from exl2_rag.llm.kernels import cuda_compiler, cuda_runtime

    start = time.perf_counter()
    arch = cuda_runtime.open_card(0).arch
    print(f"\n== build: every module for sm_{arch}", flush=True)
    results = cuda_compiler.build_all([arch], jobs=os.cpu_count() or 1)
    errors = [f"{result.module}: {result.error}" for result in results if result.error is not None]
    for error in errors:
        print(error)
    detail = f"{len(errors)} of {len(results)} modules do not compile" if errors else f"{len(results)} modules"
    return Outcome("build", FAILED if errors else PASSED, detail, time.perf_counter() - start)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description="Check the CUDA side on a card.")
    parser.add_argument("--skip-tests", action="store_true")
    parser.add_argument("--skip-sanitizer", action="store_true")
    parser.add_argument("--skip-benchmark", action="store_true")
    parser.add_argument("--quick", action="store_true", help="a short benchmark")
    options = parser.parse_args(arguments)

    missing = missing_packages()
    if missing:
        print(f"gpu-check needs {', '.join(missing)} for {sys.executable}; install them, or name another PYTHON")
        return 2
    from exl2_rag.errors import Exl2RagError
    from exl2_rag.llm.kernels import cuda_runtime

    try:
        card = cuda_runtime.open_card(0).card
    except Exl2RagError as error:
        print(f"gpu-check: {error}")
        return 3
    print(f"{card.name}, sm_{card.arch}, {card.multiprocessors} multiprocessors")

    outcomes = [build()]
    has_pytest = importlib.util.find_spec("pytest") is not None
    if not options.skip_tests:
        if has_pytest:
            outcomes.append(run("tests", pytest_command("-m", "gpu", KERNEL_TESTS, ENGINE_TESTS), 900))
        else:
            outcomes.append(Outcome("tests", NOT_RUN, "needs pytest"))
    if not options.skip_sanitizer:
        outcomes += [sanitize(tool, has_pytest=has_pytest) for tool in ("memcheck", "racecheck")]
    if not options.skip_benchmark:
        output = ROOT / "benchmarks" / "results" / f"gpu_sm_{card.arch}.json"
        command = [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), "--output", str(output)]
        outcomes.append(run("benchmark", command + ["--quick"] * options.quick, 1500))

    print(f"\n{card.name}, {datetime.now(UTC).date().isoformat()}")
    for one in outcomes:
        print(f"  {one.name:<10} {one.state:<8} {one.seconds:6.0f} s  {one.detail}")
    states = {one.state for one in outcomes}
    return 1 if FAILED in states else 2 if NOT_RUN in states else 0


def sanitize(tool: str, *, has_pytest: bool) -> Outcome:
    """A share of the kernel tests under compute-sanitizer."""
    program = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    if program is None or not has_pytest:
        return Outcome(tool, NOT_RUN, "needs pytest" if program else "needs compute-sanitizer, of the CUDA toolkit")
    options = ["--tool", tool, "--error-exitcode", "9", "--print-limit", "20", "--target-processes", "all"]
    # torch's own allocator hides what lies beyond a tensor; without its cache each has memory of its own.
    # Under the tool a test takes many times as long, so each runs its first and last case only.
    environment = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "EXL2_RAG_TEST_CASES": "few"}
    return run(tool, [program, *options, *pytest_command("-m", "gpu", "-x", KERNEL_TESTS)], 600, environment)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
