"""Everything that looks at the tokens before, or counts them, sees the same with drafts as without."""

from __future__ import annotations

from typing import Any

import pytest

from exl2_rag.llm.engine import Engine
from exl2_rag.llm.request import SamplingParams
from exl2_rag.llm.sequence import Sequence
from exl2_rag.llm.speculation.speculator import Speculator
from tests.llm.speculation.drafts import FreeRows, Guesses
from tests.llm.speculation.test_speculation import Checked
from tests.llm.test_engine import OneOf, Outcome, ask, prompt, run
from tests.support.toy_model import EOS, VOCAB, ToyModel, expected_tokens, toy_engine, toy_text

SAMPLERS: dict[str, dict[str, Any]] = {
    "penalties": {"repetition_penalty": 1.3, "frequency_penalty": 0.4, "presence_penalty": 0.3, "temperature": 0.0},
    "penalties drawn": {"repetition_penalty": 1.2, "penalty_range": 12, "penalty_decay": 6, "temperature": 1.0},
    "dry": {"dry_multiplier": 1.5, "dry_allowed_length": 1, "temperature": 0.0},
    "no repeats": {"no_repeat_ngram_size": 2, "temperature": 0.0},
    "mirostat": {"mirostat_mode": 2, "mirostat_tau": 3.0, "temperature": 1.0},
    "xtc": {"xtc_probability": 0.6, "xtc_threshold": 0.05, "temperature": 1.2},
    "bans": {"banned_tokens": tuple(range(0, VOCAB, 3)), "temperature": 0.7},
    "bias": {"logit_bias": {5: 4.0, 9: -3.0}, "temperature": 1.0},
    "min tokens": {"min_tokens": 25, "temperature": 1.0, "ignore_eos": False, "stop_token_ids": tuple(range(40))},
    "banned strings": {"banned_strings": tuple("abcdefgh"), "temperature": 1.0},
    "logprobs": {"logprobs": 2, "temperature": 1.0},
}


def drafting(texts: list[list[int]], wrong: float) -> Engine:
    """An engine whose drafts are what was said before, with mistakes."""

    def guess(sequence: Sequence, length: int) -> list[int]:
        tokens = sequence.token_ids
        found = next((one for one in texts if one[: len(tokens)] == tokens), expected_tokens(tokens, length, context=1))
        return found[len(tokens) : len(tokens) + length] if found[: len(tokens)] == tokens else found

    model = ToyModel(context=1)
    return toy_engine(model, speculator=Speculator(Guesses(guess, wrong=wrong), costs=FreeRows()), n_pages=200)


def both(sampling: SamplingParams, constraint: Any = None, checked: Any = None) -> tuple[Outcome, Outcome]:
    prompts = [prompt(first, 8) for first in (3, 4, 5)]
    plain = toy_engine(ToyModel(context=1), n_pages=200)
    expected = run(plain, *[ask(plain, one, sampling, constraint) for one in prompts])
    texts = [[*one, *outcome.token_ids] for one, outcome in zip(prompts, expected, strict=True)]
    engine = drafting(texts, 0.15)
    outcomes = run(engine, *[ask(engine, one, sampling, checked) for one in prompts])
    for one, other in zip(outcomes, expected, strict=True):
        assert one.token_ids == other.token_ids
        assert one.text == other.text
        assert one.last.finish_reason == other.last.finish_reason
    assert engine.report().accepted_draft_tokens > 10
    return outcomes[0], expected[0]


@pytest.mark.parametrize("name", SAMPLERS)
def test_samplers_that_remember_draw_the_same(name: str) -> None:
    for seed in range(2):
        both(SamplingParams(**{"max_tokens": 40, "seed": seed, "ignore_eos": True, **SAMPLERS[name]}))


def test_logprobs_come_with_every_token_and_are_the_same() -> None:
    outcome, expected = both(SamplingParams(max_tokens=30, temperature=1.0, seed=3, ignore_eos=True, logprobs=2))
    measured = [one for piece in outcome.pieces for one in piece.logprobs or ()]
    assert measured == [one for piece in expected.pieces for one in piece.logprobs or ()]
    assert [one.token_id for one in measured] == outcome.token_ids


def test_forced_tokens_are_measured_the_same() -> None:
    options = [[5, 6, 7, 8, 9, 10], [5, 6, 7, 11, 12, 13], [5, 8, 8, 8, 1, 2]]
    how = SamplingParams(max_tokens=20, temperature=1.0, seed=1, logprobs=1)
    outcome, expected = both(how, OneOf(*options), Checked(*options))
    measured = [one for piece in outcome.pieces for one in piece.logprobs or ()]
    assert measured == [one for piece in expected.pieces for one in piece.logprobs or ()]


def test_several_continuations_of_a_prompt_are_the_same() -> None:
    how = SamplingParams(max_tokens=20, temperature=1.0, seed=3, ignore_eos=True, n=3)
    found = []
    for speculator in (None, Speculator(Guesses(lambda one, n: [one.token_ids[-1]] * n, wrong=0.5), costs=FreeRows())):
        engine = toy_engine(ToyModel(context=1), speculator=speculator, n_pages=200)
        sequence = ask(engine, prompt(3, 8), how)
        texts: dict[int, str] = {}
        while engine.has_work:
            for update in engine.step():
                assert update.piece is not None
                texts[update.piece.index] = texts.get(update.piece.index, "") + update.piece.text
            engine.check_integrity()
        assert sequence.token_ids[8:] == [ord(character) - ord("A") for character in texts[0]]
        found.append(texts)
    assert found[0] == found[1]
    assert len(set(found[0].values())) == 3


def test_stop_strings_end_the_text_within_a_draft() -> None:
    tokens = expected_tokens(prompt(3, 8), 30, context=1)
    stop = (toy_text(tokens[11:14]),)
    both(SamplingParams(max_tokens=30, temperature=0.0, stop=stop, ignore_eos=True, stop_token_ids=(EOS,)))


@pytest.mark.parametrize("banned", [(), tuple("abcdefgh")])
def test_guided_text_is_left_alone_and_goes_back_as_a_pair(banned: tuple[str, ...]) -> None:
    how = SamplingParams(
        max_tokens=40,
        temperature=0.8,
        seed=2,
        ignore_eos=True,
        cfg_scale=1.5,
        negative_prompt=(7, 8, 9),
        banned_strings=banned,
    )
    prompts = [prompt(first, 8) for first in (3, 4)]
    plain = toy_engine(ToyModel(context=3), n_pages=200)
    expected = run(plain, *[ask(plain, one, how) for one in prompts])
    engine = toy_engine(
        ToyModel(context=3),
        speculator=Speculator(Guesses(lambda one, n: [1] * n, wrong=0), costs=FreeRows()),
        n_pages=200,
    )
    sequences = [ask(engine, one, how) for one in prompts]
    outcomes = run(engine, *sequences)
    assert [one.token_ids for one in outcomes] == [one.token_ids for one in expected]
    assert engine.report().draft_tokens == 0
    assert not any(string in outcome.text.lower() for outcome in outcomes for string in banned)
    assert bool(banned) == any(one.n_bans for one in sequences)
