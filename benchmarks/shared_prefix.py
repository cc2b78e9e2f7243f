"""What it is worth to read the pages of a shared document once a step: in the attention op, and in the whole engine.

    python benchmarks/shared_prefix.py op [--threads N]
    python benchmarks/shared_prefix.py engine [--model DIR] [--questions N] [--document-tokens N] [--new-tokens N]

`op`: 32 sequences that share 4,096 tokens, 32 query and 8 key heads of 128, every kind of page; the same pages with and
without groups, in turn. `engine`: questions about one document, answered together, on random weights of the llama-1.1b
shape unless a model is given; in turn with and without groups. Each prints one JSON object as its last line.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from exl2_rag import ExL2LLM, SamplingParams
from exl2_rag.cli.bench import default_cache_dir, synthetic_model
from exl2_rag.llm import model_runner
from exl2_rag.llm.kernels import kv_format, native, ops, weight_memory
from exl2_rag.llm.kernels.kv_format import QuantisedPages
from exl2_rag.llm.kernels.paged_batch import Pages

SEQUENCES, CONTEXT, HEADS, KV_HEADS, HEAD_DIM, PAGE_SIZE = 32, 4096, 32, 8, 128, 32
CACHE_DTYPES = ("fp16", "q8", "q6", "q4")


def stored(vectors: Tensor, cache_dtype: str) -> Pages:
    """Pages [P, PS, KH, D] in the memory that the engine's cache has."""
    if cache_dtype == "fp16":
        pages = weight_memory.zeros(tuple(vectors.shape), torch.float16)
        return pages.copy_(vectors)
    bits = int(cache_dtype[1:])
    codes, scales = kv_format.quantise(vectors, bits)
    quantised = QuantisedPages.zeros(*vectors.shape, bits=bits, device=vectors.device)
    quantised.codes.copy_(kv_format.pack_codes(codes, bits))
    quantised.scales.copy_(scales)
    return quantised


def medians(functions: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Milliseconds of each, in turn, so that a busy moment meets all of them."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for number in range(repeats + 1):
        for name, function in functions.items():
            started = time.perf_counter()
            function()
            if number:  # the first round fetches code and pages
                times[name].append(1000 * (time.perf_counter() - started))
    return {name: round(statistics.median(one), 2) for name, one in times.items()}


def measure_op(cache_dtype: str, repeats: int) -> dict[str, object]:
    """The op over one document and a page of each sequence's own."""
    rng = torch.Generator().manual_seed(0)
    shared = CONTEXT // PAGE_SIZE
    shape = (shared + SEQUENCES, PAGE_SIZE, KV_HEADS, HEAD_DIM)
    keys, values = (stored(torch.randn(shape, generator=rng), cache_dtype) for _ in range(2))
    table = torch.arange(shared, dtype=torch.int32).repeat(SEQUENCES, 1)
    table = torch.cat((table, torch.arange(shared, shared + SEQUENCES, dtype=torch.int32)[:, None]), dim=1)
    apart = ops.PagedBatch(
        table,
        torch.arange(SEQUENCES + 1, dtype=torch.int32),
        torch.full((SEQUENCES,), CONTEXT + 1, dtype=torch.int32),
    )
    together = replace(
        apart,
        group_starts=torch.tensor([0, SEQUENCES], dtype=torch.int32),
        group_prefix_pages=torch.tensor([shared], dtype=torch.int32),
    )
    q, scoring = torch.randn((SEQUENCES, HEADS, HEAD_DIM), generator=rng), ops.Scoring(HEAD_DIM**-0.5)
    results = [ops.paged_attention(q, keys, values, batch, scoring) for batch in (apart, together)]
    found = medians(
        {
            "apart_ms": lambda: ops.paged_attention(q, keys, values, apart, scoring),
            "shared_ms": lambda: ops.paged_attention(q, keys, values, together, scoring),
        },
        repeats,
    )
    return {
        "cache_dtype": cache_dtype,
        **found,
        "ratio": round(found["apart_ms"] / found["shared_ms"], 2),
        "same_bits": torch.equal(*results),
    }


@contextmanager
def without_groups() -> Iterator[None]:
    """No sequences are many enough to share pages."""
    usual = model_runner.MIN_SHARED_TOKENS
    model_runner.MIN_SHARED_TOKENS = 1 << 40
    try:
        yield
    finally:
        model_runner.MIN_SHARED_TOKENS = usual


def measure_engine(
    llm: ExL2LLM, *, questions: int, document_tokens: int, new_tokens: int, runs: int
) -> dict[str, object]:
    """Tokens a second of all questions together while every one of them decodes."""
    rng = random.Random(0)
    document = [rng.randrange(3, 20000) for _ in range(document_tokens)]
    prompts = [[*document, *(rng.randrange(3, 20000) for _ in range(16))] for _ in range(questions)]
    sampling = SamplingParams(max_tokens=new_tokens, temperature=0, ignore_eos=True)
    llm.warm(document)
    rates: dict[str, list[float]] = {"apart": [], "shared": []}
    texts = []
    for _ in range(runs):
        for name, found in rates.items():
            if name == "apart":
                with without_groups():
                    results = llm.generate(prompts, sampling)
            else:
                results = llm.generate(prompts, sampling)
            texts.append([one.token_ids for one in results])
            # From the last first token on all of them decode.
            seconds = max(one.timings.total_s for one in results) - max(one.timings.first_token_s for one in results)
            found.append(questions * (new_tokens - 1) / seconds)
    apart, shared = (statistics.median(found) for found in rates.values())
    return {
        "model": llm.model_name,
        "cache_dtype": llm.engine_config.cache_dtype,
        "questions": questions,
        "document_tokens": document_tokens,
        "new_tokens": new_tokens,
        "apart_tok_s": round(apart, 1),
        "shared_tok_s": round(shared, 1),
        "ratio": round(shared / apart, 2),
        "runs": {name: [round(rate, 1) for rate in found] for name, found in rates.items()},
        "same_text": all(text == texts[0] for text in texts),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("op", "engine"))
    parser.add_argument("--threads", type=int, default=native.default_num_threads())
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--cache-dtypes", nargs="+", choices=CACHE_DTYPES)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--questions", type=int, default=32)
    parser.add_argument("--document-tokens", type=int, default=4096)
    parser.add_argument("--new-tokens", type=int, default=24)
    parser.add_argument("--runs", type=int, default=3)
    options = parser.parse_args()
    ops.set_num_threads(options.threads)
    result: dict[str, object] = {"level": native.cpu_level(), "threads": options.threads}
    if options.what == "op":
        shape = {"sequences": SEQUENCES, "context": CONTEXT, "heads": HEADS, "kv_heads": KV_HEADS, "head_dim": HEAD_DIM}
        found = [measure_op(one, options.repeats) for one in options.cache_dtypes or CACHE_DTYPES]
        print(json.dumps({**result, **shape, "op": found}))
        return
    model_dir = options.model or synthetic_model(default_cache_dir(), "llama-1.1b", 4.5)
    results = []
    for cache_dtype in options.cache_dtypes or ("fp16",):
        with ExL2LLM(
            model_dir,
            cache_tokens=options.document_tokens + options.questions * 96,
            cache_dtype=cache_dtype,
            max_batch_size=options.questions,
            max_seq_len=None if options.model else options.document_tokens + 256,
            num_threads=options.threads,
        ) as llm:
            results.append(
                measure_engine(
                    llm,
                    questions=options.questions,
                    document_tokens=options.document_tokens,
                    new_tokens=options.new_tokens,
                    runs=options.runs,
                )
            )
    print(json.dumps({**result, "engine": results}))


if __name__ == "__main__":
    sys.exit(main())
