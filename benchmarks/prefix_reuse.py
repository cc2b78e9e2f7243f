"""Time to the first token of a prompt with a long shared prefix: cold, and when the prefix is cached.

    python benchmarks/prefix_reuse.py [--model DIR] [--prefix-tokens N] [--runs N]

Without a model a random EXL2 model of 8 layers of width 512 is made. Every cold run has a prefix of its own; its warm
partner has the same prefix and another question. Prints one JSON object with medians; the target is warm <= 10 % of
cold.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import tempfile
from pathlib import Path

from exl2_rag import ExL2LLM, SamplingParams

sys.path.insert(0, str(Path(__file__).parent.parent))
from tests.support.synthetic import make_model_dir

QUESTION_TOKENS = 20
SAMPLING = SamplingParams(max_tokens=4, temperature=0, ignore_eos=True)


def random_model(directory: Path) -> Path:
    return make_model_dir(
        directory / "random-exl2",
        quantised=True,
        hidden=512,
        intermediate=1536,
        layers=8,
        heads=8,
        kv_heads=4,
        max_position=8192,
    )


def token_ids(count: int, rng: random.Random) -> list[int]:
    return [rng.randrange(32, 127) for _ in range(count)]


def measure(llm: ExL2LLM, prefix_tokens: int, runs: int) -> dict[str, object]:
    rng = random.Random(1)
    cold_s, warm_s, missed = [], [], 0
    llm.generate(token_ids(64, rng), SAMPLING)  # loads what is loaded at first use
    for _ in range(runs):
        prefix = token_ids(prefix_tokens, rng)
        cold = llm.generate([*prefix, *token_ids(QUESTION_TOKENS, rng)], SAMPLING)
        warm = llm.generate([*prefix, *token_ids(QUESTION_TOKENS, rng)], SAMPLING)
        cold_s.append(cold.timings.first_token_s)
        warm_s.append(warm.timings.first_token_s)
        # A question may happen to begin like the one before, which is cached as well.
        missed += max(0, prefix_tokens - warm.usage.cached_tokens)
    cold_ms, warm_ms = statistics.median(cold_s) * 1000, statistics.median(warm_s) * 1000
    return {
        "model": llm.model_name,
        "prefix_tokens": prefix_tokens,
        "question_tokens": QUESTION_TOKENS,
        "cold_ms": round(cold_ms, 2),
        "warm_ms": round(warm_ms, 2),
        "warm_share": round(warm_ms / cold_ms, 4),
        "target_share": 0.1,
        "prefix_tokens_computed_again": missed,
        "cold_prefill_tokens_per_s": round((prefix_tokens + QUESTION_TOKENS) / cold_ms * 1000),
        "page_size": llm.engine_config.page_size,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--prefix-tokens", type=int, default=2000)
    parser.add_argument("--runs", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory, ExL2LLM(options.model or random_model(Path(directory))) as llm:
        result = measure(llm, options.prefix_tokens, options.runs)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
