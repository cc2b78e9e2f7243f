"""Run every CPU benchmark and keep the results.

    python benchmarks/run_all.py [NAME ...]

Each benchmark prints one JSON object as its last line; it is kept in `benchmarks/results/NAME.json` with the commit,
the processor and the command. A benchmark that fails is reported and the others go on. `llama_cpp` needs the peer's
interpreter in LLAMA_CPP_PYTHON (see `peers/llama_cpp.py`); without it, it is left out, and that is said.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
RESULTS = HERE / "results"
PEER = "LLAMA_CPP_PYTHON"
BENCH = ["-m", "exl2_rag.cli.main", "bench", "--shape", "llama-1.1b", "--device", "cpu", "--json"]
# What Python is given for each, from the root of the repository.
BENCHMARKS: dict[str, list[str]] = {
    "import_time": ["benchmarks/import_time.py"],
    "kernels_cpu": ["benchmarks/kernels_cpu.py"],
    "bench_4.5bpw": [*BENCH, "--bpw", "4.5"],
    "bench_2.5bpw": [*BENCH, "--bpw", "2.5"],
    "llama_cpp": ["benchmarks/peers/llama_cpp.py", "--peer-python", f"${PEER}"],
    "inter_token_gap": ["benchmarks/inter_token_gap.py"],
    "page_size": ["benchmarks/page_size.py"],
    "prefix_reuse": ["benchmarks/prefix_reuse.py", "--sharing", "64"],
    "kv_store": ["benchmarks/kv_store.py"],
    "page_table_operations": ["benchmarks/page_table_operations.py"],
    "canonical_order": ["benchmarks/canonical_order.py"],
    "retrieval": ["benchmarks/retrieval.py"],
    "ingest": ["benchmarks/ingest.py"],
    "answers": ["benchmarks/answers.py", "--json"],
}


def processor() -> str:
    """The processor's name as the system gives it."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def run(name: str, arguments: list[str]) -> bool:
    """Run one benchmark and write its result; False if it failed."""
    command = [sys.executable, *(os.environ[PEER] if one == f"${PEER}" else one for one in arguments)]
    print(f"== {name}", flush=True)
    done = subprocess.run(command, check=False, stdout=subprocess.PIPE, text=True, cwd=HERE.parent)
    lines = done.stdout.strip().splitlines()
    if done.returncode != 0 or not lines:
        print(f"{name} failed with exit code {done.returncode}", file=sys.stderr)
        return False
    commit = subprocess.run(["git", "rev-parse", "HEAD"], check=False, capture_output=True, text=True, cwd=HERE)
    record = {
        "benchmark": name,
        "command": " ".join(["python", *arguments]),
        "commit": commit.stdout.strip(),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "processor": processor(),
        "cores": os.cpu_count(),
        "result": json.loads(lines[-1]),
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(lines[-1])
    return True


def main() -> int:
    """Run what was named, or everything; 1 if anything failed."""
    names = sys.argv[1:] or list(BENCHMARKS)
    if unknown := [name for name in names if name not in BENCHMARKS]:
        print(f"no benchmark is called {', '.join(unknown)}; there are: {', '.join(BENCHMARKS)}", file=sys.stderr)
        return 2
    if PEER not in os.environ and "llama_cpp" in names:
        print(f"llama_cpp is left out: {PEER} does not name the peer's interpreter", file=sys.stderr)
        names = [name for name in names if name != "llama_cpp"]
    failed = [name for name in names if not run(name, BENCHMARKS[name])]
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
