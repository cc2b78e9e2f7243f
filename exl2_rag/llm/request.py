"""What is asked of the engine and what comes back. Plain data, no torch.

`SamplingParams` and `GenerationRequest` are frozen: what was asked never changes. What is in progress lives in
`exl2_rag.llm.sequence`.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from exl2_rag.errors import RequestError
from exl2_rag.llm.logprobs import TokenLogprob
from exl2_rag.llm.prompt_report import PromptReport
from exl2_rag.llm.sampling.params import SamplingParams as SamplingParams  # noqa: PLC0414 (callers find it here)

if TYPE_CHECKING:
    from exl2_rag.llm.cache_explanation import CacheExplanation
    from exl2_rag.llm.constraint import Constraint
    from exl2_rag.llm.lora.choice import Lora
    from exl2_rag.llm.sources import Sources

FinishReason = Literal["stop", "length", "tool_calls"]


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """One prompt to continue.

    Attributes:
        token_ids: the prompt, at least one token.
        sampling: how to continue it.
        constraint: what the continuation must obey, or None.
        cache_salt: the tenant. Requests share cached pages with those of the same salt only, and None is a tenant of
            its own; so nobody can tell by the time to the first token what another tenant has asked.
        lora: LoRA adapters at work: a name, (name, scale), or several of either; see `ExL2LLM.load_lora`.
        sources: ids of the documents in the prompt, or a mapping from each to the position of its first token, 0 if
            not given. Pages from there on are erased when the document is purged.
        priority: higher ones are served first; see `exl2_rag.llm.scheduler`.
        timeout_s: seconds it may take in all, waiting included; None is any time.
        prompt_logprobs: None: none; 0: log-probabilities of the prompt's tokens; k: of the k most likely tokens at each
            place, too. The whole prompt is then computed, whatever is cached.
        dropped_messages, dropped_tokens: what was left out of the prompt already; comes back with the result.

    Raises:
        RequestError: a value is out of range.
    """

    token_ids: tuple[int, ...]
    sampling: SamplingParams = field(default_factory=SamplingParams)
    constraint: Constraint | None = None
    cache_salt: str | None = None
    lora: Lora | None = None
    sources: Sources = ()
    priority: int = 0
    timeout_s: float | None = None
    prompt_logprobs: int | None = None
    dropped_messages: tuple[int, ...] = ()
    dropped_tokens: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.priority, int):
            raise RequestError(f"priority must be a whole number, got {self.priority!r}")
        if self.timeout_s is not None and not (math.isfinite(self.timeout_s) and self.timeout_s > 0):
            raise RequestError(f"timeout_s must be above 0, or None (any time), got {self.timeout_s!r}")


@dataclass(frozen=True, slots=True)
class Usage:
    """Token counts of one request; `cached_tokens` of the prompt were not computed again.

    Prompts are all that were computed: the negative one of a guided request counts, too.
    """

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
class SpeculationUsage:
    """How guessing tokens went for one request.

    Attributes:
        steps: forward passes that computed a draft of it.
        proposed_tokens: tokens of these drafts.
        accepted_tokens: how many of them were right, each a token without a step of its own.
    """

    steps: int
    proposed_tokens: int
    accepted_tokens: int

    @property
    def acceptance(self) -> float:
        """Share of draft tokens that were right, 0 to 1."""
        return self.accepted_tokens / self.proposed_tokens if self.proposed_tokens else 0.0


@dataclass(frozen=True, slots=True)
class GenerationResult:
    """A finished continuation. `token_ids` includes the stop token, if one ended it; `text` does not.

    Attributes:
        usage, timings: of this continuation.
        speculation: how guessing tokens went; None for an engine without a `draft_model`.
        logprobs: one for each of `token_ids`, if `SamplingParams.logprobs` asks for them; else None.
        index: which of the continuations of one prompt it is.
        alternatives: the others, of a request for several; only the first has them.
        cache_explain: what of the prompt came from the cache, and why no more; for the operator, not for tenants.
        prompt: what became of the prompt.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    usage: Usage
    timings: Timings
    logprobs: tuple[TokenLogprob, ...] | None = None
    index: int = 0
    alternatives: tuple[GenerationResult, ...] = ()
    cache_explain: CacheExplanation | None = None
    prompt: PromptReport = field(default_factory=PromptReport)

    @property
    def dropped_messages(self) -> tuple[int, ...]:
        """Places of the messages that the overflow policy left out of the chat."""
        return self.prompt.dropped_messages

    @property
    def prompt_logprobs(self) -> tuple[TokenLogprob, ...] | None:
        """How likely each token of the prompt is, if `prompt_logprobs` asked for it."""
        return self.prompt.logprobs

    @property
    def choices(self) -> tuple[GenerationResult, ...]:
        """All continuations of the prompt, this one first; `SamplingParams.n` of them."""
        return (self, *self.alternatives)

    @property
    def total_usage(self) -> Usage:
        """Token counts of all choices together; their prompt counts once."""
        completion_tokens = sum(one.usage.completion_tokens for one in self.choices)
        return Usage(self.usage.prompt_tokens, self.usage.cached_tokens, completion_tokens)

    speculation: SpeculationUsage | None = None


@dataclass(frozen=True, slots=True)
class StreamPiece:
    """A piece of a continuation, whole characters only. Only the last piece has more than these.

    Attributes:
        logprobs: one for each of `token_ids`, if they were asked for.
        index: which continuation it belongs to, where a request asked for several; each has a last piece.
        prompt: what became of the prompt; of the last piece alone, as finish_reason, usage and timings.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None = None
    usage: Usage | None = None
    timings: Timings | None = None
    logprobs: tuple[TokenLogprob, ...] | None = None
    index: int = 0
    cache_explain: CacheExplanation | None = None
    speculation: SpeculationUsage | None = None
    prompt: PromptReport | None = None


def branch_seed(seed: int, index: int) -> int:
    """The seed of the continuation number `index` of a request with this seed; 0 is the seed itself."""
    if index == 0:
        return seed
    digest = hashlib.blake2b(f"{seed}/{index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
