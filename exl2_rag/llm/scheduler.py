"""Who runs, and how many tokens each computes in the next step. Knows integers only, no tensors.

A step has a budget of new tokens. Sequences that decode come first, one token each; what is left goes to prompts, in
slices, oldest first; then waiting requests are admitted, oldest first. Pages are taken as sequences grow. When none is
left, the youngest running sequence gives up its pages and waits again; what it had computed stays cached as long as
there is room, and the rest is computed anew. So the oldest always gets on, and nobody is lost.

A waiting request whose prompt shares a prefix with one that is being computed just now waits for that one, and then
takes the prefix from the cache instead of computing it a second time.
"""

from __future__ import annotations

from bisect import insort
from dataclasses import dataclass, field

from exl2_rag.errors import EngineError, Exl2RagError
from exl2_rag.llm.engine_config import EngineConfig
from exl2_rag.llm.page_table import PageCopy, PageTable, common_prefix
from exl2_rag.llm.sequence import Sequence, State

# Waiting for another request's prefix costs a step; a few shared tokens are not worth it.
WORTH_WAITING_TOKENS = 16


@dataclass(frozen=True, slots=True)
class Slice:
    """Compute the `n_tokens` tokens of `sequence` that begin at position `start`."""

    sequence: Sequence
    start: int
    n_tokens: int

    @property
    def reaches_end(self) -> bool:
        """Whether the next token can be sampled after this slice."""
        return self.start + self.n_tokens == len(self.sequence.token_ids)


@dataclass(slots=True)
class StepPlan:
    """One step: first the copies in their order, then one forward pass over all slices.

    Attributes:
        failures: sequences that can never run, already removed, and why.
    """

    copies: list[PageCopy] = field(default_factory=list)
    slices: list[Slice] = field(default_factory=list)
    failures: list[tuple[Sequence, Exl2RagError]] = field(default_factory=list)


class Scheduler:
    """Plans the steps for all sequences over one page table."""

    def __init__(self, table: PageTable, config: EngineConfig) -> None:
        self.table = table
        self.waiting: list[Sequence] = []  # both in order of arrival
        self.running: list[Sequence] = []
        self.pinned: list[Sequence] = []
        self.n_preemptions = 0
        self._config = config
        self._n_arrivals = 0
        self._copies: list[PageCopy] = []  # for the next step, of sequences that gave up tokens

    def add(self, sequence: Sequence) -> None:
        """Queue a new request."""
        sequence.arrival = self._n_arrivals
        self._n_arrivals += 1
        self.waiting.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Take out a finished, failed or cancelled sequence; its pages stay cached. Harmless when it is out already."""
        if sequence.state is State.ENDED:
            return
        (self.waiting if sequence.state is State.WAITING else self.running).remove(sequence)
        sequence.state = State.ENDED
        if sequence.held is not None:
            self.table.release(sequence.held)
            sequence.held = None

    def pin(self, sequence: Sequence) -> None:
        """Take out a sequence whose prompt is computed, but keep its pages until `unpin`."""
        assert sequence.held is not None
        self.running.remove(sequence)
        self.pinned.append(sequence)
        sequence.state = State.ENDED
        sequence.held.pinned = True

    def unpin(self, sequence: Sequence) -> None:
        """Let go of the pages of a pinned sequence. Harmless when that has happened already."""
        if sequence in self.pinned:
            assert sequence.held is not None
            self.pinned.remove(sequence)
            self.table.release(sequence.held)
            sequence.held = None

    def forget_all(self) -> None:
        """End every sequence and every pin without touching the page table, which is not to be used any more."""
        for sequence in (*self.waiting, *self.running, *self.pinned):
            sequence.state = State.ENDED
            sequence.held = None
        self.waiting, self.running, self.pinned = [], [], []

    def forget_rows(self, sequence: Sequence) -> None:
        """Let go of the pages of tokens that a sequence has given up; see `Sequence.roll_back`.

        Its last token is to be computed again, for the logits after it.
        """
        n_kept = len(sequence.token_ids) - 1
        del sequence.page_keys[len(sequence.token_ids) // self.table.page_size :]
        if sequence.held is None or sequence.held.n_tokens <= n_kept:
            return
        copy = self.table.truncate(sequence.held, n_kept)
        if copy is not None:
            self._copies.append(copy)

    def plan(self) -> StepPlan:
        """Decide the next step. Takes pages, and preempts where none is left."""
        plan = StepPlan(copies=self._copies)
        self._copies = []
        budget = self._config.max_batched_tokens
        for sequence in [one for one in self.running if one.is_decoding]:
            budget -= self._plan_slice(plan, sequence, min(sequence.n_pending, budget))
        if plan.slices:
            budget = min(budget, self._config.prefill_beside_decode)
        n_preemptions = self.n_preemptions
        for sequence in [one for one in self.running if not one.is_decoding]:
            budget -= self._plan_slice(plan, sequence, min(sequence.n_pending, budget))
        stalled = len(plan.slices) < len(self.running) and budget > 0
        if not stalled and self.n_preemptions == n_preemptions:
            self._admit(plan, budget)
        return plan

    def complete(self, plan: StepPlan) -> None:
        """Note that the forward pass of `plan` has been carried out."""
        for one in plan.slices:
            assert one.sequence.held is not None
            self.table.commit(one.sequence.held, one.sequence.token_ids[one.start : one.start + one.n_tokens])
            one.sequence.is_decoding = one.sequence.is_decoding or one.reaches_end

    def _plan_slice(self, plan: StepPlan, sequence: Sequence, n_tokens: int) -> int:
        """Plan up to `n_tokens` tokens of a running sequence; return how many."""
        if sequence.state is not State.RUNNING or n_tokens <= 0:
            return 0
        assert sequence.held is not None
        start = sequence.n_computed
        fitting = self.table.extend(sequence.held, start + n_tokens) - start
        while fitting <= 0:
            youngest = self.running[-1]
            if youngest is sequence:
                # It keeps its pages: older sequences that need them will take them, and else it goes on next time.
                if self.running[0] is sequence:
                    self._fail(plan, sequence)
                return 0
            self._preempt(plan, youngest)
            fitting = self.table.extend(sequence.held, start + n_tokens) - start
        plan.slices.append(Slice(sequence, start, fitting))
        return fitting

    def _preempt(self, plan: StepPlan, sequence: Sequence) -> None:
        assert sequence.held is not None
        self.running.remove(sequence)
        plan.slices = [one for one in plan.slices if one.sequence is not sequence]
        self.table.release(sequence.held)
        sequence.held = None
        sequence.is_decoding = False
        sequence.state = State.WAITING
        insort(self.waiting, sequence, key=lambda one: one.arrival)
        self.n_preemptions += 1

    def _admit(self, plan: StepPlan, budget: int) -> None:
        n_slots = self._config.max_batch_size - len(self.running)
        for sequence in list(self.waiting):
            if budget <= 0 or n_slots <= 0:
                return
            n_slots -= 1  # one that waits for a prefix keeps its place, so that those behind it cannot starve it
            if self._waits_for_prefix(sequence):
                continue
            if not self._fits(sequence):
                if self.running:
                    return
                self._fail(plan, sequence)
                continue
            self.waiting.remove(sequence)
            sequence.state = State.RUNNING
            sequence.held = held = self.table.hold(
                sequence.token_ids, sequence.reuse_limit, sequence.page_keys, sequence.cache_root
            )
            sequence.mark_admitted(min(held.n_tokens, sequence.n_prompt))
            if held.copy is not None:
                plan.copies.append(held.copy)
            insort(self.running, sequence, key=lambda one: one.arrival)
            budget -= self._plan_slice(plan, sequence, min(sequence.n_pending, budget))

    def _waits_for_prefix(self, sequence: Sequence) -> bool:
        """Whether a running prompt is about to give this one a longer prefix than the cache has now."""
        computing = [
            one
            for one in self.running
            if not one.is_decoding and one.n_pending and one.cache_root == sequence.cache_root
        ]
        if not computing:
            return False
        limit = sequence.reuse_limit
        cached = self.table.lookup(sequence.token_ids, limit, sequence.page_keys, sequence.cache_root).n_tokens
        worth = cached + min(WORTH_WAITING_TOKENS, self.table.page_size)
        return any(
            one.n_computed < (shared := min(common_prefix(one.token_ids, sequence.token_ids), limit))
            and shared >= worth
            for one in computing
        )

    def _fits(self, sequence: Sequence) -> bool:
        """Whether its tokens so far find room beside what the running sequences will still take for theirs."""
        match = self.table.lookup(sequence.token_ids, sequence.reuse_limit, sequence.page_keys, sequence.cache_root)
        needed = self.table.pages_for(len(sequence.token_ids)) - len(match.pages) + match.n_unheld
        for one in self.running:
            assert one.held is not None
            # One page more for each, or it would be preempted again as soon as the others have grown a little.
            needed += max(0, self.table.pages_for(len(one.token_ids)) - len(one.held.pages)) + 1
        return needed <= self.table.n_available

    def _fail(self, plan: StepPlan, sequence: Sequence) -> None:
        """Nothing else runs, and yet there is no room: pins hold the rest."""
        counts = self.table.counts()
        plan.failures.append(
            (
                sequence,
                EngineError(
                    f"a sequence of {len(sequence.token_ids)} tokens found no room in the KV cache: {counts.pinned} of "
                    f"{self.table.n_pages} pages of {self.table.page_size} tokens are pinned; release a pin or give a "
                    "larger cache_tokens"
                ),
            )
        )
        plan.slices = [one for one in plan.slices if one.sequence is not sequence]
        self.remove(sequence)
