"""Who runs, and how many tokens each computes in the next step. Knows integers only, no tensors.

A step has a budget of new tokens. Sequences that decode come first, one token each; what is left goes to prompts, in
slices, as far as those who decode may be kept waiting (`step_times`); then waiting requests are admitted. All in order
of rank: higher priority first, and first come, first served among equals. Pages are taken as sequences grow. When none
is left, the running sequence of the last rank gives up its pages and waits again; what it had computed stays cached as
long as there is room, and the rest is computed anew. So the first in rank always gets on, and nobody is lost. A waiting
request also takes the place of a running one of lower priority, if the batch or the cache is full.

Priority is strict, with one exception, or low ones might wait for ever: when `max_overtakes` requests have been started
ahead of ones that had waited longer, the one of these that has waited longest is raised to the highest priority. So
however many urgent requests come, at least one in `max_overtakes + 1` of those started is the longest-waiting one.

A waiting request whose prompt shares a prefix with one that is being computed just now waits for that one, and then
takes the prefix from the cache instead of computing it a second time.
"""

from __future__ import annotations

import time
from bisect import insort
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from exl2_rag.errors import EngineError, Exl2RagError, QueueFullError, RequestTimeoutError
from exl2_rag.llm.engine_config import EngineConfig
from exl2_rag.llm.page_table import PageCopy, PageTable, common_prefix
from exl2_rag.llm.pin_book import PinBook
from exl2_rag.llm.prefix_trace import trace_prefix
from exl2_rag.llm.sequence import Sequence, State
from exl2_rag.llm.step_times import PrefillBudget, StepTimes

# Waiting for another request's prefix costs a step; a few shared tokens are not worth it.
WORTH_WAITING_TOKENS = 16

# What a sequence that decodes adds to a step: a token, a few forced ones, a draft. More than that is cut like a prompt.
MOST_DECODED_TOKENS = 16


@dataclass(frozen=True, slots=True)
class Slice:
    """Compute the `n_tokens` tokens of `sequence` that begin at position `start`, and those of a draft after them.

    Attributes:
        decodes: what a sequence that decodes takes in every step; else it is a piece of a prompt.
        draft: guesses of the tokens that come next; not committed before they have turned out right.
    """

    sequence: Sequence
    start: int
    n_tokens: int
    decodes: bool = False
    draft: tuple[int, ...] = ()

    @property
    def n_rows(self) -> int:
        """Tokens to compute, those of the draft included."""
        return self.n_tokens + len(self.draft)

    @property
    def reaches_end(self) -> bool:
        """Whether the next token can be sampled after this slice."""
        return self.start + self.n_tokens == len(self.sequence.token_ids)


@dataclass(slots=True)
class StepPlan:
    """One step: first the copies in their order, then one forward pass over all slices.

    Attributes:
        failures: sequences that can never run, already removed, and why.
        n_beside: decoded tokens whose successors wait for this step: its own, or, where prompts are computed in turns
            with decoding, those of the step before.
    """

    copies: list[PageCopy] = field(default_factory=list)
    slices: list[Slice] = field(default_factory=list)
    failures: list[tuple[Sequence, Exl2RagError]] = field(default_factory=list)
    n_beside: int = 0

    @property
    def n_decoded(self) -> int:
        """Tokens of the sequences that decode, drafts included."""
        return sum(one.n_rows for one in self.slices if one.decodes)


class Scheduler:
    """Plans the steps for all sequences over one page table."""

    def __init__(self, table: PageTable, config: EngineConfig, clock: Callable[[], float] = time.monotonic) -> None:
        self.table = table
        self.waiting: list[Sequence] = []  # both in order of rank
        self.running: list[Sequence] = []
        self.pins = PinBook(table, clock)
        self.n_preemptions = 0
        # Asked before a sequence is admitted; brings back what lower tiers have of its pages. False: not yet.
        self.restore: Callable[[Sequence, StepPlan], bool] | None = None
        self._config = config
        self._n_arrivals = 0
        self._copies: list[PageCopy] = []  # for the next step, of sequences that gave up tokens
        self._n_overtakes = 0
        self._n_before_turn = 0  # tokens that the last step decoded, if the next one is for prompts alone
        self._times = None if config.max_inter_token_gap is None else StepTimes(config.max_inter_token_gap)

    def add(self, sequence: Sequence) -> None:
        """Queue a new request.

        Raises:
            QueueFullError: more would wait than `max_waiting` allows.
        """
        self._check_queue(sequence)
        sequence.arrival = self._n_arrivals
        self._n_arrivals += 1
        self._insert(self.waiting, sequence, State.WAITING)
        self._add_companion(sequence)

    def _add_companion(self, leader: Sequence) -> None:
        """Queue the other half of a guided sequence right behind it."""
        if leader.companion is None:
            return
        leader.companion.arrival, leader.companion.index = leader.arrival, leader.index
        leader.companion.priority = leader.priority
        self._insert(self.waiting, leader.companion, State.WAITING)

    def fork(self, sequence: Sequence) -> list[PageCopy]:
        """Let the branches of a sequence whose prompt is computed go on from there.

        A branch shares the full pages and gets a copy of the last one. One that finds no place in the batch waits; it
        takes up the cached pages when it is admitted.

        Returns:
            The copies to make at once, before any other change of the cache.
        """
        assert sequence.held is not None
        copies: list[PageCopy] = []
        sequence.has_forked = True
        for branch in sequence.branches:
            if branch.state is not State.NEW:  # cancelled meanwhile
                continue
            branch.mark_forked(sequence)
            self._add_companion(branch)
            if len(self.running) >= self._config.max_batch_size:
                self._insert(self.waiting, branch, State.WAITING)
                continue
            branch.held = self.table.fork(sequence.held)
            branch.is_decoding = True
            self._insert(self.running, branch, State.RUNNING)
            if branch.held.copy is not None:
                copies.append(branch.held.copy)
        return copies

    def expire(self, now: float) -> list[tuple[Sequence, Exl2RagError]]:
        """Take out the sequences whose time is over, and say so. `now` is on the clock of their deadlines, in s."""
        late = [one for one in (*self.running, *self.waiting) if one.deadline is not None and one.deadline <= now]
        failures: list[tuple[Sequence, Exl2RagError]] = []
        for sequence in late:
            failures.append((sequence, _timeout_error(sequence)))
            self.remove(sequence)
        return failures

    def remove(self, sequence: Sequence) -> None:
        """Take out a finished, failed or cancelled sequence; its pages stay cached. Harmless when it is out already."""
        if not sequence.has_forked:
            for branch in sequence.branches:
                self.remove(branch)
        if sequence.companion is not None:
            self.remove(sequence.companion)
        if sequence.state is State.WAITING:
            self.waiting.remove(sequence)
        elif sequence.state is State.RUNNING:
            self.running.remove(sequence)
        sequence.state = State.ENDED
        if sequence.held is not None:
            self.table.release(sequence.held)
            sequence.held = None

    def pin(self, sequence: Sequence) -> None:
        """Take out a sequence whose prompt is computed, but keep its pages until `unpin`, or for its time to live."""
        self.running.remove(sequence)
        self.pins.add(sequence, sequence.pin_ttl_s)
        sequence.state = State.ENDED

    def unpin(self, sequence: Sequence) -> None:
        """Let go of the pages of a pinned sequence. Harmless when that has happened already."""
        self.pins.release(sequence)

    def forget_all(self) -> None:
        """End every sequence and every pin without touching the page table, which is not to be used any more."""
        for sequence in (*self.waiting, *self.running):
            for one in (sequence, *sequence.branches):
                one.state = State.ENDED
            sequence.held = None
        self.waiting, self.running = [], []
        self.pins.forget_all()

    def forget_rows(self, sequence: Sequence) -> None:
        """Let go of the pages of tokens that a sequence has given up; see `Sequence.roll_back`.

        Its last token is to be computed again, for the logits after it.
        """
        if sequence.companion is not None:
            self.forget_rows(sequence.companion)
        n_kept = len(sequence.token_ids) - 1
        del sequence.page_keys[len(sequence.token_ids) // self.table.page_size :]
        if sequence.held is None or sequence.held.n_tokens <= n_kept:
            return
        copy = self.table.truncate(sequence.held, n_kept)
        if copy is not None:
            self._copies.append(copy)

    def plan(self) -> StepPlan:
        """Decide the next step. Takes pages, and preempts where none is left."""
        self.pins.expire()
        plan = StepPlan(copies=self._copies)
        self._copies = []
        decoding = [one for one in self.running if one.is_decoding and one.n_pending <= MOST_DECODED_TOKENS]
        if self._n_before_turn and decoding:
            plan.n_beside, self._n_before_turn = self._n_before_turn, 0
            self._plan_prompts(plan, self._prefill_budget(plan.n_beside), decoding)
            if plan.slices:
                return plan
            plan.n_beside = 0
        n_left = self._config.max_batched_tokens
        for sequence in decoding:
            n_left -= self._plan_slice(plan, sequence, min(sequence.n_pending, n_left), decodes=True)
        self._add_drafts(plan, n_left)
        n_decoded = plan.n_decoded
        if n_decoded and self._config.prefill_in_turns:
            self._n_before_turn = n_decoded
        else:
            self._plan_prompts(plan, self._prefill_budget(n_decoded), decoding)
            plan.n_beside = plan.n_decoded
        return plan

    def measured(self, plan: StepPlan, seconds: float) -> None:
        """Note how long the whole step of `plan` took, for the budgets of later ones."""
        if self._times is None or not plan.slices:
            return
        prefill = [(one.start, one.n_tokens) for one in plan.slices if not one.decodes]
        n_decoded = plan.n_decoded
        if not n_decoded and plan.n_beside:  # the gap that it makes is that of both steps
            seconds += self._times.usual_s(plan.n_beside) or 0.0
        self._times.add(n_decoded or plan.n_beside, prefill, seconds)

    def _plan_prompts(self, plan: StepPlan, budget: PrefillBudget, decoding: list[Sequence]) -> None:
        """Plan what is not decoded: the running prompts, and those that can be started."""
        n_preemptions, n_before = self.n_preemptions, len(plan.slices)
        prompts = [one for one in self.running if one not in decoding]
        for sequence in prompts:
            self._admit(plan, budget, ahead_of=sequence)
            self._plan_prefill(plan, sequence, budget)
        # One of a guided pair has nothing to compute while it waits for the other.
        stalled = len(plan.slices) - n_before < sum(one.n_pending > 0 for one in prompts) and not budget.is_spent
        if not stalled and self.n_preemptions == n_preemptions:
            self._admit(plan, budget)

    def _prefill_budget(self, n_decoded: int) -> PrefillBudget:
        """What may be computed of prompts beside so many decoded tokens."""
        n_left = self._config.max_batched_tokens - n_decoded
        if not n_decoded:
            return PrefillBudget(n_left)
        if self._times is None:
            return PrefillBudget(min(n_left, self._config.prefill_beside_decode))
        return self._times.budget(n_decoded, n_left, self._config.prefill_beside_decode)

    def _plan_prefill(self, plan: StepPlan, sequence: Sequence, budget: PrefillBudget) -> None:
        start = sequence.n_computed
        budget.spend(start, self._plan_slice(plan, sequence, min(sequence.n_pending, budget.most(start))))

    def complete(self, plan: StepPlan) -> None:
        """Note that the forward pass of `plan` has been carried out."""
        for one in plan.slices:
            assert one.sequence.held is not None
            self.table.commit(one.sequence.held, one.sequence.token_ids[one.start : one.start + one.n_tokens])
            one.sequence.is_decoding = one.sequence.is_decoding or one.reaches_end

    def keep_drafted(self, sequence: Sequence) -> None:
        """Tokens of a draft turned out to be those of the sequence, so that its last ones are computed already."""
        assert sequence.held is not None
        self.table.commit(sequence.held, sequence.token_ids[sequence.n_computed :])

    def _add_drafts(self, plan: StepPlan, n_left: int) -> None:
        """Let slices carry drafts, as far as `n_left` tokens and free pages go."""
        for place, one in enumerate(plan.slices):
            draft = one.sequence.draft[:n_left]
            if not (draft and one.reaches_end):
                continue
            assert one.sequence.held is not None
            end = one.start + one.n_tokens
            draft = draft[: self.table.extend(one.sequence.held, end + len(draft)) - end]
            plan.slices[place] = replace(one, draft=draft)
            n_left -= len(draft)

    def _plan_slice(self, plan: StepPlan, sequence: Sequence, n_tokens: int, *, decodes: bool = False) -> int:
        """Plan up to `n_tokens` tokens of a running sequence; return how many."""
        if sequence.state is not State.RUNNING or n_tokens <= 0:
            return 0
        assert sequence.held is not None
        start = sequence.n_computed
        fitting = self.table.extend(sequence.held, start + n_tokens) - start
        while fitting <= 0:
            last = self.running[-1]
            if last is sequence:
                # It keeps its pages: sequences before it that need them take them, and else it goes on next time.
                if all(one in sequence.pair for one in self.running):
                    self._fail(plan, sequence)
                return 0
            self._preempt(plan, last)
            fitting = self.table.extend(sequence.held, start + n_tokens) - start
        plan.slices.append(Slice(sequence, start, fitting, decodes))
        return fitting

    def _preempt(self, plan: StepPlan, sequence: Sequence) -> None:
        assert sequence.held is not None
        self.running.remove(sequence)
        plan.slices = [one for one in plan.slices if one.sequence is not sequence]
        self.table.release(sequence.held)
        sequence.held = None
        sequence.is_decoding = False
        self._insert(self.waiting, sequence, State.WAITING)
        self.n_preemptions += 1

    def _admit(self, plan: StepPlan, budget: PrefillBudget, ahead_of: Sequence | None = None) -> None:
        """Start waiting requests, or only those more urgent than `ahead_of`."""
        n_kept = 0  # places of those that wait for a prefix, or those behind them could starve them
        for sequence in list(self.waiting):
            if budget.is_spent or (ahead_of is not None and sequence.priority <= ahead_of.priority):
                return
            while len(self.running) + n_kept >= self._config.max_batch_size:
                if not self._preempt_lower(plan, sequence):
                    return
            if self._waits_for_prefix(sequence):
                n_kept += 1
                continue
            while not self._fits(sequence) and self._preempt_lower(plan, sequence):
                pass
            if not self._fits(sequence):
                if any(one not in sequence.pair for one in self.running):
                    return
                self._fail(plan, sequence)
                continue
            if self.restore is not None and not self.restore(sequence, plan):
                n_kept += 1
                continue
            self.waiting.remove(sequence)
            self._count_overtaking(sequence)
            if sequence.prefix_trace is None:
                sequence.prefix_trace = trace_prefix(
                    self.table,
                    sequence.token_ids,
                    sequence.reuse_limit,
                    known_keys=sequence.page_keys,
                    root=sequence.cache_root,
                    other_roots=reversed(self.table.roots),
                )
            sequence.held = held = self.table.hold(
                sequence.token_ids, sequence.reuse_limit, sequence.page_keys, sequence.cache_root
            )
            sequence.mark_admitted(min(held.n_tokens, sequence.n_prompt))
            if held.copy is not None:
                plan.copies.append(held.copy)
            self._insert(self.running, sequence, State.RUNNING)
            self._plan_prefill(plan, sequence, budget)

    def _preempt_lower(self, plan: StepPlan, sequence: Sequence) -> bool:
        """Preempt the running sequence of the last rank if its priority is lower; return whether it was."""
        if not self.running or self.running[-1].priority >= sequence.priority:
            return False
        self._preempt(plan, self.running[-1])
        return True

    def _count_overtaking(self, sequence: Sequence) -> None:
        """Note that a sequence is admitted, and raise the one that has waited longest if it was overtaken enough."""
        behind = [
            one
            for one in (*self.waiting, *self.running)
            if one.arrival < sequence.arrival and one.priority < sequence.priority and not one.is_decoding
        ]
        if not behind or not self._config.max_overtakes:
            return
        self._n_overtakes += 1
        if self._n_overtakes >= self._config.max_overtakes:
            self._n_overtakes = 0
            self._raise(min(behind, key=lambda one: (one.arrival, one.index)), sequence.priority)

    def _raise(self, sequence: Sequence, priority: int) -> None:
        for one in sequence.pair:
            one.priority = max(one.priority, priority)
        for queue in (self.waiting, self.running):
            queue.sort(key=lambda one: one.rank)

    def _insert(self, queue: list[Sequence], sequence: Sequence, state: State) -> None:
        sequence.state = state
        insort(queue, sequence, key=lambda one: one.rank)

    def _check_queue(self, sequence: Sequence) -> None:
        limit = self._config.max_waiting
        if limit is None:
            return
        n_present = sum(one.n_slots for one in (*self.running, *self.waiting))
        room = self._config.max_batch_size + limit - n_present
        if sequence.n_slots > room:
            raise QueueFullError(
                f"the engine has {n_present} requests and takes {self._config.max_batch_size + limit} (max_batch_size "
                f"{self._config.max_batch_size} and max_waiting {limit}), which leaves no room for {sequence.n_slots} "
                "more; try again when some have finished, or give a larger max_waiting"
            )

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
        for one in computing:
            shared = min(common_prefix(one.token_ids, sequence.token_ids), limit)
            if one.n_computed < shared and shared >= worth:
                if one.priority < sequence.priority:  # who does the work of an urgent one is as urgent
                    self._raise(one, sequence.priority)
                return True
        return False

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
        sequence = sequence.leader or sequence
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
        plan.slices = [one for one in plan.slices if one.sequence not in sequence.pair]
        self.remove(sequence)


def _timeout_error(sequence: Sequence) -> RequestTimeoutError:
    if sequence.n_new:
        done = f"it had {sequence.n_new} of at most {sequence.max_new_tokens} new tokens"
    elif sequence.n_cached_tokens is None:
        done = "it was still waiting"
    else:
        done = f"{min(sequence.n_computed, sequence.n_prompt)} of {sequence.n_prompt} prompt tokens were computed"
    return RequestTimeoutError(
        f"the request did not finish within its timeout_s of {sequence.timeout_s:g} s: {done}; allow more time, ask "
        "for fewer tokens, or give it a higher priority"
    )
