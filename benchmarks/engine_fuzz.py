"""Runs random operations on an engine over the toy model and checks everything after each; see `tests/support`.

    python benchmarks/engine_fuzz.py [--operations N] [--seed N] [--output FILE]

The operations are shared out over engines of several sizes. Prints one JSON object with what happened; a fault is a
traceback that names the seed.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))
from tests.support.engine_fuzz import EngineFuzz

SIZES: dict[str, dict[str, Any]] = {
    "roomy": {"n_pages": 120, "max_batch_size": 12},
    "tight": {},
    "tiny cache": {"n_pages": 20},
    "tiny batch, strict priority": {"max_batch_size": 2, "max_overtakes": 0},
    "measured slices": {"max_inter_token_gap": 3.0, "max_batched_tokens": 40},
    "drafts": {"has_drafts": True},
    "drafts in a tiny cache": {"has_drafts": True, "n_pages": 20},
    "measured turns": {"max_inter_token_gap": 3.0, "prefill_in_turns": True},
}
OPERATIONS_A_RUN = 2500


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--operations", type=int, default=50_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    counts: Counter[str] = Counter()
    started, n_done, seed, preemptions, evicted = time.perf_counter(), 0, options.seed, 0, 0
    while n_done < options.operations:
        name = list(SIZES)[seed % len(SIZES)]
        n = min(OPERATIONS_A_RUN, options.operations - n_done)
        fuzz = EngineFuzz(seed, **SIZES[name])
        try:
            fuzz.run(n)
        except BaseException:
            print(f"seed {seed} ({name}) failed", file=sys.stderr)
            raise
        counts += fuzz.counts
        preemptions += fuzz.engine.report().preemptions
        evicted += fuzz.engine.report().evicted_pages
        n_done += n
        seed += 1
    result = {
        "operations": n_done,
        "engines": seed - options.seed,
        "counts": dict(counts.most_common()),
        "preemptions_since_last_reset": preemptions,
        "evicted_pages_since_last_reset": evicted,
        "seconds": round(time.perf_counter() - started, 1),
    }
    text = json.dumps(result, indent=1)
    print(text)
    if options.output is not None:
        options.output.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
