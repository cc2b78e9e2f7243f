"""A request in progress: its tokens so far, the pages it holds, its text. No torch.

Between steps a sequence has computed the keys and values of its first `n_computed` tokens. The rest, `n_pending`, is
what the next forward passes are for: a whole prompt at first, one token while decoding, a few when a constraint forced
tokens, everything again after a preemption.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any

from exl2_rag.llm.logprobs import TokenLogprob
from exl2_rag.llm.output_text import OutputText
from exl2_rag.llm.page_table import HeldPages
from exl2_rag.llm.prefix_trace import PrefixTrace
from exl2_rag.llm.request import FinishReason, SamplingParams, SpeculationUsage, Timings, Usage

if TYPE_CHECKING:
    from exl2_rag.llm.constraint import ConstraintMatcher
    from exl2_rag.llm.lora.shelf import LoraSet
    from exl2_rag.llm.prompt_logprobs import PromptLogprobs
    from exl2_rag.llm.prompt_report import PromptReport
    from exl2_rag.llm.sampling.state import SamplerState
    from exl2_rag.llm.token_healing import Healing


class State(Enum):
    """Where a sequence is. A preempted one waits again; an ended one never comes back."""

    NEW = "new"  # not queued yet, or a branch of a request whose prompt is not computed yet
    WAITING = "waiting"
    RUNNING = "running"
    ENDED = "ended"


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Asks for the logits of a prompt's tokens instead of a continuation.

    Attributes:
        first_row: logits are wanted of this position and all after it.
        receive: called with the position of the first row and the logits [rows, V] of one slice, slice by slice.
    """

    first_row: int
    receive: Callable[[int, Any], None]


@dataclass(slots=True)
class SpeculationCounts:
    """Steps with a draft, tokens of the drafts, and how many of those were right."""

    steps: int = 0
    proposed_tokens: int = 0
    accepted_tokens: int = 0

    def result(self) -> SpeculationUsage:
        """The counts so far."""
        return SpeculationUsage(self.steps, self.proposed_tokens, self.accepted_tokens)


class Sequence:
    """One request in progress.

    Args:
        token_ids: the prompt.
        max_new_tokens: tokens to add at most; 0 only computes the prompt.
        output: its text; None for a sequence without a continuation.
        stop_token_ids: ids that end it.
        matcher: the state of its constraint, or None.
        sampler: what its sampling remembers; None where the parameters need nothing.
        evaluation: logits that are wanted, or None.
        keep_pages: the pages are pinned when the prompt is computed, instead of let go.
        pin_ttl_s: for how many seconds, then; None is until they are released.
        healing: what was taken from the end of the prompt, for the continuation to begin with; or None.
        cache_root: what its pages hang below (`fingerprint.root_key`); only sequences of one root share pages. None is
            the page table's own root.
        lora: the adapters at work on it.
        prompt_report: what became of the prompt so far; handed out with the last piece.
        prompt_logprobs: collects those of the prompt, if they are wanted.
        priority: higher ones come first.
        timeout_s: seconds it may take from now on, waiting included; None is any time.
        index: which of the continuations of one prompt it is.
        sources: (id of a document, position of its first token in the prompt), as in `GenerationRequest`.
    """

    draft: tuple[int, ...] = ()  # guesses of what comes next, for the next step
    drafting: object = None  # what the proposer of drafts remembers

    def __init__(
        self,
        token_ids: tuple[int, ...],
        *,
        max_new_tokens: int,
        sampling: SamplingParams,
        seed: int = 0,
        output: OutputText | None = None,
        stop_token_ids: frozenset[int] = frozenset(),
        matcher: ConstraintMatcher | None = None,
        sampler: SamplerState | None = None,
        evaluation: Evaluation | None = None,
        keep_pages: bool = False,
        pin_ttl_s: float | None = None,
        healing: Healing | None = None,
        cache_root: bytes | None = None,
        lora: LoraSet = (),
        prompt_report: PromptReport | None = None,
        prompt_logprobs: PromptLogprobs | None = None,
        priority: int = 0,
        timeout_s: float | None = None,
        index: int = 0,
        sources: tuple[tuple[str, int], ...] = (),
    ) -> None:
        self.token_ids = list(token_ids)
        self.n_prompt = len(token_ids)
        self.max_new_tokens = max_new_tokens
        self.sampling = sampling
        self.seed = seed
        self.output = output
        self.stop_token_ids = stop_token_ids
        self.matcher = matcher
        self.sampler = sampler
        self.evaluation = evaluation
        self.keep_pages = keep_pages
        self.pin_ttl_s = pin_ttl_s
        self.healing = healing
        self.cache_root = cache_root
        self.lora = lora
        self.sources = sources
        self.prompt_report = prompt_report
        self.prompt_logprobs = prompt_logprobs

        self.priority = priority  # may be raised by the scheduler
        self.timeout_s = timeout_s
        self.index = index
        self.branches: tuple[Sequence, ...] = ()  # the other continuations, if this is the first of several
        self.companion: Sequence | None = None  # its other half, if it is guided; see `guidance`
        self.leader: Sequence | None = None  # the half that it accompanies
        self.kept_logits: Any = None  # [1, V] after its last token, until those of the other half are there
        self.has_forked = False  # its branches go their own ways

        self.state = State.NEW
        self.arrival = -1  # place in the order of arrival, given by the scheduler
        self.held: HeldPages | None = None
        self.page_keys: list[bytes] = []  # of its leading full pages, as far as they have been looked up
        self.is_decoding = False  # its prompt is computed; set again to False by a preemption
        self.n_ram_tokens = 0  # brought back from host memory, and from disk, so that the cache has them
        self.n_disk_tokens = 0
        self.n_restored_pages = 0
        self.n_noted_pages = 0  # leading full pages that `CacheTiers` knows of
        self.n_cached_tokens: int | None = None  # of the prompt, when it was first admitted
        self.prefix_trace: PrefixTrace | None = None  # what it found in the cache then
        self.finish_reason: FinishReason | None = None
        # One for each new token, if they are asked for. Forced tokens are then measured one by one, instead of at once.
        self.logprobs: list[TokenLogprob] | None = None if sampling.logprobs is None else []
        self.forced: list[int] = []  # tokens that must come next and are still to be measured
        # By number of tokens: those that must not come next, for they led to a banned string.
        self.bans: dict[int, set[int]] = {}
        self.n_bans = 0  # over all time
        # Whether tokens may be guessed: there is text to come, from one sequence of logits, and nobody said not to.
        self.takes_drafts = max_new_tokens > 0 and sampling.speculate and not sampling.is_guided
        self.speculation = SpeculationCounts()
        self.n_handed_out = 0  # new tokens that left in a `StreamPiece`
        self._created = time.perf_counter()
        self.deadline = None if timeout_s is None else self._created + timeout_s  # on the clock of `perf_counter`
        self._admitted: float | None = None
        self._first_token: float | None = None

    @property
    def n_computed(self) -> int:
        """Tokens whose keys and values are in the cache."""
        return self.held.n_tokens if self.held is not None else 0

    @property
    def n_pending(self) -> int:
        """Tokens still to be computed."""
        return len(self.token_ids) - self.n_computed

    @property
    def n_new(self) -> int:
        """Tokens added to the prompt."""
        return len(self.token_ids) - self.n_prompt

    @property
    def rank(self) -> tuple[int, int, int, bool]:
        """Its place among all: the smaller comes first. Higher priority, then earlier arrival; companions follow."""
        return -self.priority, self.arrival, self.index, self.leader is not None

    @property
    def pair(self) -> tuple[Sequence, ...]:
        """Itself, and its other half if it is guided or guides."""
        other = self.companion or self.leader
        return (self,) if other is None else (self, other)

    @property
    def n_slots(self) -> int:
        """Places it takes in the batch and the queue, those of its branches included until they are on their own."""
        n_sequences = 1 if self.companion is None else 2
        return n_sequences if self.has_forked else n_sequences * (1 + len(self.branches))

    @property
    def reuse_limit(self) -> int:
        """How many leading tokens may come from the cache; what follows must be computed for its logits."""
        last = len(self.token_ids) - 1
        return last if self.evaluation is None else min(last, self.evaluation.first_row)

    def roll_back(self, n_tokens: int) -> None:
        """Give up the last `n_tokens` new tokens, of which nothing has been handed out: their text and what they meant
        to the constraint and the sampler. What lies on its pages is the scheduler's business.
        """
        if not 0 <= n_tokens <= self.n_new - self.n_handed_out:
            raise ValueError(f"expected from 0 to {self.n_new - self.n_handed_out} tokens to give up, got {n_tokens}")
        # A token that ends the text is no part of it, and is never the constraint's business.
        n_text_tokens = n_tokens - (n_tokens > 0 and self.token_ids[-1] in self.stop_token_ids)
        if self.output is not None:
            self.output.roll_back(n_text_tokens)
        if self.matcher is not None:
            self.matcher.rollback(n_text_tokens)
        if n_tokens:
            for one in self.pair:
                del one.token_ids[len(one.token_ids) - n_tokens :]
                one.kept_logits = None
            self.forced = []
        if self.sampler is not None:
            self.sampler.truncate(len(self.token_ids))
        if self.logprobs is not None:
            del self.logprobs[self.n_new :]
        self.finish_reason = None
        self.bans = {n: banned for n, banned in self.bans.items() if n <= len(self.token_ids)}

    def ban_next(self, token_id: int) -> None:
        """Keep a token from coming next, as long as the tokens before stay."""
        self.bans.setdefault(len(self.token_ids), set()).add(token_id)
        self.n_bans += 1

    def mark_admitted(self, n_cached: int) -> None:
        """Note what the cache gave, the first time only: what a preempted sequence finds again was its own."""
        if self.n_cached_tokens is None:
            self.n_cached_tokens = n_cached
            self._admitted = time.perf_counter()

    def mark_forked(self, sequence: Sequence) -> None:
        """Note that it goes on from where `sequence` is, which shares its prompt."""
        self.arrival = sequence.arrival
        self.priority = sequence.priority
        self.page_keys = list(sequence.page_keys)
        self.n_cached_tokens = sequence.n_cached_tokens
        self._admitted = sequence._admitted

    def append(self, token_id: int) -> None:
        """Add a new token, to the companion as well."""
        for one in self.pair:
            one.token_ids.append(token_id)

    def mark_progress(self) -> None:
        """Note that the first token, or whatever else was asked for, is there."""
        if self._first_token is None:
            self._first_token = time.perf_counter()

    def usage(self) -> Usage:
        """Token counts so far; a negative prompt was computed as well, and counts as prompt."""
        n_prompt = sum(one.n_prompt for one in self.pair)
        return Usage(n_prompt, sum(one.n_cached_tokens or 0 for one in self.pair), self.n_new)

    def timings(self) -> Timings:
        """Seconds since the request was made; a time that has not come yet is the present."""
        now = time.perf_counter()
        admitted = now if self._admitted is None else self._admitted
        first = now if self._first_token is None else self._first_token
        return Timings(admitted - self._created, first - self._created, now - self._created)
