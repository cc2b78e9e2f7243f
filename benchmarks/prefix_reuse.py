"""A long shared prefix: time to the first token cold and cached, and pages held when many requests share it.

    python benchmarks/prefix_reuse.py [--model DIR] [--prefix-tokens N] [--runs N] [--sharing N]

Without a model a random EXL2 model of 8 layers of width 512 is made. Every cold run has a prefix of its own; its warm
partner has the same prefix and another question. With `--sharing N`, N requests of one prefix then run at once, and
after each step it is counted how many pages running requests hold. Prints one JSON object with medians. The targets:
warm <= 5 % of cold; pages held <= those of the prefix, and for each request those of its own tokens and one more page.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
import statistics
import sys
import tempfile
import threading
from pathlib import Path

from exl2_rag import ExL2LLM, SamplingParams

sys.path.insert(0, str(Path(__file__).parent.parent))
from tests.support.synthetic import make_model_dir

QUESTION_TOKENS = 20
NEW_TOKENS = 4
SHARING_NEW_TOKENS = 32  # enough that all of them run at once for a while
SAMPLING = SamplingParams(max_tokens=NEW_TOKENS, temperature=0, ignore_eos=True)


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
    report = llm.cache_report()
    return {
        "model": llm.model_name,
        "prefix_tokens": prefix_tokens,
        "question_tokens": QUESTION_TOKENS,
        "cold_ms": round(cold_ms, 2),
        "warm_ms": round(warm_ms, 2),
        "warm_share": round(warm_ms / cold_ms, 4),
        "target_share": 0.05,
        "prefix_tokens_computed_again": missed,
        "cold_prefill_tokens_per_s": round((prefix_tokens + QUESTION_TOKENS) / cold_ms * 1000),
        "page_size": llm.engine_config.page_size,
        "hit_rate": round(report.hit_rate, 4),
        "prefill_saved_s": None if report.prefill_saved_s is None else round(report.prefill_saved_s, 1),
    }


def share(llm: ExL2LLM, prefix_tokens: int, count: int) -> dict[str, object]:
    """Pages held while `count` requests of one prefix run at once."""
    rng = random.Random(2)
    prefix = token_ids(prefix_tokens, rng)
    llm.warm(prefix)
    prompts = [[*prefix, *token_ids(QUESTION_TOKENS, rng)] for _ in range(count)]
    held, running = [0], [0]
    done = threading.Event()

    def watch() -> None:
        while not done.is_set():
            report = llm.cache_report()  # between two steps
            held.append(report.running_pages)
            running.append(report.running_requests)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        results = llm.generate(prompts, dataclasses.replace(SAMPLING, max_tokens=SHARING_NEW_TOKENS))
    finally:
        done.set()
        watcher.join()
    size = llm.engine_config.page_size
    own = QUESTION_TOKENS + SHARING_NEW_TOKENS
    return {
        "requests": count,
        "running_at_once": max(running),
        "pages_held": max(held),
        "pages_allowed": -(-prefix_tokens // size) + count * -(-(own + size) // size),
        "pages_unshared": count * -(-(prefix_tokens + own) // size),
        "prefix_tokens_computed_again": sum(max(0, prefix_tokens - one.usage.cached_tokens) for one in results),
        "first_token_ms": round(statistics.median(one.timings.first_token_s for one in results) * 1000, 1),
        "total_s": round(max(one.timings.total_s for one in results), 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--prefix-tokens", type=int, default=2000)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--sharing", type=int, default=0, help="requests that share a prefix at once")
    options = parser.parse_args()
    sizes = {}
    if options.sharing:
        per_request = QUESTION_TOKENS + SHARING_NEW_TOKENS + 64
        sizes["max_batch_size"] = options.sharing
        sizes["cache_tokens"] = (options.runs + 2) * (options.prefix_tokens + 64) + options.sharing * per_request
    with (
        tempfile.TemporaryDirectory() as directory,
        ExL2LLM(options.model or random_model(Path(directory)), **sizes) as llm,
    ):
        result = measure(llm, options.prefix_tokens, options.runs)
        if options.sharing:
            result["sharing"] = share(llm, options.prefix_tokens, options.sharing)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
