"""Times of the CPU ops, and for those bound by memory the bytes a second beside what a plain copy moves.

    python benchmarks/kernels_cpu.py [--threads N] [--reference]

Weights are taken in turn from a set larger than common caches, as in a real decode step. Prints a table to stderr and
one JSON object as the last line. `--reference` times the torch reference instead, on smaller matrices.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from collections.abc import Callable

import torch

from exl2_rag.llm.checkpoint import pack
from exl2_rag.llm.kernels import native, ops, reference

IN, OUT = 2048, 5632  # the MLP of a 1.1B Llama
SET_BYTES = 128 << 20
REPEATS = 15
PROMPT = 256


def best_seconds(function: Callable[[], object], repeats: int = REPEATS) -> float:
    """The shortest of several runs: what the machine can do while nothing else disturbs it."""
    function()
    best = float("inf")
    for _ in range(repeats):
        started = time.perf_counter()
        function()
        best = min(best, time.perf_counter() - started)
    return best


def copy_bytes_per_second() -> float:
    """Bytes read and written a second by a copy that no cache holds."""
    source = torch.ones(SET_BYTES // 4)
    target = torch.empty_like(source)
    return 2 * SET_BYTES / best_seconds(lambda: target.copy_(source))


def exl2_matrix(bits: int, in_features: int, out_features: int) -> ops.Exl2Weights:
    rows = 128 if bits >= 4 else 64
    groups = [(bits, rows)] * (in_features // rows)
    codes = torch.randint(0, 1 << bits, (in_features, out_features))
    scales = torch.randint(1, 17, (len(groups), out_features))
    parts = pack(codes, scales, torch.full((len(groups),), 0.01), groups, torch.randperm(in_features))
    return ops.exl2_prepare(**parts)


def attention_seconds(rows: int, context: int) -> float:
    heads, kv_heads, dim, page_size = 32, 4, 64, 64
    n_pages = -(-context // page_size)
    pages = torch.randn(n_pages, page_size, kv_heads, dim).to(torch.float16)
    table = torch.arange(n_pages, dtype=torch.int32)[None]
    starts, lens = torch.tensor([0, rows], dtype=torch.int32), torch.tensor([context], dtype=torch.int32)
    q = torch.randn(rows, heads, dim)
    batch, scoring = ops.PagedBatch(table, starts, lens), ops.Scoring(0.125)
    return best_seconds(lambda: ops.paged_attention(q, pages, pages, batch, scoring), repeats=7)


def native_results(copied: float) -> dict[str, dict[str, float]]:
    results: dict[str, dict[str, float]] = {}
    one, prompt = torch.randn(1, IN), torch.randn(PROMPT, IN)
    for bits in (2, 3, 4, 5, 6, 8):
        first = exl2_matrix(bits, IN, OUT)
        count = max(2, SET_BYTES // first.nbytes)
        turns = itertools.cycle(
            [first, *(ops.Exl2Weights(**{**_fields(first), "codes": first.codes.clone()}) for _ in range(count - 1))]
        )
        seconds = best_seconds(lambda turns=turns: ops.exl2_matmul(one, next(turns)), repeats=3 * REPEATS)
        many = best_seconds(lambda first=first: ops.exl2_matmul(prompt, first), repeats=3)
        results[f"exl2_matmul {bits} bits"] = {
            "one_row_us": seconds * 1e6,
            "gb_per_s": first.nbytes / seconds / 1e9,
            "of_copy": first.nbytes / seconds / copied,
            f"rows_{PROMPT}_ms": many * 1e3,
            "gmac_per_s": PROMPT * IN * OUT / many / 1e9,
        }
    weight = torch.randn(OUT, IN).to(torch.float16)
    halves = itertools.cycle([weight, *(weight.clone() for _ in range(SET_BYTES // weight.nbytes))])
    seconds = best_seconds(lambda: ops.dense_matmul(one, next(halves)))
    results["dense_matmul float16"] = {
        "one_row_us": seconds * 1e6,
        "gb_per_s": weight.nbytes / seconds / 1e9,
        "of_copy": weight.nbytes / seconds / copied,
    }
    for rows, context in ((1, 2048), (PROMPT, PROMPT)):
        seconds = attention_seconds(rows, context)
        results[f"paged_attention {rows} of {context}"] = {"us": seconds * 1e6}
    norm = torch.ones(IN)
    results["rms_norm"] = {"one_row_us": best_seconds(lambda: ops.rms_norm(one, norm, 1e-5), 200) * 1e6}
    wide = torch.randn(1, OUT)
    results["silu_mul"] = {"one_row_us": best_seconds(lambda: ops.silu_mul(wide, wide), 200) * 1e6}
    return results


def _fields(weights: ops.Exl2Weights) -> dict[str, object]:
    return {name: getattr(weights, name) for name in weights.__slots__}


def reference_results() -> dict[str, dict[str, float]]:
    weights, x = exl2_matrix(4, 512, 512), torch.randn(1, 512)
    seconds = best_seconds(lambda: reference.exl2_matmul(x, weights))
    return {"exl2_matmul 4 bits 512 x 512": {"one_row_us": seconds * 1e6}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=native.default_num_threads())
    parser.add_argument("--reference", action="store_true")
    arguments = parser.parse_args()
    ops.set_num_threads(arguments.threads)
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    copied = copy_bytes_per_second()
    use_reference = arguments.reference or not ops.native_available()
    results = reference_results() if use_reference else native_results(copied)
    for name, numbers in results.items():
        print(f"{name:28}", *(f"{key} {value:.4g}" for key, value in numbers.items()), sep="  ", file=sys.stderr)
    print(
        json.dumps(
            {
                "level": "reference" if use_reference else native.cpu_level(),
                "threads": arguments.threads,
                "copy_gb_per_s": round(copied / 1e9, 1),
                "matrix": [IN, OUT],
                "ops": {name: {k: round(v, 3) for k, v in numbers.items()} for name, numbers in results.items()},
            }
        )
    )


if __name__ == "__main__":
    main()
