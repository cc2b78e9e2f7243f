"""Measures what the engine promises: reuse of prefixes, even gaps between tokens, many questions on one text.

Each measurement opens its own engine and returns plain figures; `MEASUREMENTS` names them all. Prompts are drawn at
random, so that nothing is found in the cache but what the measurement put there. Knows no command line.
"""

from __future__ import annotations

import asyncio
import itertools
import math
import random
import statistics
import time
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Any

from exl2_rag.errors import EngineError, SettingsError
from exl2_rag.llm.api import ExL2LLM
from exl2_rag.llm.request import SamplingParams

QUESTION_TOKENS = 20
STREAM_PROMPT_TOKENS = 32
QUIET_GAPS = 60
"""Gaps of each stream that are taken as usual, before the long prompt comes."""

OpenLLM = Callable[..., ExL2LLM]
"""Opens the model that is measured, with the given options of `ExL2LLM`; the caller closes it."""


@dataclass(frozen=True, slots=True)
class EngineMeasure:
    """Sizes of the measurements.

    Attributes:
        prefix_tokens: of prefixes that are shared.
        prompt_tokens: of the long prompt beside streams.
        computed_tokens: leading tokens of it that are computed before the streams begin, so that the far end of a long
            prompt can be looked at alone.
        streams: texts that are being written meanwhile.
        questions: on one text.
        runs: repeats, of which the median counts.
        seed: of the prompts.
    """

    prefix_tokens: int = 4096
    prompt_tokens: int = 8192
    computed_tokens: int = 0
    streams: int = 4
    questions: int = 32
    runs: int = 3
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("prefix_tokens", "prompt_tokens", "streams", "questions", "runs"):
            if getattr(self, name) < 1:
                raise SettingsError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0 <= self.computed_tokens < self.prompt_tokens:
            raise SettingsError(
                f"computed_tokens must be from 0 to prompt_tokens - 1 ({self.prompt_tokens - 1}), "
                f"got {self.computed_tokens}"
            )


def measure_prefix_reuse(open_llm: OpenLLM, sizes: EngineMeasure) -> dict[str, Any]:
    """Time to the first token of a prompt with a long prefix: cold, and when the prefix is cached."""
    rng = random.Random(sizes.seed)
    sampling = SamplingParams(max_tokens=2, temperature=0, ignore_eos=True)
    cold_s, warm_s, missed = [], [], 0
    with open_llm(cache_tokens=2 * (sizes.prefix_tokens + 1024), max_batch_size=2) as llm:
        llm.generate(_tokens(llm, rng, 64), sampling)  # loads what is loaded at first use
        for _ in range(sizes.runs):
            prefix = _tokens(llm, rng, sizes.prefix_tokens)
            cold = llm.generate([*prefix, *_tokens(llm, rng, QUESTION_TOKENS)], sampling)
            warm = llm.generate([*prefix, *_tokens(llm, rng, QUESTION_TOKENS)], sampling)
            cold_s.append(cold.timings.first_token_s)
            warm_s.append(warm.timings.first_token_s)
            missed += max(0, sizes.prefix_tokens - warm.usage.cached_tokens)
    cold_ms, warm_ms = statistics.median(cold_s) * 1e3, statistics.median(warm_s) * 1e3
    return {
        "prefix_tokens": sizes.prefix_tokens,
        "question_tokens": QUESTION_TOKENS,
        "cold_ms": round(cold_ms, 1),
        "warm_ms": round(warm_ms, 1),
        "warm_share": round(warm_ms / cold_ms, 4),
        "prefix_tokens_computed_again": missed,
    }


def measure_shared_prefix(open_llm: OpenLLM, sizes: EngineMeasure) -> dict[str, Any]:
    """Many questions on one text as one batch: pages held, and the time of each part."""
    rng = random.Random(sizes.seed)
    new_tokens = 16
    own = QUESTION_TOKENS + new_tokens
    sampling = SamplingParams(max_tokens=new_tokens, temperature=0, ignore_eos=True)
    cache_tokens = sizes.prefix_tokens + sizes.questions * (own + 512) + 512
    with open_llm(cache_tokens=cache_tokens, max_batch_size=sizes.questions) as llm:
        page = llm.engine_config.page_size
        llm.generate(_tokens(llm, rng, 64), sampling)
        document = _tokens(llm, rng, sizes.prefix_tokens)
        questions = [_tokens(llm, rng, QUESTION_TOKENS) for _ in range(sizes.questions)]
        began = time.perf_counter()
        with llm.fork_point(document) as point:
            prefix_s = time.perf_counter() - began
            began = time.perf_counter()
            results = point.generate(questions, sampling)
            questions_s = time.perf_counter() - began
            report = llm.cache_report()
    held = report.pages - report.free_pages
    return {
        "prefix_tokens": sizes.prefix_tokens,
        "questions": sizes.questions,
        "new_tokens": new_tokens,
        "prefix_s": round(prefix_s, 3),
        "questions_s": round(questions_s, 3),
        "tokens_per_s": round(sizes.questions * new_tokens / questions_s, 1),
        "prefix_tokens_computed_again": sum(max(0, len(document) - one.usage.cached_tokens) for one in results),
        "pages_used": held,
        "pages_allowed": math.ceil(sizes.prefix_tokens / page) + sizes.questions * math.ceil((own + page) / page) + 3,
    }


def measure_inter_token_gap(open_llm: OpenLLM, sizes: EngineMeasure) -> dict[str, Any]:
    """The gaps between the tokens of a few streams: alone, and while a long prompt is computed beside them."""
    rng = random.Random(sizes.seed)
    cache_tokens = sizes.prompt_tokens + sizes.streams * 8192 + 512
    with open_llm(cache_tokens=cache_tokens, max_batch_size=sizes.streams + 1, max_seq_len=None) as llm:
        prompts = [_tokens(llm, rng, STREAM_PROMPT_TOKENS) for _ in range(sizes.streams)]
        long_prompt = _tokens(llm, rng, sizes.prompt_tokens)
        llm.generate(_tokens(llm, rng, 256), SamplingParams(max_tokens=2))
        if sizes.computed_tokens:
            llm.warm(long_prompt[: sizes.computed_tokens])
        arrivals, submitted, first_token = asyncio.run(_beside(llm, prompts, long_prompt))
        promise = llm.engine_config.max_inter_token_gap
    quiet = [gap for one in arrivals for gap in _gaps(one, 0.0, submitted)[-QUIET_GAPS:]]
    beside = sorted(gap for one in arrivals for gap in _gaps(one, submitted, first_token))
    if not quiet or not beside:
        raise EngineError("a stream had ended before the long prompt was done; ask for a shorter prompt")
    usual = statistics.median(quiet)
    return {
        "streams": sizes.streams,
        "prompt_tokens": sizes.prompt_tokens,
        "computed_before": sizes.computed_tokens,
        "promised_ratio": promise,
        "usual_gap_ms": round(usual * 1e3, 2),
        "usual_p99_ms": round(_quantile(sorted(quiet), 0.99) * 1e3, 2),
        "gap_p50_ms": round(_quantile(beside, 0.5) * 1e3, 2),
        "gap_p99_ms": round(_quantile(beside, 0.99) * 1e3, 2),
        "gap_max_ms": round(beside[-1] * 1e3, 2),
        "p50_ratio": round(_quantile(beside, 0.5) / usual, 3),
        "p99_ratio": round(_quantile(beside, 0.99) / usual, 3),
        "max_ratio": round(beside[-1] / usual, 3),
        "gaps_above_promise": sum(gap > promise * usual for gap in beside) if promise is not None else None,
        "gaps": len(beside),
        "prompt_s": round(first_token - submitted, 2),
        "prompt_tok_s": round((sizes.prompt_tokens - sizes.computed_tokens) / (first_token - submitted), 1),
    }


MEASUREMENTS: Mapping[str, Callable[[OpenLLM, EngineMeasure], dict[str, Any]]] = {
    "prefix-reuse": measure_prefix_reuse,
    "shared-prefix": measure_shared_prefix,
    "inter-token-gap": measure_inter_token_gap,
}
"""By name; each takes the opener and the sizes, and returns its figures."""


async def _beside(
    llm: ExL2LLM, prompts: Seq[list[int]], long_prompt: list[int]
) -> tuple[list[list[tuple[float, int]]], float, float]:
    """Arrivals of each stream (time, tokens), when the long prompt was handed in, and when its first token came."""
    arrivals: list[list[tuple[float, int]]] = [[] for _ in prompts]
    done = asyncio.Event()

    async def stream(place: int) -> None:
        sampling = SamplingParams(max_tokens=None, temperature=0, ignore_eos=True)
        pieces = llm.astream(prompts[place], sampling)
        async for piece in pieces:
            arrivals[place].append((time.perf_counter(), len(piece.token_ids)))
            if done.is_set():
                break
        await pieces.aclose()

    tasks = [asyncio.create_task(stream(place)) for place in range(len(prompts))]
    while min(map(len, arrivals)) < QUIET_GAPS + 10:
        await asyncio.sleep(0.02)
        if any(task.done() for task in tasks):
            raise EngineError("a stream ended at once; the context is too short for this measurement")
    submitted = time.perf_counter()
    await llm.agenerate(long_prompt, SamplingParams(max_tokens=1, temperature=0))
    first_token = time.perf_counter()
    done.set()
    await asyncio.gather(*tasks)
    return arrivals, submitted, first_token


def _gaps(arrivals: Seq[tuple[float, int]], begin: float, end: float) -> list[float]:
    """Times from one piece to the next within a span. A piece of several tokens, whose characters were incomplete
    before, counts once a token."""
    return [
        (at - before) / n
        for (before, _), (at, n) in itertools.pairwise(arrivals)
        if n and begin <= before and at <= end
    ]


def _quantile(ordered: Seq[float], share: float) -> float:
    return ordered[min(len(ordered) - 1, math.ceil(share * len(ordered)) - 1)]


def _tokens(llm: ExL2LLM, rng: random.Random, count: int) -> list[int]:
    return rng.choices(range(llm.config.vocab_size), k=count)
