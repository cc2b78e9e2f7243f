"""Sampling as the engine does it: history, minimum length, bans, log-probabilities, and one request beside another."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from exl2_rag import SamplingParams
from exl2_rag.errors import EngineError, RequestError
from exl2_rag.llm.logprobs import TokenLogprob
from tests.llm.test_engine import OneOf, Outcome, ask, greedy, prompt, run
from tests.support.toy_model import EOS, VOCAB, ToyModel, expected_tokens, toy_engine, toy_logits

PROMPT = prompt(3, 20)
EVERYTHING = {
    "temperature": 1.4, "top_k": 60, "top_p": 0.98, "min_p": 0.001, "top_a": 0.01, "typical_p": 0.98, "tfs": 0.99,
    "epsilon_cutoff": 1e-4, "eta_cutoff": 1e-4, "smoothing_factor": 0.1, "xtc_probability": 0.3, "mirostat_mode": 2,
    "repetition_penalty": 1.2, "frequency_penalty": 0.2, "presence_penalty": 0.1, "dry_multiplier": 0.8, "skew": 0.3,
    "no_repeat_ngram_size": 3, "logit_bias": {4: 1.0}, "banned_tokens": (7,), "min_tokens": 15,
}  # fmt: skip


def everything(n: int, seed: int, **more: Any) -> SamplingParams:
    return SamplingParams(**{"max_tokens": n, "seed": seed, **EVERYTHING, **more})


def logprobs_of(outcome: Outcome) -> list[TokenLogprob]:
    return [one for piece in outcome.pieces for one in piece.logprobs or ()]


def test_greedy_text_with_a_penalty_is_that_of_the_model_alone() -> None:
    engine = toy_engine()
    outcome = run(engine, ask(engine, PROMPT, greedy(20, repetition_penalty=3.0, frequency_penalty=0.5)))[0]
    tokens = list(PROMPT)
    for _ in range(20):
        logits = toy_logits(tokens)
        for token in set(tokens):
            logits[token] = logits[token] * 3 if logits[token] < 0 else logits[token] / 3
        for token in tokens[len(PROMPT) :]:
            logits[token] -= 0.5
        tokens.append(int(logits.argmax()))
    assert outcome.token_ids == tokens[len(PROMPT) :]
    assert outcome.token_ids != expected_tokens(PROMPT, 20)


def test_no_ngram_occurs_twice() -> None:
    engine = toy_engine()
    outcome = run(engine, ask(engine, [1, 2], greedy(60, allowed_tokens=(1, 2, 3), no_repeat_ngram_size=4)))[0]
    tokens = [1, 2, *outcome.token_ids]
    grams = [tuple(tokens[place : place + 4]) for place in range(len(tokens) - 3)]
    assert len(set(grams)) == len(grams)


@pytest.mark.parametrize("seed", range(3))
def test_a_seed_gives_the_same_tokens_alone_batched_sliced_and_preempted(seed: int) -> None:
    how = everything(25, seed, ignore_eos=True)
    alone = toy_engine()
    expected = run(alone, ask(alone, PROMPT, how))[0].token_ids
    assert len(set(expected)) > 5
    crowded = toy_engine(n_pages=17, max_seq_len=60, max_batched_tokens=8, prefill_beside_decode=4)
    others = [
        ask(crowded, prompt(first, 12), everything(25, first, ignore_eos=True, xtc_probability=0.0)) for first in (1, 2)
    ]
    plain = ask(crowded, prompt(5, 9), SamplingParams(max_tokens=25, seed=1, ignore_eos=True))
    outcome = run(crowded, *others, plain, ask(crowded, PROMPT, how))[-1]
    assert crowded.report().preemptions > 0
    assert outcome.token_ids == expected


def test_requests_that_share_one_params_object_do_not_influence_each_other() -> None:
    how = everything(25, 5, ignore_eos=True)
    engine = toy_engine()
    alone = [run(engine, ask(engine, prompt(first, 6), how))[0].token_ids for first in (1, 2, 3)]
    together = run(engine, *[ask(engine, prompt(first, 6), how) for first in (1, 2, 3)])
    assert [one.token_ids for one in together] == alone


# --- the end ---------------------------------------------------------------------------------------------------------


def ends_early() -> list[int]:
    return next([first] for first in range(1, VOCAB) if EOS in expected_tokens([first], 20)[1:])


def test_an_end_id_cannot_come_before_min_tokens() -> None:
    engine = toy_engine()
    start = ends_early()
    early = run(engine, ask(engine, start, greedy(80, ignore_eos=False)))[0].token_ids
    assert early[-1] == EOS
    late = run(engine, ask(engine, start, greedy(80, ignore_eos=False, min_tokens=len(early))))[0].token_ids
    assert EOS not in late[: len(early)]
    assert late[: len(early) - 1] == early[:-1]


def test_a_stop_string_cannot_end_the_text_before_min_tokens_but_may_reach_over_the_border() -> None:
    engine = toy_engine()
    full = run(engine, ask(engine, PROMPT, greedy(12)))[0]
    stop = full.text[3:5]
    assert full.text.count(stop) == 1
    for min_tokens, text in ((0, full.text[:3]), (4, full.text[:3]), (5, full.text[:3]), (6, full.text)):
        outcome = run(engine, ask(engine, PROMPT, greedy(12, stop=(stop,), min_tokens=min_tokens)))[0]
        assert outcome.text == text, min_tokens


def test_a_constraint_that_ends_before_min_tokens_is_an_error_of_that_request_alone() -> None:
    engine = toy_engine()
    sequences = [
        ask(engine, PROMPT, greedy(12, min_tokens=5), OneOf([5, 6, 7], [5, 9, 7])),  # finished
        ask(engine, PROMPT, greedy(12, min_tokens=5), OneOf([5], [5, 6, 7, 8, 9, 10])),  # may end, or go on
        ask(engine, PROMPT),
    ]
    short, long, fine = run(engine, *sequences)
    assert isinstance(short.error, EngineError)
    assert "min_tokens asks for 5" in str(short.error)
    assert long.token_ids == [5, 6, 7, 8, 9, 10]
    assert fine.error is None
    assert engine.report().running_pages == 0


# --- bans ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.0, 3.0])
def test_banned_tokens_never_come_and_only_allowed_ones_do(temperature: float) -> None:
    engine = toy_engine()
    how = {"max_tokens": 60, "temperature": temperature, "ignore_eos": True, "seed": 3}
    allowed = tuple(range(10, 30))
    outcome = run(engine, ask(engine, PROMPT, SamplingParams(**how, allowed_tokens=allowed, banned_tokens=(11, 12))))[0]
    assert set(outcome.token_ids) <= set(allowed) - {11, 12}


def test_a_ban_and_a_constraint_that_leave_nothing_are_an_error_that_says_so() -> None:
    engine = toy_engine()
    free, forced, fine = run(
        engine,
        ask(engine, PROMPT, greedy(12, banned_tokens=(5, 6)), OneOf([5, 1], [6, 1])),
        ask(engine, PROMPT, greedy(12, banned_tokens=(2,)), OneOf([1, 2, 3], [1, 2, 4])),
        ask(engine, PROMPT, greedy(12, banned_tokens=(5,)), OneOf([5, 1], [6, 1])),
    )
    for outcome in (free, forced):
        assert isinstance(outcome.error, EngineError)
        assert "the constraint and banned_tokens together leave none" in str(outcome.error)
    assert fine.token_ids == [6, 1]


@pytest.mark.parametrize(
    "values",
    [{"banned_tokens": (VOCAB,)}, {"allowed_tokens": (1, VOCAB)}, {"logit_bias": {VOCAB: 1.0}},
     {"xtc_ignore_tokens": (VOCAB,)}],
)  # fmt: skip
def test_token_ids_outside_the_vocabulary_are_refused_before_anything_runs(values: dict[str, Any]) -> None:
    with pytest.raises(RequestError, match=f"from 0 to {VOCAB - 1}, got {VOCAB}"):
        ask(toy_engine(), PROMPT, greedy(5, **values))


# --- log-probabilities -----------------------------------------------------------------------------------------------


def test_logprobs_are_those_of_the_model_and_of_what_was_drawn_from() -> None:
    engine = toy_engine()
    how = SamplingParams(max_tokens=8, temperature=2.0, top_k=5, seed=4, ignore_eos=True, logprobs=3)
    outcome = run(engine, ask(engine, PROMPT, how))[0]
    tokens = list(PROMPT)
    assert len(logprobs_of(outcome)) == 8
    for one, token in zip(logprobs_of(outcome), outcome.token_ids, strict=True):
        logits = toy_logits(tokens).double()
        raw = logits.log_softmax(dim=-1)
        scores = logits / 2
        drawn = scores.masked_fill(scores < scores.topk(5).values[-1], -torch.inf).log_softmax(dim=-1)
        assert (one.token_id, one.text) == (token, chr(ord("A") + token))
        assert one.logprob == pytest.approx(float(raw[token]), abs=1e-9)
        assert one.processed_logprob == pytest.approx(float(drawn[token]), abs=1e-9)
        for listed, by in ((one.top, raw), (one.top_processed, drawn)):
            assert [other.token_id for other in listed] == by.topk(3).indices.tolist()
            for other in listed:
                assert other.logprob == pytest.approx(float(raw[other.token_id]), abs=1e-9)
                assert other.processed_logprob == pytest.approx(float(drawn[other.token_id]), abs=1e-9)
        tokens.append(token)


def test_asking_for_logprobs_changes_no_token_and_every_piece_has_those_of_its_tokens() -> None:
    engine = toy_engine()
    for values in ({"temperature": 0.0}, {"temperature": 1.5, "top_p": 0.9}, EVERYTHING):
        how = {"max_tokens": 20, "seed": 9, "ignore_eos": True, **values}
        without, with_them = run(
            engine,
            ask(engine, PROMPT, SamplingParams(**how)),
            ask(engine, PROMPT, SamplingParams(**how, logprobs=0)),
        )
        assert with_them.token_ids == without.token_ids
        assert all(piece.logprobs is None for piece in without.pieces)
        for piece in with_them.pieces:
            assert piece.logprobs is not None
            assert tuple(one.token_id for one in piece.logprobs) == piece.token_ids
            assert all(not one.top and not one.top_processed for one in piece.logprobs)


def test_greedy_tokens_are_certain_in_what_was_drawn_from() -> None:
    engine = toy_engine()
    outcome = run(engine, ask(engine, PROMPT, greedy(3, logprobs=2)))[0]
    for one in logprobs_of(outcome):
        assert one.processed_logprob == 0.0
        assert [other.token_id for other in one.top_processed] == [one.token_id]
        assert one.top[0].token_id == one.token_id


def test_forced_tokens_have_logprobs_too_and_the_text_is_the_same() -> None:
    options = ([70, 1, 2, 3, 80], [70, 1, 2, 3, 81], [71, 6, 80], [71, 6, 81])
    model = ToyModel()
    engine = toy_engine(model)
    plain = run(engine, ask(engine, PROMPT, greedy(12), OneOf(*options)))[0]
    outcome = run(engine, ask(engine, PROMPT, greedy(12, logprobs=1), OneOf(*options)))[0]
    assert outcome.token_ids == plain.token_ids
    tokens = list(PROMPT)
    for one in logprobs_of(outcome):
        raw = toy_logits(tokens).double().log_softmax(dim=-1)
        assert one.logprob == pytest.approx(float(raw[one.token_id]), abs=1e-9)
        assert one.processed_logprob == 0.0
        tokens.append(one.token_id)
    one_text = run(engine, ask(engine, PROMPT, greedy(12, logprobs=1), OneOf([4, 5, 6])))[0]
    assert [one.token_id for one in logprobs_of(one_text)] == one_text.token_ids == [4, 5, 6]
    assert one_text.last.finish_reason == "stop"
