"""Random operations on an engine over the toy model, each followed by a check of everything that can be checked.

The toy model's next token is a hash of all tokens before it, read through the pages of the cache. So every request's
text is known from its prompt alone, and a page that was mixed up, lost or written twice shows as a wrong token. Prompts
share beginnings at random places and carry a needle of their own.
"""

from __future__ import annotations

import dataclasses
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np

from exl2_rag.errors import (
    ConstraintError,
    ContextOverflowError,
    EngineError,
    Exl2RagError,
    PinLimitError,
    QueueFullError,
    RequestTimeoutError,
)
from exl2_rag.llm.engine import Engine, Update
from exl2_rag.llm.request import GenerationRequest, SamplingParams
from exl2_rag.llm.sequence import Evaluation, Sequence, State
from exl2_rag.llm.speculation.speculator import Speculator
from tests.llm.speculation.drafts import FreeRows, Guesses
from tests.support.toy_model import EOS, VOCAB, ToyModel, toy_engine, toy_logits, toy_text

MAX_LEN = 72


class Odd:
    """A constraint: only odd tokens, an end wherever one is chosen; gives up after `fail_after` tokens."""

    def __init__(self, fail_after: int | None = None) -> None:
        self.fail_after = fail_after
        self.n_taken = 0
        self.is_finished = False

    def compile(self, tokenizer: object, vocab_size: int) -> Odd:
        return Odd(self.fail_after)

    def fill_mask(self) -> np.ndarray:
        if self.fail_after is not None and self.n_taken >= self.fail_after:
            raise ConstraintError("the grammar gives up")
        return np.arange(VOCAB) % 2 == 1

    def advance(self, token_id: int) -> None:
        assert token_id % 2 == 1
        self.n_taken += 1

    def rollback(self, n_tokens: int) -> None:
        assert 0 <= n_tokens <= self.n_taken
        self.n_taken -= n_tokens

    def count_allowed(self, token_ids: list[int]) -> int:
        return next((place for place, one in enumerate(token_ids) if one % 2 == 0), len(token_ids))

    def forced_tokens(self) -> list[int]:
        return [7, 9] if self.n_taken in (0, 5) else []


@cache
def greedy_token(tokens: tuple[int, ...]) -> int:
    return int(toy_logits(tokens).argmax())


@dataclass
class Tracked:
    """What is known of a sequence from its request alone, and what came of it so far."""

    request: GenerationRequest | None  # None: only computes its prompt
    prompt: tuple[int, ...]
    index: int = 0
    token_ids: list[int] = field(default_factory=list)
    may_fail: tuple[type[Exl2RagError], ...] = ()
    alone: list[int] | None = None
    rows: dict[int, list[float]] = field(default_factory=dict)


class EngineFuzz:
    """Carries out random operations.

    Args:
        seed: names the whole run.
        has_drafts: sequences get drafts of their next tokens, of which some are wrong.
        speculator: gives drafts of its own instead.
        sizes: fields of `EngineConfig`; the defaults are tight in every respect.
    """

    def __init__(
        self, seed: int, *, has_drafts: bool = False, speculator: Speculator | None = None, **sizes: Any
    ) -> None:
        self.random = random.Random(seed)
        self.model = ToyModel()
        self.sizes = {
            "max_seq_len": MAX_LEN,
            "n_pages": 40,
            "max_batch_size": 5,
            "max_batched_tokens": 24,
            "prefill_beside_decode": 9,
            "max_waiting": 25,
            "max_overtakes": 3,
            **sizes,
        }
        if has_drafts:
            speculator = Speculator(Guesses(_guess, wrong=0.2, seed=seed), costs=FreeRows())
        self.engine: Engine = toy_engine(self.model, speculator=speculator, **self.sizes)
        self.live: dict[Sequence, Tracked] = {}
        self.pins: list[Sequence] = []
        self.counts: Counter[str] = Counter()
        self._prefixes = [tuple(self._tokens(self.random.randrange(1, 40))) for _ in range(8)]
        self._n_needles = 0
        self._operations: dict[Callable[[], None], int] = {
            self.step: 500,
            self.submit: 130,
            self.submit_several: 25,
            self.submit_evaluation: 10,
            self.abort: 30,
            self.pin: 8,
            self.unpin: 12,
            self.expire: 6,
            self.evict: 6,
            self.break_logits: 4,
            self.fail_step: 1,
            self.refuse: 5,
            self.new_prefix: 6,
        }

    def run(self, n_operations: int, *, drain_every: int = 1000) -> None:
        """Carry out so many operations, check after each, and come to an end."""
        for done in range(n_operations):
            operation = self.random.choices(list(self._operations), list(self._operations.values()))[0]
            operation()
            self.counts[operation.__name__] += 1
            self.check()
            if done % drain_every == drain_every - 1:
                self.drain()
        self.drain()

    # --- operations --------------------------------------------------------------------------------------------------

    def step(self) -> None:
        self._take(self.engine.step())

    def submit(self) -> None:
        self._submit(self._request(1))

    def submit_several(self) -> None:
        self._submit(self._request(self.random.randrange(2, 5)))

    def submit_evaluation(self) -> None:
        prompt = self._prompt()
        tracked = Tracked(None, prompt)
        is_bad = self.random.random() < 0.3

        def receive(first: int, logits: Any) -> None:
            if is_bad:
                raise ValueError("the receiver fails")
            tracked.rows.update({first + n: row for n, row in enumerate(logits.tolist())})

        if is_bad:
            tracked.may_fail = (EngineError,)
        evaluation = Evaluation(self.random.randrange(len(prompt)), receive)
        self._add(self.engine.prepare_prompt(prompt, evaluation=evaluation), tracked)

    def abort(self) -> None:
        if not self.live:
            return
        sequence = self.random.choice(list(self.live))
        before = self.engine.report().running_pages
        own = self._pages_of_its_own(sequence)
        self.engine.abort(sequence)
        assert self.engine.report().running_pages == before - own
        self._forget(sequence, "aborted")
        if not sequence.has_forked:
            for branch in sequence.branches:
                self._forget(branch, "aborted")

    def pin(self) -> None:
        if len(self.pins) < 3:
            prompt = self._prompt()[:16]
            self._add(self.engine.prepare_prompt(prompt, keep_pages=True), Tracked(None, prompt))

    def unpin(self) -> None:
        if self.pins:
            self.engine.unpin(self.pins.pop(self.random.randrange(len(self.pins))))

    def expire(self) -> None:
        """Let the time of one request be over."""
        timed = [one for one in self.live if one.timeout_s is not None and one.state is not State.NEW]
        if timed:
            sequence = self.random.choice(timed)
            sequence.deadline = 0.0
            self._may_fail(sequence, RequestTimeoutError)
            self.step()
            assert sequence not in self.live

    def evict(self) -> None:
        """Forget cached pages: all, or of one text, of one tenant or of all."""
        before = self.engine.report()
        text = self.random.choice((None, self.random.choice(self._prefixes)))
        n_pages = self.engine.evict(
            text, cache_salt=self.random.choice((None, "one")), all_salts=self.random.random() < 0.5
        )
        after = self.engine.report()
        assert after.free_pages == before.free_pages + n_pages
        assert (after.running_pages, after.pinned_pages) == (before.running_pages, before.pinned_pages)

    def break_logits(self) -> None:
        """One step whose logits are NaN for whoever ends with a certain token."""
        self.model.nan_after = self.random.randrange(VOCAB)
        self.step()
        self.model.nan_after = None
        for sequence, tracked in list(self.live.items()):
            if tracked.request is None and any(row != row for rows in tracked.rows.values() for row in rows):
                self.engine.abort(sequence)  # an evaluation hands out what it gets
                self._forget(sequence, "aborted")

    def fail_step(self) -> None:
        """A step that fails as a whole: everything outstanding is told so and gone, the engine starts afresh."""
        if not self.engine.has_work:
            return
        self.model.fail_next = MemoryError("no room")
        try:
            self._take(self.engine.step())
        except MemoryError:
            self.engine.reset()
            for sequence in list(self.live):
                self._forget(sequence, "failed with the step")
            self.pins.clear()
        finally:
            self.model.fail_next = None

    def refuse(self) -> None:
        """Requests that can never run are refused, and leave nothing behind."""
        for prompt in ((), (VOCAB,), tuple(self._tokens(MAX_LEN))):
            try:
                self.engine.prepare(GenerationRequest(prompt))
            except (ContextOverflowError, Exl2RagError):
                continue
            raise AssertionError(f"{prompt} was not refused")

    def new_prefix(self) -> None:
        self._prefixes[self.random.randrange(len(self._prefixes))] = tuple(self._tokens(self.random.randrange(1, 40)))

    # --- checks ------------------------------------------------------------------------------------------------------

    def check(self) -> None:
        """Books of the page table, of the scheduler, and of what was asked against what is there."""
        self.engine.check_integrity()
        scheduler = self.engine._scheduler
        assert len(scheduler.running) <= self.sizes["max_batch_size"]
        for queue, state in ((scheduler.waiting, State.WAITING), (scheduler.running, State.RUNNING)):
            assert all(one.state is state for one in queue)
            assert [one.rank for one in queue] == sorted(one.rank for one in queue)
            assert all((one.held is not None) == (state is State.RUNNING) for one in queue)
        unborn = [branch for one in self.live if not one.has_forked for branch in one.branches]
        unborn = [one for one in unborn if one.state is State.NEW]
        present = [*scheduler.waiting, *scheduler.running, *unborn]
        assert len(set(present)) == len(present)
        assert set(present) == set(self.live), "a request was lost, or came back"
        assert set(self.pins) == set(scheduler.pins)
        for sequence, tracked in self.live.items():
            assert tuple(sequence.token_ids[: len(tracked.prompt)]) == tracked.prompt

    def drain(self) -> None:
        """Step until nothing is left to do; then nothing may be held but by pins."""
        for _ in range(20_000):
            if not self.engine.has_work:
                break
            self.step()
            self.check()
        assert not self.live, "requests are left though the engine has no work"
        while self.pins:
            self.engine.unpin(self.pins.pop())
        report = self.engine.report()
        assert report.running_requests == report.waiting_requests == 0
        assert report.running_pages == report.pinned_pages == 0
        assert report.free_pages + report.cached_pages == report.pages
        self.check()

    # --- inside ------------------------------------------------------------------------------------------------------

    def _tokens(self, n: int) -> list[int]:
        return [self.random.randrange(1, VOCAB) for _ in range(n)]

    def _prompt(self) -> tuple[int, ...]:
        prefix = self.random.choice(self._prefixes)
        prefix = prefix[: self.random.randrange(len(prefix) + 1)] if self.random.random() < 0.5 else prefix
        self._n_needles += 1
        needle = [1 + self._n_needles % 90, 1 + self._n_needles // 90 % 90] if self.random.random() < 0.8 else []
        return (*prefix, *needle, *self._tokens(self.random.randrange(0 if prefix or needle else 1, 12)))

    def _request(self, n: int) -> GenerationRequest:
        roll = self.random.random
        sampling = SamplingParams(
            max_tokens=self.random.choice((1, 2, 3, 8, 20, None)),
            temperature=0.0 if roll() < 0.8 else 1.3,
            seed=self.random.randrange(2**40),
            stop_token_ids=(self.random.randrange(VOCAB),) if roll() < 0.2 else (),
            ignore_eos=roll() < 0.7,
            banned_strings=(toy_text(self._tokens(self.random.randrange(1, 3))),) if roll() < 0.15 else (),
            n=n,
        )
        constraint: Any = None
        if roll() < 0.12:
            constraint = Odd(self.random.randrange(4) if roll() < 0.4 else None)
        return GenerationRequest(
            self._prompt(),
            sampling,
            constraint,
            cache_salt=self.random.choice((None, None, None, "one", "two")),
            priority=self.random.choice((0, 0, 0, 1, 2, -1)),
            timeout_s=1000.0 if roll() < 0.2 else None,
        )

    def _submit(self, request: GenerationRequest) -> None:
        sequence = self.engine.prepare(request)
        may_fail = (
            (ConstraintError,) if request.constraint is not None and request.constraint.fail_after is not None else ()
        )  # type: ignore[attr-defined]
        self._add(sequence, Tracked(request, request.token_ids, may_fail=may_fail))

    def _add(self, sequence: Sequence, tracked: Tracked) -> None:
        try:
            self.engine.add(sequence)
        except PinLimitError:
            assert sequence.keep_pages
            assert self.pins
            self.counts["pin limit"] += 1
            self.engine.abort(sequence)
            return
        except QueueFullError:
            self.counts["queue full"] += 1
            scheduler = self.engine._scheduler
            n_present = sum(one.n_slots for one in (*scheduler.waiting, *scheduler.running))
            assert n_present + sequence.n_slots > self.sizes["max_batch_size"] + self.sizes["max_waiting"]
            self.engine.abort(sequence)
            return
        self.live[sequence] = tracked
        for branch in sequence.branches:
            self.live[branch] = Tracked(tracked.request, tracked.prompt, branch.index, may_fail=tracked.may_fail)

    def _may_fail(self, sequence: Sequence, error: type[Exl2RagError]) -> None:
        for one in (sequence, *(() if sequence.has_forked else sequence.branches)):
            if one in self.live:
                self.live[one].may_fail = (*self.live[one].may_fail, error)

    def _take(self, updates: list[Update]) -> None:
        for update in updates:
            tracked = self.live[update.sequence]
            if update.error is not None:
                no_room = "found no room in the KV cache" in str(update.error) and self.pins
                is_broken = "holds nan" in str(update.error) and self.model.nan_after is not None
                assert no_room or is_broken or isinstance(update.error, tracked.may_fail), update.error
                self._forget(update.sequence, type(update.error).__name__)
                if not update.sequence.has_forked:
                    for branch in update.sequence.branches:
                        self._forget(branch, "failed before it began")
                continue
            assert update.piece is not None
            tracked.token_ids += update.piece.token_ids
            self._compare(update.sequence, tracked, is_last=update.is_last)
            if update.is_last:
                assert update.piece.usage is not None
                assert update.piece.usage.prompt_tokens == len(tracked.prompt)
                if update.sequence.keep_pages:
                    self.pins.append(update.sequence)
                self._forget(update.sequence, "finished")

    def _forget(self, sequence: Sequence, why: str) -> None:
        if self.live.pop(sequence, None) is not None:
            self.counts[why] += 1
        assert sequence.state is State.ENDED

    def _compare(self, sequence: Sequence, tracked: Tracked, *, is_last: bool) -> None:
        """What came so far is how the request's text begins when it runs alone; at the end, all of it."""
        if tracked.request is None:
            assert not tracked.token_ids
            for place, row in tracked.rows.items():
                assert row == toy_logits(tracked.prompt[: place + 1]).tolist(), "logits of another text"
            return
        expected = self._expected(sequence, tracked)
        if is_last:
            assert tracked.token_ids == expected, (tracked.prompt, tracked.token_ids, expected)
        else:
            assert tracked.token_ids == expected[: len(tracked.token_ids)]

    def _expected(self, sequence: Sequence, tracked: Tracked) -> list[int]:
        request = tracked.request
        assert request is not None
        sampling = request.sampling
        if sampling.temperature > 0 or sampling.banned_strings or request.constraint is not None:
            if tracked.alone is None:
                tracked.alone = _alone(request, sequence.seed)
            return tracked.alone
        tokens = list(tracked.prompt)
        limit = MAX_LEN - len(tokens)
        stop = {*request.sampling.stop_token_ids, *(() if request.sampling.ignore_eos else (EOS,))}
        for _ in range(limit if request.sampling.max_tokens is None else min(limit, request.sampling.max_tokens)):
            tokens.append(greedy_token(tuple(tokens)))
            if tokens[-1] in stop:
                break
        return tokens[len(tracked.prompt) :]

    def _pages_of_its_own(self, sequence: Sequence) -> int:
        """Pages that only this sequence holds."""
        if sequence.held is None:
            return 0
        pages = self.engine._scheduler.table.pages
        return sum(pages[index].n_holders == 1 for index in sequence.held.pages)


def _guess(sequence: Sequence, n: int) -> list[int]:
    """What the sequence would say greedily."""
    tokens = list(sequence.token_ids)
    for _ in range(n):
        tokens.append(greedy_token(tuple(tokens)))
    return tokens[len(sequence.token_ids) :]


def _alone(request: GenerationRequest, seed: int) -> list[int]:
    """What the request gives in an engine of its own; of one that fails, what came before."""
    engine = toy_engine(max_seq_len=MAX_LEN)
    sampling = dataclasses.replace(request.sampling, n=1, seed=seed)
    engine.add(engine.prepare(GenerationRequest(request.token_ids, sampling, request.constraint)))
    tokens: list[int] = []
    while engine.has_work:
        for update in engine.step():
            if update.piece is not None:
                tokens += update.piece.token_ids
    return tokens
