from __future__ import annotations

import itertools
import random
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from exl2_rag.errors import ConstraintError, ContextOverflowError, EngineError, Exl2RagError, RequestError
from exl2_rag.llm.engine import Engine
from exl2_rag.llm.request import GenerationRequest, SamplingParams, StreamPiece
from exl2_rag.llm.sequence import Evaluation, Sequence
from tests.support.toy_model import EOS, VOCAB, ToyModel, expected_tokens, toy_engine, toy_logits, toy_text

GREEDY = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True)


def greedy(n: int, **options: Any) -> SamplingParams:
    return SamplingParams(**{"max_tokens": n, "temperature": 0, "ignore_eos": True, **options})


def ask(engine: Engine, prompt: list[int], sampling: SamplingParams = GREEDY, constraint: Any = None) -> Sequence:
    sequence = engine.prepare(GenerationRequest(tuple(prompt), sampling, constraint))
    engine.add(sequence)
    return sequence


@dataclass
class Outcome:
    pieces: list[StreamPiece]
    error: Exl2RagError | None = None

    @property
    def token_ids(self) -> list[int]:
        return [token_id for piece in self.pieces for token_id in piece.token_ids]

    @property
    def text(self) -> str:
        return "".join(piece.text for piece in self.pieces)

    @property
    def last(self) -> StreamPiece:
        return self.pieces[-1]


def run(engine: Engine, *sequences: Sequence) -> list[Outcome]:
    """Step until there is no more work; the books are checked after every step."""
    outcomes = {sequence: Outcome([]) for sequence in sequences}
    for _ in range(3000):
        if not engine.has_work:
            return list(outcomes.values())
        for update in engine.step():
            if update.piece is not None:
                outcomes[update.sequence].pieces.append(update.piece)
            if update.error is not None:
                outcomes[update.sequence].error = update.error
        engine.check_integrity()
    raise AssertionError("the engine does not come to an end")


def prompt(first: int, length: int) -> list[int]:
    return [first, *((first * 7 + n * 5) % VOCAB for n in range(length - 1))]


# --- greedy text: alone, batched, after a prefix hit, after a preemption --------------------------------------------


def test_greedy_tokens_are_those_of_the_model_alone() -> None:
    engine = toy_engine()
    outcome = run(engine, ask(engine, prompt(3, 50)))[0]
    assert outcome.token_ids == expected_tokens(prompt(3, 50), 12)
    assert outcome.text == toy_text(outcome.token_ids)
    assert outcome.last.finish_reason == "length"
    assert outcome.last.usage is not None
    assert (outcome.last.usage.prompt_tokens, outcome.last.usage.completion_tokens) == (50, 12)


def test_a_batch_gives_each_the_tokens_it_gets_alone() -> None:
    engine = toy_engine()
    prompts = [prompt(first, length) for first, length in ((1, 3), (2, 40), (3, 17), (4, 90), (5, 1), (6, 4), (1, 60))]
    outcomes = run(engine, *[ask(engine, one) for one in prompts])
    for one, outcome in zip(prompts, outcomes, strict=True):
        assert outcome.token_ids == expected_tokens(one, 12)


def test_a_prefix_hit_changes_no_token_and_is_exact_to_the_token() -> None:
    model = ToyModel()
    engine = toy_engine(model)
    shared = prompt(9, 70)
    run(engine, ask(engine, [*shared, 1, 2, 3]))
    for length in (1, 3, 4, 5, 69, 70):
        before = model.n_computed
        one = [*shared[:length], 50, 51]
        outcome = run(engine, ask(engine, one))[0]
        assert outcome.token_ids == expected_tokens(one, 12)
        assert outcome.last.usage is not None
        assert outcome.last.usage.cached_tokens == length
        assert model.n_computed - before == len(one) - length + 11


def test_the_last_prompt_token_is_always_computed() -> None:
    engine = toy_engine()
    for cached in (0, 63, 63):
        outcome = run(engine, ask(engine, prompt(2, 64)))[0]
        assert outcome.token_ids == expected_tokens(prompt(2, 64), 12)
        assert outcome.last.usage is not None
        assert outcome.last.usage.cached_tokens == cached


def test_a_generated_continuation_can_be_reused_as_a_prefix() -> None:
    engine = toy_engine()
    first = run(engine, ask(engine, prompt(4, 10)))[0]
    longer = [*prompt(4, 10), *first.token_ids, 8]
    second = run(engine, ask(engine, longer))[0]
    assert second.token_ids == expected_tokens(longer, 12)
    assert second.last.usage is not None
    assert second.last.usage.cached_tokens == 10 + 11  # the last token was sampled, but never computed


def test_sixteen_requests_submitted_together_compute_their_prefix_once_and_hold_it_once() -> None:
    model = ToyModel()
    engine = toy_engine(model, max_batch_size=16, n_pages=128)
    shared = prompt(9, 102)
    sequences = [ask(engine, [*shared, n, n]) for n in range(16)]
    outcomes: dict[Sequence, list[int]] = {sequence: [] for sequence in sequences}
    most_held = 0
    while engine.has_work:
        for update in engine.step():
            assert update.piece is not None
            outcomes[update.sequence] += update.piece.token_ids
        report = engine.report()
        if report.running_requests == 16:
            most_held = max(most_held, report.running_pages)
    assert most_held <= 25 + 16 * 5
    assert model.n_computed == 102 + 16 * (2 + 11)
    for n, sequence in enumerate(sequences):
        assert outcomes[sequence] == expected_tokens([*shared, n, n], 12)
        assert sequence.usage().cached_tokens == (102 if n else 0)


@pytest.mark.parametrize("seed", range(4))
def test_a_tiny_cache_preempts_and_still_gives_the_same_tokens(seed: int) -> None:
    rng = random.Random(seed)
    engine = toy_engine(n_pages=14, max_seq_len=50)
    prompts = [[rng.choice((1, 2)) for _ in range(rng.randrange(1, 25))] for _ in range(12)]
    samplings = [greedy(rng.randrange(5, 25)) for _ in prompts]
    outcomes = run(engine, *[ask(engine, one, how) for one, how in zip(prompts, samplings, strict=True)])
    assert engine.report().preemptions > 0
    for one, how, outcome in zip(prompts, samplings, outcomes, strict=True):
        assert how.max_tokens is not None
        assert outcome.token_ids == expected_tokens(one, how.max_tokens)
        assert outcome.last.usage is not None
        assert outcome.last.usage.cached_tokens < len(one)


def test_sampling_with_a_seed_gives_the_same_tokens_alone_batched_and_preempted() -> None:
    how = SamplingParams(max_tokens=20, temperature=1.3, top_p=0.9, seed=42, ignore_eos=True)
    alone = toy_engine()
    expected = run(alone, ask(alone, prompt(5, 20), how))[0].token_ids
    assert expected != expected_tokens(prompt(5, 20), 20)
    crowded = toy_engine(n_pages=16, max_seq_len=60)
    others = [ask(crowded, prompt(first, 12), greedy(20)) for first in (1, 2, 3)]
    outcome = run(crowded, *others, ask(crowded, prompt(5, 20), how))[-1]
    assert crowded.report().preemptions > 0
    assert outcome.token_ids == expected


def test_without_a_seed_every_request_draws_afresh() -> None:
    engine = toy_engine()
    how = SamplingParams(max_tokens=20, temperature=2.0, ignore_eos=True)
    first, second = run(engine, ask(engine, prompt(1, 5), how), ask(engine, prompt(1, 5), how))
    assert first.token_ids != second.token_ids


# --- the end of a text ----------------------------------------------------------------------------------------------


def test_an_end_of_sequence_id_ends_the_text_and_is_no_part_of_it() -> None:
    engine = toy_engine()
    start = next(first for first in range(1, VOCAB) if EOS in expected_tokens([first], 40)[1:])
    tokens = expected_tokens([start], 40)
    end = tokens.index(EOS)
    outcome = run(engine, ask(engine, [start], greedy(40, ignore_eos=False)))[0]
    assert outcome.token_ids == tokens[: end + 1]
    assert outcome.text == toy_text(tokens[:end])
    assert outcome.last.finish_reason == "stop"


def test_a_stop_id_of_the_request_ends_the_text_too() -> None:
    engine = toy_engine()
    tokens = expected_tokens(prompt(1, 5), 12)
    outcome = run(engine, ask(engine, prompt(1, 5), greedy(12, stop_token_ids=(tokens[4],))))[0]
    assert outcome.token_ids == tokens[: tokens.index(tokens[4]) + 1]
    assert outcome.last.finish_reason == "stop"


def test_nothing_of_a_stop_string_leaves_the_engine_though_it_spans_tokens() -> None:
    engine = toy_engine()
    tokens = expected_tokens(prompt(1, 5), 12)
    stop = toy_text(tokens[5:8])
    sequence = ask(engine, prompt(1, 5), greedy(12, stop=(stop, "never")))
    outcome = run(engine, sequence)[0]
    assert outcome.text == toy_text(tokens[:5])
    assert outcome.token_ids == tokens[:8]
    assert outcome.last.finish_reason == "stop"


def test_the_context_limit_ends_a_text_with_length() -> None:
    engine = toy_engine(max_seq_len=30)
    for max_tokens in (None, 1000):
        outcome = run(engine, ask(engine, prompt(1, 25), greedy(5, max_tokens=max_tokens)))[0]
        assert outcome.token_ids == expected_tokens(prompt(1, 25), 5)
        assert outcome.last.finish_reason == "length"


def test_pieces_join_to_the_whole_and_only_the_last_has_usage() -> None:
    engine = toy_engine()
    outcome = run(engine, ask(engine, prompt(1, 5)))[0]
    assert len(outcome.pieces) == 12
    assert all(piece.usage is None and piece.finish_reason is None for piece in outcome.pieces[:-1])
    assert outcome.last.timings is not None
    assert 0 <= outcome.last.timings.queued_s <= outcome.last.timings.first_token_s <= outcome.last.timings.total_s


# --- scheduling ------------------------------------------------------------------------------------------------------


def test_a_long_prompt_does_not_stall_those_who_decode() -> None:
    engine = toy_engine()
    decoding = ask(engine, prompt(1, 4), greedy(40))
    engine.step()
    ask(engine, prompt(2, 200))
    for _ in range(12):
        assert any(update.sequence is decoding for update in engine.step())


def test_a_step_stays_within_the_token_budget() -> None:
    model = ToyModel()
    engine = toy_engine(model)
    run(engine, *[ask(engine, prompt(first, 60)) for first in range(1, 9)])
    assert model.largest_step <= 32


def test_an_aborted_request_frees_its_pages_within_a_step_and_the_others_go_on() -> None:
    engine = toy_engine()
    doomed, other = ask(engine, prompt(1, 100)), ask(engine, prompt(2, 10))
    engine.step()
    assert engine.report().running_pages > 0
    engine.abort(doomed)
    engine.abort(doomed)
    engine.check_integrity()
    outcome = run(engine, other)[0]
    assert outcome.token_ids == expected_tokens(prompt(2, 10), 12)
    assert engine.report().running_pages == 0


def test_an_aborted_waiting_request_never_runs() -> None:
    model = ToyModel()
    engine = toy_engine(model, max_batch_size=1)
    ask(engine, prompt(1, 4), greedy(3))
    waiting = ask(engine, prompt(2, 50))
    engine.abort(waiting)
    while engine.has_work:
        engine.step()
    assert model.n_computed == 4 + 2


# --- what can go wrong with one request ------------------------------------------------------------------------------


def test_a_prompt_over_the_limit_is_refused_with_both_numbers() -> None:
    engine = toy_engine(max_seq_len=40)
    with pytest.raises(ContextOverflowError, match=r"60 tokens, the limit is 40 \(max_seq_len\)") as caught:
        ask(engine, prompt(1, 60))
    assert (caught.value.prompt_tokens, caught.value.limit_tokens) == (60, 40)
    with pytest.raises(ContextOverflowError, match="40 tokens, the limit is 40"):
        ask(engine, prompt(1, 40))
    assert not engine.has_work
    assert len(run(engine, ask(engine, prompt(1, 39), greedy(5)))[0].token_ids) == 1


def test_a_prompt_over_the_cache_names_the_cache() -> None:
    engine = toy_engine(n_pages=5)
    with pytest.raises(ContextOverflowError, match=r"the limit is 20 \(cache_tokens\)"):
        ask(engine, prompt(1, 21))


@pytest.mark.parametrize(
    ("token_ids", "words"), [((), "at least one token"), ((3, VOCAB), "got 97"), ((-1,), "got -1")]
)
def test_a_prompt_that_makes_no_sense_is_refused(token_ids: tuple[int, ...], words: str) -> None:
    with pytest.raises(RequestError, match=words):
        toy_engine().prepare(GenerationRequest(token_ids))


def test_broken_logits_end_one_request_alone() -> None:
    model = ToyModel()
    engine = toy_engine(model)
    tokens = expected_tokens(prompt(1, 5), 12)
    model.nan_after = tokens[3]
    doomed, other = ask(engine, prompt(1, 5)), ask(engine, [model.nan_after + 1])
    assert tokens[3] not in expected_tokens([model.nan_after + 1], 12)
    failed, fine = run(engine, doomed, other)
    assert isinstance(failed.error, EngineError)
    assert "nan" in str(failed.error)
    assert failed.token_ids == tokens[:4]
    assert fine.error is None
    assert fine.token_ids == expected_tokens([model.nan_after + 1], 12)


def test_a_step_that_fails_as_a_whole_raises_and_a_reset_makes_the_engine_usable_again() -> None:
    model = ToyModel()
    engine = toy_engine(model)
    ask(engine, prompt(1, 5))
    pinned = engine.prepare_prompt(tuple(prompt(2, 9)), keep_pages=True)
    engine.add(pinned)
    engine.step()
    model.fail_next = MemoryError("no room")
    with pytest.raises(MemoryError):
        engine.step()
    engine.reset()
    assert not engine.has_work
    engine.unpin(pinned)
    report = engine.report()
    assert report.free_pages == report.pages
    assert run(engine, ask(engine, prompt(1, 5)))[0].token_ids == expected_tokens(prompt(1, 5), 12)


# --- constraints -----------------------------------------------------------------------------------------------------


class OneOf:
    """A constraint and its matcher: the continuation is one of the given token lists, then the end."""

    def __init__(self, *options: list[int], fail_at: int | None = None) -> None:
        self.options = options
        self.taken: list[int] = []
        self.fail_at = fail_at

    def compile(self, tokenizer: object, vocab_size: int) -> OneOf:
        assert vocab_size == VOCAB
        return OneOf(*self.options, fail_at=self.fail_at)

    def _next(self) -> set[int]:
        n = len(self.taken)
        return {option[n] for option in self.options if option[:n] == self.taken and len(option) > n}

    def fill_mask(self) -> np.ndarray:
        if self.fail_at is not None and len(self.taken) >= self.fail_at:
            raise ConstraintError("the grammar gives up")
        mask = np.zeros(VOCAB, dtype=np.bool_)
        mask[list(self._next() | ({EOS} if self.accepts_end else set()))] = True
        return mask

    def advance(self, token_id: int) -> None:
        if token_id not in self._next():
            raise ConstraintError(f"{token_id} is not allowed")
        self.taken.append(token_id)

    def forced_tokens(self) -> list[int]:
        forced: list[int] = []
        while True:
            ahead = OneOf(*self.options)
            ahead.taken = self.taken + forced
            if len(ahead._next()) != 1 or ahead.accepts_end:
                return forced
            forced += ahead._next()

    @property
    def accepts_end(self) -> bool:
        return self.taken in self.options

    @property
    def is_finished(self) -> bool:
        return self.accepts_end and not self._next()


def test_a_complete_constraint_ends_with_stop() -> None:
    engine = toy_engine()
    options = ([5, 6, 7, 8], [5, 6, 9, 10, 11])
    outcome = run(engine, ask(engine, prompt(1, 5), GREEDY, OneOf(*options)))[0]
    assert outcome.token_ids in options
    assert outcome.last.finish_reason == "stop"


def test_forced_tokens_cost_no_steps_of_their_own() -> None:
    model = ToyModel()
    engine = toy_engine(model)
    forced = [(3 * n) % 50 + 1 for n in range(10)]
    outcome = run(engine, ask(engine, prompt(1, 5), GREEDY, OneOf([*forced, 60], [*forced, 61])))[0]
    best = max((60, 61), key=lambda token: float(toy_logits([*prompt(1, 5), *forced])[token]))
    assert outcome.token_ids == [*forced, best]
    assert model.n_steps == 1
    assert model.n_computed == 15


def test_tokens_forced_in_the_middle_are_computed_in_one_slice() -> None:
    model = ToyModel()
    engine = toy_engine(model)
    options = ([70, 1, 2, 3, 4, 5, 80], [70, 1, 2, 3, 4, 5, 81], [71, 6, 7, 80], [71, 6, 7, 81])
    outcome = run(engine, ask(engine, prompt(1, 5), GREEDY, OneOf(*options)))[0]
    assert model.n_steps == 2
    first, last = outcome.token_ids[0], outcome.token_ids[-1]
    logits = toy_logits(prompt(1, 5))
    assert first == max((70, 71), key=lambda token: float(logits[token]))
    logits = toy_logits([*prompt(1, 5), *outcome.token_ids[:-1]])
    assert last == max((80, 81), key=lambda token: float(logits[token]))


def test_a_constraint_with_one_text_only_needs_no_sampling() -> None:
    engine = toy_engine()
    outcome = run(engine, ask(engine, prompt(1, 5), GREEDY, OneOf([4, 5, 6])))[0]
    assert outcome.token_ids == [4, 5, 6]
    assert outcome.last.finish_reason == "stop"


def test_a_constraint_cut_off_at_max_tokens_ends_with_length() -> None:
    engine = toy_engine()
    for n in (1, 2, 3):
        outcome = run(engine, ask(engine, prompt(1, 5), greedy(n), OneOf([4, 5, 6, 7], [8, 9, 9, 9])))[0]
        assert len(outcome.token_ids) == n
        assert outcome.last.finish_reason == "length"
    outcome = run(engine, ask(engine, prompt(1, 5), greedy(4), OneOf([4, 5, 6, 7], [8, 9, 9, 9])))[0]
    assert outcome.last.finish_reason == "stop"


def test_an_end_of_sequence_id_ends_a_constrained_text_even_if_those_are_ignored() -> None:
    engine = toy_engine()
    outcome = run(engine, ask(engine, prompt(1, 5), greedy(12), OneOf([], [EOS])))[0]
    assert outcome.token_ids == [EOS]
    assert outcome.last.finish_reason == "stop"
    assert outcome.text == ""


def test_a_constraint_that_gives_up_ends_its_own_request_alone() -> None:
    engine = toy_engine()
    doomed = ask(engine, prompt(1, 5), GREEDY, OneOf([3, 4, 5, 6], [3, 5, 6, 7], fail_at=1))
    failed, fine = run(engine, doomed, ask(engine, prompt(2, 5)))
    assert isinstance(failed.error, ConstraintError)
    assert fine.token_ids == expected_tokens(prompt(2, 5), 12)
    assert engine.report().running_pages == 0


def test_a_preempted_constrained_request_goes_on_where_it_was() -> None:
    engine = toy_engine(n_pages=7)
    options = [list(one) for one in itertools.product(*[(2 * n + 1, 2 * n + 2) for n in range(8)])]
    alone = toy_engine()
    expected = run(alone, ask(alone, prompt(5, 10), greedy(30), OneOf(*options)))[0].token_ids
    other = ask(engine, prompt(1, 4), greedy(20))
    outcome = run(engine, other, ask(engine, prompt(5, 10), greedy(30), OneOf(*options)))[1]
    assert engine.report().preemptions > 0
    assert outcome.token_ids == expected


# --- computing prompts only ------------------------------------------------------------------------------------------


def test_a_warmed_prompt_is_cached_for_the_next_request() -> None:
    engine = toy_engine()
    warming = engine.prepare_prompt(tuple(prompt(1, 41)))
    engine.add(warming)
    warmed = run(engine, warming)[0]
    assert warmed.last.finish_reason == "stop"
    assert warmed.token_ids == []
    outcome = run(engine, ask(engine, [*prompt(1, 41), 3]))[0]
    assert outcome.last.usage is not None
    assert outcome.last.usage.cached_tokens == 41
    assert outcome.token_ids == expected_tokens([*prompt(1, 41), 3], 12)


def test_pinned_pages_outlive_any_load_until_released() -> None:
    engine = toy_engine(n_pages=20)
    pin = engine.prepare_prompt(tuple(prompt(1, 22)), keep_pages=True)
    engine.add(pin)
    run(engine, pin)
    assert engine.report().pinned_pages == 6
    for first in range(2, 12):
        run(engine, ask(engine, prompt(first, 40)))
    outcome = run(engine, ask(engine, [*prompt(1, 22), 5]))[0]
    assert outcome.last.usage is not None
    assert outcome.last.usage.cached_tokens == 22
    engine.unpin(pin)
    engine.unpin(pin)
    assert engine.report().pinned_pages == 0


def test_an_evaluation_gets_the_logits_of_every_token_though_they_are_cached() -> None:
    engine = toy_engine()
    tokens = prompt(3, 50)
    run(engine, ask(engine, tokens))
    rows: dict[int, Any] = {}

    def receive(first: int, logits: Any) -> None:
        rows.update({first + n: row for n, row in enumerate(logits)})

    for first_row in (0, 30):
        rows.clear()
        sequence = engine.prepare_prompt(tuple(tokens), evaluation=Evaluation(first_row, receive))
        engine.add(sequence)
        run(engine, sequence)
        assert sorted(rows) == list(range(first_row, 50))
        for place, row in rows.items():
            assert row.tolist() == toy_logits(tokens[: place + 1]).tolist()
        assert sequence.usage().cached_tokens == first_row


def test_an_evaluation_whose_receiver_fails_ends_alone() -> None:
    engine = toy_engine()

    def receive(first: int, logits: Any) -> None:
        raise ValueError("not today")

    sequence = engine.prepare_prompt(tuple(prompt(3, 5)), evaluation=Evaluation(0, receive))
    engine.add(sequence)
    failed, fine = run(engine, sequence, ask(engine, prompt(2, 5)))
    assert isinstance(failed.error, EngineError)
    assert isinstance(failed.error.__cause__, ValueError)
    assert fine.token_ids == expected_tokens(prompt(2, 5), 12)


def test_the_report_adds_up() -> None:
    engine = toy_engine()
    run(engine, ask(engine, prompt(1, 10)))
    run(engine, ask(engine, prompt(1, 10)))
    report = engine.report()
    assert (report.prompt_tokens, report.cached_tokens) == (20, 9)
    assert report.hit_rate == 9 / 20
    assert report.free_pages + report.cached_pages == report.pages
    assert report.running_requests == report.waiting_requests == 0
