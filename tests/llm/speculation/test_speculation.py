"""An engine that speculates says what one says that does not, whatever else goes on."""

from __future__ import annotations

import random
from typing import Any

import pytest

from exl2_rag.llm.engine import Engine
from exl2_rag.llm.request import SamplingParams, SpeculationUsage
from exl2_rag.llm.sequence import Sequence
from exl2_rag.llm.speculation.prompt_lookup import PromptLookup
from exl2_rag.llm.speculation.speculator import Speculator
from tests.llm.speculation.drafts import FreeRows, Guesses
from tests.llm.test_engine import OneOf, ask, greedy, prompt, run
from tests.support.toy_model import EOS, VOCAB, ToyModel, expected_tokens, toy_engine, toy_text


def right(sequence: Sequence, length: int) -> list[int]:
    return expected_tokens(sequence.token_ids, length)


def speculating(wrong: float = 0.3, seed: int = 0, **sizes: Any) -> tuple[Engine, ToyModel]:
    model = ToyModel()
    speculator = Speculator(Guesses(right, wrong=wrong, seed=seed), costs=FreeRows())
    return toy_engine(model, speculator=speculator, **sizes), model


@pytest.mark.parametrize("wrong", [0.0, 0.3, 1.0])
def test_greedy_tokens_do_not_depend_on_drafts_and_every_right_one_saves_a_step(wrong: float) -> None:
    engine, model = speculating(wrong)
    outcome = run(engine, ask(engine, prompt(3, 20), greedy(40)))[0]
    assert outcome.token_ids == expected_tokens(prompt(3, 20), 40)
    assert outcome.text == toy_text(outcome.token_ids)
    counts = outcome.last.speculation
    assert counts is not None
    assert model.n_steps == 40 - counts.accepted_tokens
    assert model.n_computed == 20 + 39 + counts.proposed_tokens - counts.accepted_tokens
    assert counts.acceptance == {0.0: 1.0, 0.3: pytest.approx(0.5, abs=0.25), 1.0: 0.0}[wrong]


@pytest.mark.parametrize("seed", range(4))
def test_batches_that_are_preempted_and_share_prefixes_say_the_same(seed: int) -> None:
    rng = random.Random(seed)
    engine, _ = speculating(0.2, seed, n_pages=16, max_seq_len=56)
    prompts = [[rng.choice((1, 2)) for _ in range(rng.randrange(1, 25))] for _ in range(10)]
    lengths = [rng.randrange(3, 25) for _ in prompts]
    outcomes = run(engine, *[ask(engine, one, greedy(n)) for one, n in zip(prompts, lengths, strict=True)])
    assert engine.report().preemptions > 0
    assert engine.report().accepted_draft_tokens > 20
    for one, n, outcome in zip(prompts, lengths, outcomes, strict=True):
        assert outcome.token_ids == expected_tokens(one, n)


def test_rows_of_rejected_drafts_are_never_reused() -> None:
    engine, _ = speculating(0.5)
    first = run(engine, ask(engine, prompt(4, 10), greedy(30)))[0]
    longer = [*prompt(4, 10), *first.token_ids, 8]
    second = run(engine, ask(engine, longer, greedy(20)))[0]
    assert second.token_ids == expected_tokens(longer, 20)
    assert second.last.usage is not None
    assert second.last.usage.cached_tokens >= 10 + 29


def test_sampled_tokens_are_those_that_are_drawn_without_drafts() -> None:
    for seed in range(5):
        how = SamplingParams(max_tokens=30, temperature=0.8, top_p=0.9, seed=seed, ignore_eos=True)
        plain = toy_engine()
        expected = run(plain, ask(plain, prompt(5, 9), how))[0].token_ids
        engine, _ = speculating(0.2, seed)
        outcome = run(engine, ask(engine, prompt(5, 9), how))[0]
        assert outcome.token_ids == expected


def test_drafts_count_in_the_budget_of_a_step() -> None:
    engine, model = speculating(0.0, max_batch_size=8)
    run(engine, *[ask(engine, prompt(first, 6), greedy(30)) for first in range(1, 9)])
    assert model.largest_step <= 32
    assert engine.report().accepted_draft_tokens > 50


def test_text_ends_where_it_would_have_ended() -> None:
    tokens = expected_tokens(prompt(1, 5), 30)
    for options in (
        {"stop": (toy_text(tokens[7:9]), "never")},
        {"stop_token_ids": (tokens[9],)},
        {"max_tokens": 7},
        {"max_tokens": 1},
    ):
        plain, (engine, _) = toy_engine(), speculating(0.0)
        how = greedy(**{"n": options.get("max_tokens", 30), **options})  # type: ignore[arg-type]
        expected, outcome = run(plain, ask(plain, prompt(1, 5), how))[0], run(engine, ask(engine, prompt(1, 5), how))[0]
        assert (outcome.token_ids, outcome.text) == (expected.token_ids, expected.text)
        assert outcome.last.finish_reason == expected.last.finish_reason


def test_an_end_of_sequence_id_is_not_drafted_but_ends_the_text() -> None:
    start = next(first for first in range(1, VOCAB) if EOS in expected_tokens([first], 40)[2:])
    engine, _ = speculating(0.0)
    outcome = run(engine, ask(engine, [start], greedy(60, ignore_eos=False)))[0]
    assert outcome.token_ids[-1] == EOS
    assert outcome.token_ids == expected_tokens([start], len(outcome.token_ids))


class Checked(OneOf):
    """A constraint that also says how much of a draft it would allow, and goes back."""

    def compile(self, tokenizer: object, vocab_size: int) -> Checked:
        return Checked(*self.options)

    def rollback(self, n_tokens: int) -> None:
        del self.taken[len(self.taken) - n_tokens :]

    def count_allowed(self, token_ids: list[int]) -> int:
        ahead = OneOf(*self.options)
        ahead.taken = list(self.taken)
        for place, token_id in enumerate(token_ids):
            if token_id not in ahead._next():
                return place
            ahead.taken.append(token_id)
        return len(token_ids)


def test_a_constraint_is_obeyed_and_forced_tokens_go_together_with_drafts() -> None:
    rng = random.Random(5)
    for seed in range(6):
        stem = [rng.randrange(1, VOCAB) for _ in range(12)]
        options = [[*stem[:n], *(rng.randrange(1, VOCAB) for _ in range(12))] for n in (0, 3, 3, 7, 9, 9)]
        plain = toy_engine()
        expected = run(plain, ask(plain, [1, 2], greedy(40), OneOf(*options)))[0]
        text = expected.token_ids

        def guess(sequence: Sequence, length: int, text: list[int] = text) -> list[int]:
            return text[sequence.n_new : sequence.n_new + length]

        speculator = Speculator(Guesses(guess, wrong=0.2, seed=seed), costs=FreeRows())
        engine = toy_engine(speculator=speculator)
        outcome = run(engine, ask(engine, [1, 2], greedy(40), Checked(*options)))[0]
        assert outcome.token_ids == text
        assert outcome.last.finish_reason == expected.last.finish_reason


def test_a_request_may_ask_to_be_left_alone() -> None:
    engine, model = speculating(0.0)
    outcome = run(engine, ask(engine, prompt(3, 20), greedy(10, speculate=False)))[0]
    assert outcome.token_ids == expected_tokens(prompt(3, 20), 10)
    assert outcome.last.speculation == SpeculationUsage(0, 0, 0)
    assert model.n_steps == 10


def test_without_a_speculator_nothing_is_said_about_it() -> None:
    engine = toy_engine()
    assert run(engine, ask(engine, prompt(3, 20)))[0].last.speculation is None
    assert engine.report().draft_tokens == 0


# --- prompt lookup ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_a_text_that_repeats_what_came_before_takes_fewer_steps_and_is_the_same(seed: int) -> None:
    rng = random.Random(seed)
    model = ToyModel(context=1)  # which goes in circles
    engine = toy_engine(model, speculator=Speculator(PromptLookup(), costs=FreeRows()), n_pages=200)
    prompts = [[rng.randrange(VOCAB) for _ in range(9)] for _ in range(6)]
    outcomes = run(engine, *[ask(engine, one, greedy(60)) for one in prompts])
    for one, outcome in zip(prompts, outcomes, strict=True):
        assert outcome.token_ids == expected_tokens(one, 60, context=1)
    assert model.n_steps < 45
    assert engine.report().accepted_draft_tokens > 100


def test_what_never_comes_true_is_soon_left() -> None:
    rng = random.Random(2)
    proposer = PromptLookup()
    words = [rng.randrange(3) for _ in range(400)]
    sequence = Sequence(tuple(words[:100]), max_new_tokens=500, sampling=SamplingParams())
    before = proposer.chances([sequence], [1])[0]
    for word in words[100:]:
        guess = proposer.propose([sequence], [1])[0]
        sequence.token_ids.append(word if [word] != guess else word + 1)
        after = proposer.chances([sequence], [1])[0]
    assert before[0] == 0.5
    assert not after or after[0] < 0.15
    other = Sequence(tuple(words[:100]), max_new_tokens=500, sampling=SamplingParams())
    assert proposer.chances([other], [1])[0][0] < 0.3  # it starts from what was learned with the first


def test_a_sequence_that_gave_up_tokens_is_followed_on_its_new_way() -> None:
    proposer = PromptLookup()
    sequence = Sequence((1, 2, 3, 4, 5, 9, 8), max_new_tokens=50, sampling=SamplingParams())
    for taken, n_given_up, follow in (([1, 2], 0, [3, 4]), ([3, 7], 1, [4, 5]), ([7, 7, 7], 3, [4, 5])):
        sequence.token_ids += taken
        proposer.chances([sequence], [4])
        del sequence.token_ids[len(sequence.token_ids) - n_given_up :]
        assert len(proposer.chances([sequence], [2])[0]) == 2
        assert proposer.propose([sequence], [2]) == [follow]
