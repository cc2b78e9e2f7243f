"""100,000 random operations on page tables, everything checked after each; a fault ends it.

    python benchmarks/page_table_operations.py [--operations N] [--seed N]

Nine tenths on tables of 24 pages of 4 tokens, where pages are always scarce, the rest on tables of 120 pages of 16.
Prints one JSON object: how often each thing happened, and seconds.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
from tests.support.page_table_operations import PageTableOperations

PER_TABLE = 10_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--operations", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    started = time.perf_counter()
    counts: Counter[str] = Counter()
    left = options.operations
    number = 0
    while left:
        n_operations = min(left, PER_TABLE)
        sizes = {"n_pages": 24, "page_size": 4, "longest": 44, "most": 5}
        if number % 10 == 9:
            sizes = {"n_pages": 120, "page_size": 16, "longest": 500, "most": 8}
        operations = PageTableOperations(options.seed * 1000 + number, **sizes)
        operations.run(n_operations)
        operations.finish()
        counts.update(operations.counts)
        counts["evicted"] += operations.memory.table.n_evicted
        left -= n_operations
        number += 1
    seconds = round(time.perf_counter() - started, 1)
    print(json.dumps({"operations": options.operations, "seconds": seconds, "faults": 0, "counts": dict(counts)}))


if __name__ == "__main__":
    main()
