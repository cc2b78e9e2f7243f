"""What quantised pages lose and what they gain.

    python benchmarks/kv_quantisation.py error                              vectors by width, beside other formats
    python benchmarks/kv_quantisation.py text --text FILE [--model DIR]     perplexity, divergence from fp16
    python benchmarks/kv_quantisation.py decode [--context N]               tokens a second at a long context

`error`: relative error of keys and values with and without rotation and zero point. The format is in
exl2_rag/llm/kernels/kv_format.py; beside it stand what it could have been: no rotation, a symmetric grid whose ends are
the largest magnitude, and a zero point for each group, which costs half a bit a number. `text` takes plain text, also
packed (.xz), and the demo model unless told otherwise; `decode` random weights of a shape. Each ends with one JSON
object.
"""

from __future__ import annotations

import argparse
import json
import lzma
import random
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from exl2_rag import ExL2LLM, SamplingParams, demo
from exl2_rag.cli.bench import default_cache_dir, synthetic_model
from exl2_rag.llm.evaluation.corpus import EvaluationText
from exl2_rag.llm.evaluation.divergence import measure_divergence
from exl2_rag.llm.kernels import kv_format, native

VECTORS, HEAD_DIM = 4096, 128


def data() -> dict[str, Tensor]:
    """Vectors [VECTORS, HEAD_DIM] of several kinds."""
    rng = torch.Generator().manual_seed(0)
    normal = torch.randn(VECTORS, HEAD_DIM, generator=rng)
    outliers = torch.randn(VECTORS, HEAD_DIM, generator=rng)
    outliers[:, torch.randperm(HEAD_DIM, generator=rng)[:4]] *= 15
    scales = torch.randn(VECTORS, HEAD_DIM, generator=rng) * torch.randn(HEAD_DIM, generator=rng).exp()
    heavy = torch.randn(VECTORS, HEAD_DIM, generator=rng)
    heavy /= (torch.randn(VECTORS, HEAD_DIM, 3, generator=rng).square().mean(dim=-1)).sqrt()
    return {"normal": normal, "4 channels times 15": outliers, "channels of other scales": scales, "heavy tails": heavy}


def as_stored(x: Tensor, bits: int) -> Tensor:
    codes, scales = kv_format.quantise(x, bits)
    return kv_format.dequantise(codes, scales, bits).float()


def symmetric(x: Tensor, bits: int) -> Tensor:
    groups = x.reshape(len(x), -1, kv_format.QUANT_GROUP)
    ends = (1 << bits) - 1
    scales = (2 * groups.abs().amax(-1, keepdim=True) / ends).half().float()
    codes = (groups / scales + ends / 2).round().clamp(0, ends)
    return ((codes - ends / 2) * scales).reshape(x.shape)


def with_zero_point(x: Tensor, bits: int) -> Tensor:
    groups = x.reshape(len(x), -1, kv_format.QUANT_GROUP)
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    scales, low = ((high - low) / ((1 << bits) - 1)).half().float(), low.half().float()
    return (((groups - low) / scales).round().clamp(0, (1 << bits) - 1) * scales + low).reshape(x.shape)


def rotated(method: Callable[[Tensor, int], Tensor]) -> Callable[[Tensor, int], Tensor]:
    return lambda x, bits: kv_format.rotate(method(kv_format.rotate(x), bits))


METHODS = {
    "stored": (rotated(as_stored), 0.5),
    "without rotation": (as_stored, 0.5),
    "symmetric": (rotated(symmetric), 0.5),
    "zero point": (rotated(with_zero_point), 1.0),
}
"""Each method and the bits a number that it takes beside its codes."""


QUANTISED = ("q8", "q6", "q4")


def measure_error() -> dict[str, object]:
    """Relative errors of every method on every kind of vectors."""
    results = []
    for name, x in data().items():
        for bits in kv_format.CACHE_BITS:
            errors = {method: float((f(x, bits) - x).norm() / x.norm()) for method, (f, _) in METHODS.items()}
            results.append({"data": name, "bits": bits, "relative_error": errors})
    columns = "".join(f"{f'{name} +{extra}':>22}" for name, (_, extra) in METHODS.items())
    print(f"{'data':26}{'bits':>5}{columns}", file=sys.stderr)
    for row in results:
        errors = "".join(f"{error:>22.4f}" for error in row["relative_error"].values())
        print(f"{row['data']:26}{row['bits']:>5}{errors}", file=sys.stderr)
    return {"vectors": VECTORS, "head_dim": HEAD_DIM, "results": results}


def measure_text(model_dir: Path, path: Path, *, length: int, n_tokens: int) -> dict[str, object]:
    """Perplexity with each cache, and the divergence of its predictions from those with fp16."""
    packed = path.read_bytes()
    text = (lzma.decompress(packed) if path.suffix == ".xz" else packed).decode()
    results = []
    for cache_dtype in QUANTISED:
        with (
            ExL2LLM(model_dir, cache_dtype="fp16", cache_tokens=2 * length, max_batch_size=1) as reference,
            ExL2LLM(model_dir, cache_dtype=cache_dtype, cache_tokens=2 * length, max_batch_size=1) as llm,
        ):
            found = measure_divergence(reference, llm, [EvaluationText(path.name, text)], length=length, limit=n_tokens)
        results.append(
            {
                "cache_dtype": cache_dtype,
                "fp16_perplexity": round(found.perplexity, 4),
                "perplexity": round(found.other_perplexity, 4),
                "mean_kl": float(f"{found.mean_kl:.3g}"),
                "top1_agreement": round(found.top1_agreement, 4),
            }
        )
        print(results[-1], file=sys.stderr)
    return {"model": model_dir.name, "text": path.name, "length": length, "tokens": found.n_tokens, "results": results}


def measure_decode(model_dir: Path, *, context: int, n_new: int, repeats: int) -> dict[str, object]:
    """Decode speed of one sequence after `context` tokens, the caches in turn."""
    prompt = random.Random(0).choices(range(3, 20000), k=context)
    sampling = SamplingParams(max_tokens=n_new, temperature=0, ignore_eos=True)
    engines = {
        one: ExL2LLM(model_dir, cache_dtype=one, cache_tokens=context + n_new + 32, max_batch_size=1)
        for one in ("fp16", *QUANTISED)
    }
    times: dict[str, list[float]] = {one: [] for one in engines}
    sizes = {one: llm.cache_report().size_bytes for one, llm in engines.items()}
    for _ in range(repeats + 1):
        for cache_dtype, llm in engines.items():
            arrived = [time.perf_counter() for _ in llm.stream(prompt, sampling)]
            times[cache_dtype].append((len(arrived) - 1) / (arrived[-1] - arrived[0]))
    for llm in engines.values():
        llm.close()
    rates = {one: round(statistics.median(found[1:]), 2) for one, found in times.items()}
    return {
        "model": model_dir.name,
        "context": context,
        "new_tokens": n_new,
        "decode_tok_s": rates,
        "cache_bytes": sizes,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("error", "text", "decode"))
    parser.add_argument("--model", type=Path)
    parser.add_argument("--text", type=Path)
    parser.add_argument("--length", type=int, default=1024, help="tokens of a window")
    parser.add_argument("--tokens", type=int, default=16384, help="tokens scored at most")
    parser.add_argument("--shape", default="llama-1.1b", help="of the random weights, for `decode`")
    parser.add_argument("--context", type=int, default=4096)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    if options.what == "error":
        result = measure_error()
    elif options.what == "text":
        if options.text is None:
            parser.error("`text` needs --text")
        model_dir = options.model or demo.model_dir()
        result = measure_text(model_dir, options.text, length=options.length, n_tokens=options.tokens)
    else:
        model_dir = options.model or synthetic_model(default_cache_dir(), options.shape, 4.5)
        result = measure_decode(model_dir, context=options.context, n_new=options.new_tokens, repeats=options.repeats)
    print(json.dumps({"level": native.cpu_level(), "threads": native.default_num_threads(), **result}))


if __name__ == "__main__":
    main()
