"""How long `import exl2_rag` takes, beside an empty interpreter, in the same run.

    python benchmarks/import_time.py

Prints one JSON object with medians in milliseconds. The target is 300 ms.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time

RUNS = 11


def seconds(code: str) -> float:
    """Wall-clock seconds of one fresh interpreter that runs `code`."""
    started = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], check=True)
    return time.perf_counter() - started


def main() -> None:
    empty, imported = [], []
    for _ in range(RUNS):  # in turn, so that a busy machine slows both alike
        empty.append(seconds("pass"))
        imported.append(seconds("import exl2_rag"))
    result = {
        "interpreter_ms": round(statistics.median(empty) * 1000, 1),
        "interpreter_and_import_ms": round(statistics.median(imported) * 1000, 1),
        "import_ms": round(statistics.median(b - a for a, b in zip(empty, imported, strict=True)) * 1000, 1),
        "target_ms": 300,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
