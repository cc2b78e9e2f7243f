"""Gaps between the tokens of four streams, alone and beside an 8k prompt.

    python benchmarks/inter_token_gap.py [--model DIR] [--prompt-tokens N] [--streams N] [--gap X | --by-tokens]

Without a model the llama-1.1b shape at 4.5 bits is made (once, in the user's cache). Prints one JSON object; the target
is a longest gap of at most three times the usual one. `--by-tokens` cuts the prompt by a fixed number of tokens.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from exl2_rag import ExL2LLM
from exl2_rag.cli.bench import DEFAULT_BPW, DEFAULT_SHAPE, default_cache_dir, synthetic_model
from exl2_rag.llm.benchmark_engine import EngineMeasure, measure_inter_token_gap


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--prompt-tokens", type=int, default=8192)
    parser.add_argument("--computed-tokens", type=int, default=0, help="leading ones that are cached before")
    parser.add_argument("--streams", type=int, default=4)
    parser.add_argument("--gap", type=float, default=3.0)
    parser.add_argument("--by-tokens", action="store_true")
    options = parser.parse_args()
    model = options.model or synthetic_model(default_cache_dir(), DEFAULT_SHAPE, DEFAULT_BPW)
    gap = None if options.by_tokens else options.gap

    def open_llm(**given: object) -> ExL2LLM:
        return ExL2LLM(model, max_inter_token_gap=gap, **given)  # type: ignore[arg-type]

    sizes = EngineMeasure(
        prompt_tokens=options.prompt_tokens, computed_tokens=options.computed_tokens, streams=options.streams
    )
    print(json.dumps({"model": model.resolve().name, **measure_inter_token_gap(open_llm, sizes)}))


if __name__ == "__main__":
    main()
