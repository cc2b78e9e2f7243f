"""What the size of a cache page costs and saves on prompts about documents.

    python benchmarks/page_size.py [--model DIR] [--questions N]

The load: a system text, three of twelve document chunks of uneven length in canonical order, a question; all questions
at once, then the same again with other questions. Prints one JSON object: for each page size the seconds of both
rounds, the share of prompt tokens from the cache, and the most tokens' worth of pages held at a time, which shows what
partly filled pages waste. Reuse is exact to the token, so the share hardly depends on the size; the rest does.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import threading
import time
from pathlib import Path

from exl2_rag import ExL2LLM, SamplingParams

sys.path.insert(0, str(Path(__file__).parent.parent))
from benchmarks.prefix_reuse import random_model, token_ids

PAGE_SIZES = (16, 32, 64, 128, 256)
SAMPLING = SamplingParams(max_tokens=24, temperature=0, ignore_eos=True)


def make_prompts(n_questions: int, rng: random.Random) -> list[list[int]]:
    system = token_ids(90, rng)
    chunks = [token_ids(rng.randrange(60, 200), rng) for _ in range(12)]
    prompts = []
    for _ in range(n_questions):
        # Some chunks are asked about more than others.
        picked = sorted({min(int(rng.expovariate(0.4)), 11) for _ in range(3)})
        prompts.append([*system, *(token for n in picked for token in chunks[n]), *token_ids(15, rng)])
    return prompts


def measure(model_dir: Path, page_size: int, n_questions: int) -> dict[str, float]:
    rng = random.Random(1)
    prompts = make_prompts(2 * n_questions, rng)
    most_held = 0
    done = threading.Event()
    with ExL2LLM(model_dir, page_size=page_size, cache_tokens=65_536) as llm:
        llm.generate(token_ids(64, rng), SAMPLING)

        def watch() -> None:
            nonlocal most_held
            while not done.wait(0.02):
                most_held = max(most_held, llm.cache_report().running_pages * page_size)

        watcher = threading.Thread(target=watch)
        watcher.start()
        started = time.perf_counter()
        first = llm.generate(prompts[:n_questions], SAMPLING)
        middle = time.perf_counter()
        second = llm.generate(prompts[n_questions:], SAMPLING)
        ended = time.perf_counter()
        done.set()
        watcher.join()
    results = [*first, *second]
    cached = sum(one.usage.cached_tokens for one in results)
    return {
        "page_size": page_size,
        "first_round_s": round(middle - started, 3),
        "second_round_s": round(ended - middle, 3),
        "cached_share": round(cached / sum(one.usage.prompt_tokens for one in results), 4),
        "most_tokens_held": most_held,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--questions", type=int, default=24)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        model_dir = options.model or random_model(Path(directory))
        # In turn, so that a busy machine slows all alike; the fastest round of each counts.
        rounds = [[measure(model_dir, size, options.questions) for size in PAGE_SIZES] for _ in range(options.repeats)]
    best = [
        {
            **of_size[0],
            "first_round_s": min(one["first_round_s"] for one in of_size),
            "second_round_s": min(one["second_round_s"] for one in of_size),
        }
        for of_size in zip(*rounds, strict=True)
    ]
    print(json.dumps({"questions": options.questions, "sizes": best}))


if __name__ == "__main__":
    main()
