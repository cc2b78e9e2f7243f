"""Times the sampler on the CPU: milliseconds for one step of a batch, by vocabulary, batch and parameters.

    python benchmarks/sampling.py [--cpu-time] [--other OTHER_SAMPLER.py] [--out results.json]

With `--cpu-time` it is the least processor time of one thread, which a busy machine disturbs little; else medians.
`--other` names a second sampler module with `Draw` and `sample`, timed in turn with ours on the same logits.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from exl2_rag import SamplingParams
from exl2_rag.llm import sampler
from exl2_rag.llm.sampling.draw import Draw
from exl2_rag.llm.sampling.state import SamplerState

PLAIN = {
    "greedy": {"temperature": 0.0},
    "temperature": {"temperature": 0.8},
    "top-k": {"temperature": 0.8, "top_k": 50},
    "top-p": {"temperature": 0.8, "top_p": 0.9},
    "min-p": {"temperature": 0.8, "min_p": 0.05},
}
OTHERS = {
    "greedy, penalties": {"temperature": 0.0, "repetition_penalty": 1.1, "frequency_penalty": 0.1},
    "greedy, logprobs 5": {"temperature": 0.0, "logprobs": 5},
    "typical": {"temperature": 0.8, "typical_p": 0.9},
    "DRY and XTC": {"temperature": 0.8, "dry_multiplier": 0.8, "xtc_probability": 0.5},
    "mirostat": {"temperature": 0.8, "mirostat_mode": 2},
}
HISTORY_TOKENS = 4096


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--other", type=Path)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--cpu-time", action="store_true")
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    if options.cpu_time:
        torch.set_num_threads(1)
    other = _load(options.other) if options.other else None
    rows = []
    for vocab_size in (32_000, 128_256):
        for batch in (1, 16):
            logits = 4 * torch.randn(batch, vocab_size, generator=torch.Generator().manual_seed(0))
            for name, values in {**PLAIN, **OTHERS}.items():
                params = SamplingParams(**values)
                timed: dict[str, Callable[[], object]] = {"ms": _ours(logits, params)}
                if other is not None and name in PLAIN:
                    timed["other_ms"] = _theirs(other, logits, params)
                times = _in_turn(timed, options.rounds, cpu_time=options.cpu_time)
                rows.append({"vocab": vocab_size, "batch": batch, "params": name, **times})
                print(json.dumps(rows[-1]), file=sys.stderr)
    report = {
        "processor": platform.processor() or platform.machine(),
        "cpu_time": options.cpu_time,
        "threads": torch.get_num_threads(),
        "rows": rows,
    }
    text = json.dumps(report, indent=1)
    if options.out:
        options.out.write_text(text + "\n", encoding="utf-8")
    else:
        print(text)


def _ours(logits: torch.Tensor, params: SamplingParams) -> Callable[[], object]:
    states = [
        None if params.is_plain else SamplerState(params, torch.randint(0, 30_000, (HISTORY_TOKENS,)).tolist())
        for _ in logits
    ]
    draws = [Draw(params, seed=row, step=1, state=state) for row, state in enumerate(states)]
    return lambda: sampler.choose(logits, draws)


def _theirs(module: Any, logits: torch.Tensor, params: SamplingParams) -> Callable[[], object]:
    draws = [module.Draw(params, seed=row, step=1) for row in range(len(logits))]
    return lambda: module.sample(logits, draws)


def _in_turn(timed: dict[str, Callable[[], object]], rounds: int, *, cpu_time: bool) -> dict[str, float]:
    """Milliseconds over rounds in which each runs once."""
    clock, summary = (time.process_time, min) if cpu_time else (time.perf_counter, statistics.median)
    seconds: dict[str, list[float]] = {name: [] for name in timed}
    for _ in range(rounds + 2):
        for name, run in timed.items():
            start = clock()
            run()
            seconds[name].append(clock() - start)
    return {name: round(1000 * summary(values[2:]), 4) for name, values in seconds.items()}


def _load(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location("other_sampler", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["other_sampler"] = module
    spec.loader.exec_module(module)
    return module


if __name__ == "__main__":
    main()
