"""What is asked of the engine and what comes back. Plain data, no torch.

`SamplingParams` and `GenerationRequest` are frozen: what was asked never changes. What is in progress lives in
`exl2_rag.llm.sequence`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from exl2_rag.errors import RequestError

if TYPE_CHECKING:
    from exl2_rag.llm.constraint import Constraint

FinishReason = Literal["stop", "length", "tool_calls"]


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How tokens are drawn and when to stop.

    Attributes:
        max_tokens: new tokens at most; None: up to the model's context length.
        temperature: 0 is greedy (the most likely token, ties to the lowest id).
        top_k: keep the k most likely tokens; 0 is off.
        top_p: keep the smallest set of most likely tokens whose mass reaches top_p; 1 is off.
        min_p: drop tokens less likely than min_p times the most likely one; 0 is off.
        seed: None draws a fresh one. With a seed the tokens do not depend on what else runs in the batch.
        stop: strings that end the text; they are not part of it.
        stop_token_ids: token ids that end the text, beside the model's own end-of-sequence ids.
        ignore_eos: go on past the model's end-of-sequence ids.

    Raises:
        RequestError: a value is out of range.
    """

    max_tokens: int | None = 256
    temperature: float = 0.7
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        given: object = self.stop  # whatever the annotation says, a lone string is an easy mistake
        if isinstance(given, str):
            raise RequestError(f'stop must be a tuple of strings, got the string {given!r}; write stop=("…",)')
        object.__setattr__(self, "stop", tuple(self.stop))
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids))
        self._require(self.max_tokens is None or self.max_tokens >= 1, "max_tokens", "at least 1, or None")
        self._require(math.isfinite(self.temperature) and self.temperature >= 0, "temperature", "0 or more")
        self._require(self.top_k >= 0, "top_k", "0 (off) or more")
        self._require(0 < self.top_p <= 1, "top_p", "above 0 and at most 1 (off)")
        self._require(0 <= self.min_p <= 1, "min_p", "from 0 (off) to 1")
        self._require(self.seed is None or 0 <= self.seed < 2**63, "seed", "from 0 to 2**63 - 1, or None")
        if any(not text for text in self.stop):
            raise RequestError("stop holds an empty string, which would end every text at once; remove it")

    def _require(self, holds: bool, name: str, expected: str) -> None:
        if not holds:
            raise RequestError(f"{name} must be {expected}, got {getattr(self, name)!r}")


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """One prompt to continue.

    Attributes:
        token_ids: the prompt, at least one token.
        sampling: how to continue it.
        constraint: what the continuation must obey, or None.
    """

    token_ids: tuple[int, ...]
    sampling: SamplingParams = field(default_factory=SamplingParams)
    constraint: Constraint | None = None


@dataclass(frozen=True, slots=True)
class Usage:
    """Token counts of one request; `cached_tokens` of the prompt were not computed again."""

    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int

    @property
    def total_tokens(self) -> int:
        """Prompt and completion together."""
        return self.prompt_tokens + self.completion_tokens


@dataclass(frozen=True, slots=True)
class Timings:
    """Wall-clock seconds of one request."""

    queued_s: float
    first_token_s: float
    total_s: float


@dataclass(frozen=True, slots=True)
class GenerationResult:
    """A finished continuation. `token_ids` includes the stop token, if one ended it; `text` does not."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    usage: Usage
    timings: Timings


@dataclass(frozen=True, slots=True)
class StreamPiece:
    """A piece of a continuation, whole characters only. Only the last piece has finish_reason, usage and timings."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None = None
    usage: Usage | None = None
    timings: Timings | None = None


@dataclass(frozen=True, slots=True)
class CacheReport:
    """The state of the KV cache. Each page is free, cached (kept, but held by nobody), running or pinned.

    Attributes:
        page_size: tokens on a page.
        size_bytes: memory of the whole cache.
        prompt_tokens, cached_tokens: of all requests so far; cached ones were not computed again.
        evicted_pages: cached pages whose place was needed.
        preemptions: how often a running request had to give up its pages and wait.
        running_requests, waiting_requests: at present.
    """

    page_size: int
    pages: int
    free_pages: int
    cached_pages: int
    running_pages: int
    pinned_pages: int
    size_bytes: int
    prompt_tokens: int
    cached_tokens: int
    evicted_pages: int
    preemptions: int
    running_requests: int
    waiting_requests: int

    @property
    def hit_rate(self) -> float:
        """Share of prompt tokens that came from the cache, 0 to 1."""
        return self.cached_tokens / self.prompt_tokens if self.prompt_tokens else 0.0
