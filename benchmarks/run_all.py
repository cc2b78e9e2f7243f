"""Run every CPU benchmark and keep the results.

    python benchmarks/run_all.py [NAME ...]

Each benchmark prints one JSON object as its last line; it is kept in `benchmarks/results/NAME.json` with the commit,
the processor and the command. A benchmark that fails is reported and the others go on.
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
BENCHMARKS: dict[str, list[str]] = {
    "import_time": [],
    "kernels_cpu": [],
    "page_size": [],
    "prefix_reuse": [],
    "retrieval": [],
    "ingest": [],
    "answers": ["--json"],
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
    command = [sys.executable, str(HERE / f"{name}.py"), *arguments]
    print(f"== {name}", flush=True)
    done = subprocess.run(command, check=False, stdout=subprocess.PIPE, text=True)
    lines = done.stdout.strip().splitlines()
    if done.returncode != 0 or not lines:
        print(f"{name} failed with exit code {done.returncode}", file=sys.stderr)
        return False
    commit = subprocess.run(["git", "rev-parse", "HEAD"], check=False, capture_output=True, text=True, cwd=HERE)
    record = {
        "benchmark": name,
        "command": " ".join(["python", f"benchmarks/{name}.py", *arguments]),
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
    failed = [name for name in names if not run(name, BENCHMARKS[name])]
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
