"""Decoding speed with prompt lookup beside decoding without, where answers quote and where they do not.

    python benchmarks/speculation.py --spec-bench question.jsonl.xz --tokenizer tokenizer.json [--cache DIR]
        [--prompts 8] [--new 96] [--parts quotes,nothing,demo] [--output FILE]

Two models of the llama-1.1b shape at 4.5 bits, made at first use and kept in the cache: one that copies from its prompt
(`copying_model.py`), one of random weights. Prompts are the retrieval questions of Spec-Bench, cut to 384 tokens.

quotes    the copying model goes on from a place in the middle of a passage; greedy
nothing   the random model draws at temperature 1: hardly a token follows from what was there; the demo model likewise,
          whose steps are so short that the bookkeeping shows

Each prompt is continued without (`speculate=False`) and with drafts, in turn, by one engine (two engines of one model
differ by some percent, by where their weights lie), and the texts are compared. Prints one JSON object: tokens a second
are sums over all prompts, ratios of one run.
"""

from __future__ import annotations

import argparse
import json
import lzma
import platform
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.copying_model import write_copying_model
from exl2_rag import ExL2LLM, SamplingParams
from exl2_rag.demo import model_dir as demo_model_dir
from exl2_rag.llm.quantize.synthetic import SHAPES, ensure_synthetic_model, is_complete, synthetic_model_dir
from exl2_rag.llm.tokenizer import Tokenizer

SHAPE, BITS = "llama-1.1b", 4.5
MAX_PROMPT_TOKENS = 384
QUOTED_TOKENS = 6  # of the passage stand at the end of the prompt, for the model to go on from
SIZES: dict[str, Any] = {"device": "cpu", "max_seq_len": 1024, "cache_tokens": 4096, "max_batch_size": 4}


@dataclass(slots=True)
class Decoding:
    """New tokens and the time between the first and the last of them, over several requests."""

    n_tokens: int = 0
    seconds: float = 0.0

    def add(self, result: Any) -> None:
        """Count a finished request."""
        self.n_tokens += len(result.token_ids) - 1
        self.seconds += result.timings.total_s - result.timings.first_token_s

    @property
    def tok_s(self) -> float:
        """Tokens a second."""
        return self.n_tokens / self.seconds


def compare(llm: ExL2LLM, prompts: list[list[int]], how: dict[str, Any]) -> dict[str, Any]:
    """Continue each prompt without and with drafts; the first prompt only warms up."""
    without, with_drafts = Decoding(), Decoding()
    n_steps = n_proposed = n_accepted = n_different = 0
    for number, prompt in enumerate(prompts):
        results = {}
        for speculate in (False, True) if number % 2 else (True, False):
            results[speculate] = llm.generate(prompt, SamplingParams(**how, seed=number, speculate=speculate))
        n_different += results[True].token_ids != results[False].token_ids
        if number == 0:
            continue
        without.add(results[False])
        with_drafts.add(results[True])
        counts = results[True].speculation
        n_steps, n_proposed = n_steps + counts.steps, n_proposed + counts.proposed_tokens
        n_accepted += counts.accepted_tokens
    return {
        "prompts": len(prompts) - 1,
        "prompt_tokens": sum(map(len, prompts[1:])) // (len(prompts) - 1),
        "new_tokens": how["max_tokens"],
        "without_tok_s": round(without.tok_s, 2),
        "with_tok_s": round(with_drafts.tok_s, 2),
        "ratio": round(with_drafts.tok_s / without.tok_s, 3),
        "texts_that_differ": n_different,
        "steps_with_draft": n_steps,
        "draft_tokens": n_proposed,
        "accepted_draft_tokens": n_accepted,
    }


def row_costs(llm: ExL2LLM) -> dict[str, float]:
    """What steps of so many rows took, in ms, as the engine has measured it."""
    speculator = llm._engine._speculator
    assert speculator is not None
    return {str(rows): round(seconds * 1000, 2) for rows, seconds in sorted(speculator.step_costs().items())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache" / "exl2-rag" / "synthetic")
    parser.add_argument("--spec-bench", type=Path, required=True, help="question.jsonl.xz")
    parser.add_argument("--tokenizer", type=Path, required=True, help="of Mistral 7B v0.1")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--new", type=int, default=96)
    parser.add_argument("--parts", default="quotes,nothing,demo")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    random_dir = synthetic_model_dir(options.cache, SHAPE, bits=BITS)
    copying_dir = random_dir.with_name(f"{random_dir.name}-copying")
    ensure_synthetic_model(random_dir, SHAPES[SHAPE], bits=BITS)
    if not is_complete(copying_dir):
        write_copying_model(random_dir, copying_dir, SHAPES[SHAPE])
    tokenizer = Tokenizer.from_file(options.tokenizer)
    with lzma.open(options.spec_bench, "rt", encoding="utf-8") as lines:
        texts = [one["turns"][0] for one in map(json.loads, lines) if one["category"] == "rag"]
    passages = [tokenizer.encode(text)[:MAX_PROMPT_TOKENS] for text in texts[: options.prompts + 1]]
    starts = [len(ids) // 3 + 7 * number for number, ids in enumerate(passages)]
    quoting = [[1, *ids, *ids[start : start + QUOTED_TOKENS]] for ids, start in zip(passages, starts, strict=True)]
    greedy = {"max_tokens": options.new, "temperature": 0.0, "ignore_eos": True}
    drawn = {"max_tokens": options.new, "temperature": 1.0, "ignore_eos": True}
    result: dict[str, Any] = {
        "processor": platform.processor() or platform.machine(),
        "date": time.strftime("%Y-%m-%d"),
        "model": f"{SHAPE}, {BITS} bits",
    }
    parts = options.parts.split(",")
    if "quotes" in parts:
        with ExL2LLM(copying_dir, draft_model="prompt-lookup", **SIZES) as llm:
            result["quotes"] = compare(llm, quoting, greedy) | {"step_ms_by_rows": row_costs(llm)}
    if "nothing" in parts:
        with ExL2LLM(random_dir, draft_model="prompt-lookup", **SIZES) as llm:
            result["nothing"] = compare(llm, [one[:64] for one in quoting], drawn)
    if "demo" in parts:
        with ExL2LLM(demo_model_dir(), draft_model="prompt-lookup", **SIZES) as llm:
            prompts = [llm.tokenizer.encode(text)[:64] for text in texts]
            result["nothing_demo_model"] = compare(llm, prompts, drawn)
    text = json.dumps(result, indent=1)
    print(text)
    if options.output is not None:
        options.output.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
