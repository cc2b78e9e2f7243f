"""Time to the first token of a long prompt: cold, from the KV cache, and from disk after a restart.

    python benchmarks/kv_store.py [--model DIR] [--prefix-tokens N] [--store DIR]

Without a model a random EXL2 model of 8 layers of width 512 is made. One engine computes a prefix and closes; a second
one, over the same store, is asked about it after the system was told to drop the segments from its page cache. Every
text is compared with what an engine without a store gives. Prints one JSON object; the target is a first token after
a restart in at most 20 % of the cold time.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import tempfile
import time
from pathlib import Path

from exl2_rag import ExL2LLM, SamplingParams

sys.path.insert(0, str(Path(__file__).parent.parent))
from benchmarks.prefix_reuse import QUESTION_TOKENS, random_model, token_ids

SAMPLING = SamplingParams(max_tokens=8, temperature=0, ignore_eos=True)


def drop_from_page_cache(directory: Path) -> None:
    for path in directory.rglob("*.kvs"):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measure(model: Path, store: Path, prefix_tokens: int, threads: int | None) -> dict[str, object]:
    rng = random.Random(1)
    prefix = token_ids(prefix_tokens, rng)
    first, second = ([*prefix, *token_ids(QUESTION_TOKENS, rng)] for _ in range(2))
    sizes = {"cache_tokens": 2 * prefix_tokens, "num_threads": threads}

    started = time.perf_counter()
    with ExL2LLM(model, kv_store=store, **sizes) as llm:
        first_start_s = time.perf_counter() - started
        llm.generate(token_ids(64, rng), SAMPLING)  # loads what is loaded at first use
        cold = llm.generate(first, SAMPLING)
        warm = llm.generate(second, SAMPLING)  # the second use, so the prefix goes to disk
        started = time.perf_counter()
    close_s = time.perf_counter() - started
    drop_from_page_cache(store)

    started = time.perf_counter()
    with ExL2LLM(model, kv_store=store, **sizes) as llm:
        second_start_s = time.perf_counter() - started
        llm.generate(token_ids(64, rng), SAMPLING)
        restarted = llm.generate(second, SAMPLING)
        tiers = llm.cache_report().tiers
        name, config = llm.model_name, llm.engine_config
    assert tiers is not None
    assert tiers.store is not None
    if restarted.token_ids != warm.token_ids:
        raise SystemExit(f"another text after the restart: {restarted.token_ids} instead of {warm.token_ids}")
    cold_ms, warm_ms, restarted_ms = (one.timings.first_token_s * 1000 for one in (cold, warm, restarted))
    return {
        "model": name,
        "prefix_tokens": prefix_tokens,
        "question_tokens": QUESTION_TOKENS,
        "cache_dtype": config.cache_dtype,
        "page_size": config.page_size,
        "cold_ms": round(cold_ms, 1),
        "from_cache_ms": round(warm_ms, 1),
        "after_restart_ms": round(restarted_ms, 1),
        "after_restart_share": round(restarted_ms / cold_ms, 4),
        "target_share": 0.2,
        "cached_tokens_after_restart": restarted.usage.cached_tokens,
        "tokens_from_disk": tiers.disk_tokens,
        "bytes_from_disk": tiers.store.read_bytes,
        "load_ms": round(tiers.load_s * 1000, 1),
        "load_bytes_per_s": round(tiers.store.read_bytes / tiers.load_s) if tiers.load_s else None,
        "damaged_pages": tiers.store.damaged_pages,
        "closing_ms": round(close_s * 1000, 1),
        "first_start_s": round(first_start_s, 2),
        "second_start_s": round(second_start_s, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--prefix-tokens", type=int, default=4096)
    parser.add_argument("--store", type=Path, help="an empty directory on the disk to be measured")
    parser.add_argument("--threads", type=int)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.store) as directory:
        model = options.model or random_model(Path(directory))
        result = measure(model, Path(directory) / "store", options.prefix_tokens, options.threads)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
