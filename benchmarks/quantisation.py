"""What quantising costs: divergence from the float model over bits per weight, by every method we have.

    python benchmarks/quantisation.py MODEL [--bits 3 4 5 …] [--text FILE …] [--calibration FILE …] [--plot FILE.png]

Each of the methods "rtn" (round to nearest), "uniform" (plain GPTQ, the same bits everywhere), "reference" (that of
ExLlamaV2) and "refined" makes a model at each average, all with a head of 6 bits; each is compared with the float model
on text that none was calibrated with: mean KL of the next token in nats, its difference from "reference" with a 95 %
interval over windows (the same windows for all), and perplexity. The last line of output is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from exl2_rag import ExL2LLM
from exl2_rag.llm.evaluation.corpus import EvaluationText, read_texts
from exl2_rag.llm.evaluation.divergence import Divergence, measure_divergence
from exl2_rag.llm.quantize import ConversionOptions, convert, convert_rtn
from exl2_rag.llm.quantize.options import METHODS

BITS = (2.5, 3.0, 3.5, 4.0, 4.65, 5.0, 6.0, 8.0)
HEAD_BITS = 6


def make(model: Path, target: Path, method: str, bits: float, args: argparse.Namespace) -> float:
    """Convert; returns the attained bits per weight."""
    if method == "rtn":
        return convert_rtn(model, target, bits=bits, head_bits=HEAD_BITS).bits_per_weight
    options = ConversionOptions(
        bits=bits,
        head_bits=HEAD_BITS,
        method=method,
        rows=args.rows,
        length=args.length,
        measure_rows=args.measure_rows,
    )
    texts = None if not args.calibration else [one.text for one in read_texts(args.calibration)]
    return convert(model, target, options, texts=texts, text_source="calibration").bits_per_weight


def points(args: argparse.Namespace, texts: list[EvaluationText]) -> Iterator[dict[str, Any]]:
    """One entry for each model made."""
    common = {"precision": "exact", "cache_tokens": 4 * args.window, "max_batch_size": 1}
    with ExL2LLM(args.model, **common) as right, tempfile.TemporaryDirectory() as scratch:
        for bits in args.bits:
            made: dict[str, Divergence] = {}
            for method in ("rtn", "uniform", "reference", "refined"):
                target = Path(scratch) / f"{method}-{bits}"
                started = time.monotonic()
                try:
                    attained = make(args.model, target, method, bits, args)
                except Exception as error:  # a bit rate that narrow matrices cannot have is a result, too
                    yield {"method": method, "bits": bits, "error": f"{type(error).__name__}: {error}"}
                    continue
                seconds = time.monotonic() - started
                with ExL2LLM(target, **common) as lossy:
                    found = measure_divergence(right, lossy, texts, length=args.window, limit=args.tokens)
                made[method] = found
                yield {
                    "method": method,
                    "bits": bits,
                    "attained_bits": round(attained, 4),
                    "kl": found.mean_kl,
                    "kl_against_reference": against(made.get("reference"), found),
                    "top1_agreement": found.top1_agreement,
                    "perplexity": found.other_perplexity,
                    "float_perplexity": found.perplexity,
                    "seconds": round(seconds, 1),
                    "file_bytes": sum(path.stat().st_size for path in target.glob("*.safetensors")),
                }


def against(reference: Divergence | None, found: Divergence) -> dict[str, float] | None:
    """Mean difference over windows, and half of its 95 % interval."""
    if reference is None or reference is found:
        return None
    differences = [mine.mean_kl - other.mean_kl for mine, other in zip(found.segments, reference.segments, strict=True)]
    error = statistics.stdev(differences) / math.sqrt(len(differences)) if len(differences) > 1 else math.nan
    return {"mean": statistics.fmean(differences), "interval": 1.96 * error}


def plot(found: list[dict[str, Any]], path: Path, title: str) -> None:
    """KL over attained bits, a line for each method."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for method in ("rtn", *METHODS[::-1]):
        own = [one for one in found if one["method"] == method and "kl" in one]
        axes.plot([one["attained_bits"] for one in own], [one["kl"] for one in own], marker="o", label=method)
    axes.set(yscale="log", xlabel="bits per weight, tables included", ylabel="KL, nats per token", title=title)
    axes.grid(visible=True, which="both", alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--bits", type=float, nargs="+", default=BITS)
    parser.add_argument("--text", type=Path, nargs="+", required=True, help="held-out text")
    parser.add_argument("--calibration", type=Path, nargs="+", help="default: the built-in mix")
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--measure-rows", type=int, default=8)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=20_000, help="held-out tokens compared")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    found = []
    for one in points(args, read_texts(args.text)):
        found.append(one)
        print(json.dumps(one), file=sys.stderr, flush=True)
    if args.plot:
        plot(found, args.plot, f"{args.model.name}: divergence from the float model")
    settings = {key: getattr(args, key) for key in ("rows", "measure_rows", "length", "window", "tokens")}
    print(json.dumps({"model": args.model.name, "head_bits": HEAD_BITS, **settings, "points": found}))


if __name__ == "__main__":
    main()
