"""Samplers, log-probabilities and guidance through `ExL2LLM`, with a model and a tokenizer."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest

from exl2_rag import ExL2LLM, Regex, SamplingParams
from exl2_rag.errors import RequestError
from tests.support.synthetic import make_model_dir


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ExL2LLM]:
    with ExL2LLM(make_model_dir(tmp_path_factory.mktemp("models") / "tiny"), max_batch_size=8) as one:
        yield one


def greedy(**values: Any) -> SamplingParams:
    return SamplingParams(**{"max_tokens": 12, "temperature": 0, "ignore_eos": True, **values})


def test_logprobs_agree_with_score_and_have_the_texts_of_their_tokens(llm: ExL2LLM) -> None:
    result = llm.generate("Water boils at", greedy(logprobs=2))
    assert result.logprobs is not None
    assert tuple(one.token_id for one in result.logprobs) == result.token_ids
    scored = llm.score("Water boils at", list(result.token_ids))
    assert [one.logprob for one in result.logprobs] == pytest.approx(list(scored), abs=1e-3)
    for one in result.logprobs:
        assert one.text == llm.tokenizer.token_bytes(one.token_id).decode(errors="replace")
        assert one.top[0].token_id == one.token_id
        assert one.top[0].logprob == one.logprob >= (one.top[1].logprob or -math.inf)
    assert llm.generate("Water boils at", greedy()).logprobs is None


def test_streamed_pieces_carry_the_logprobs_of_their_tokens(llm: ExL2LLM) -> None:
    how = SamplingParams(max_tokens=12, temperature=1.0, seed=1, ignore_eos=True, logprobs=0)
    whole = llm.generate("Water", how)
    pieces = list(llm.stream("Water", how))
    assert tuple(one for piece in pieces for one in piece.logprobs or ()) == whole.logprobs


def test_a_constraint_does_not_change_with_logprobs(llm: ExL2LLM) -> None:
    pattern = Regex("(Answer: (yes|no), )+end")
    plain = llm.generate("Water", greedy(max_tokens=60), constraint=pattern)
    measured = llm.generate("Water", greedy(max_tokens=60, logprobs=1), constraint=pattern)
    assert (measured.token_ids, measured.text) == (plain.token_ids, plain.text)
    assert measured.logprobs is not None
    assert len(measured.logprobs) == len(measured.token_ids)
    assert all(one.processed_logprob == 0 for one in measured.logprobs)


def test_a_negative_prompt_may_be_text_token_ids_or_messages(llm: ExL2LLM) -> None:
    ids = tuple(llm.tokenizer.encode("Fire burns at", add_bos=llm.tokenizer.adds_bos))
    by_ids = llm.generate("Water boils at", greedy(cfg_scale=3.0, negative_prompt=ids))
    by_text = llm.generate("Water boils at", greedy(cfg_scale=3.0, negative_prompt="Fire burns at"))
    assert by_text.token_ids == by_ids.token_ids
    assert by_text.token_ids != llm.generate("Water boils at", greedy()).token_ids
    messages = [{"role": "user", "content": "Say something about fire."}]
    chat = tuple(llm.encode_chat(messages))
    by_chat = llm.generate("Water", greedy(cfg_scale=2.0, negative_prompt=chat))
    by_messages = llm.generate("Water", greedy(cfg_scale=2.0, negative_prompt=messages))
    assert by_messages.token_ids == by_chat.token_ids
    assert by_messages.usage.prompt_tokens == len(llm.tokenizer.encode("Water", add_bos=llm.tokenizer.adds_bos)) + len(
        chat
    )


def test_guidance_streams_and_a_closed_stream_frees_both_halves(llm: ExL2LLM) -> None:
    how = greedy(cfg_scale=2.0, negative_prompt="Fire", max_tokens=200)
    stream = llm.stream("Water", how)
    next(stream)
    stream.close()
    text = "".join(piece.text for piece in llm.stream("Water", greedy(cfg_scale=2.0, negative_prompt="Fire")))
    assert text == llm.generate("Water", greedy(cfg_scale=2.0, negative_prompt="Fire")).text
    assert llm.cache_report().running_pages == 0


def test_breakers_are_the_tokens_that_hold_their_text(llm: ExL2LLM) -> None:
    how = SamplingParams(dry_multiplier=0.8, dry_sequence_breakers=("e", 7), xtc_probability=0.5)
    sequence = llm._engine.prepare(llm_request(llm, how))
    assert sequence.sampler is not None
    vocab = range(llm.tokenizer.vocab_size)
    assert set(sequence.sampler.breakers) == {7, *(one for one in vocab if b"e" in llm.tokenizer.token_bytes(one))}
    ignored = set(sequence.sampler.xtc_ignored)
    assert {one for one in vocab if llm.tokenizer.is_special(one)} <= ignored
    assert {one for one in vocab if b"\n" in llm.tokenizer.token_bytes(one)} <= ignored


def llm_request(llm: ExL2LLM, how: SamplingParams) -> Any:
    from exl2_rag.llm.request import GenerationRequest

    return GenerationRequest(tuple(llm.tokenizer.encode("Water")), how)


def test_a_breaker_that_no_token_holds_is_the_last_token_it_is_written_with(llm: ExL2LLM) -> None:
    how = SamplingParams(dry_multiplier=0.8, dry_sequence_breakers=("xyzzy!",))
    sequence = llm._engine.prepare(llm_request(llm, how))
    assert sequence.sampler is not None
    assert list(sequence.sampler.breakers) == llm.tokenizer.encode_continuation("xyzzy!")[-1:]


def test_penalties_change_the_text_and_bans_hold_in_text(llm: ExL2LLM) -> None:
    plain = llm.generate("Water", greedy(max_tokens=40))
    banned = llm.generate("Water", greedy(max_tokens=40, banned_tokens=plain.token_ids[:3]))
    assert not set(plain.token_ids[:3]) & set(banned.token_ids)
    once = llm.generate("Water", greedy(max_tokens=40, no_repeat_ngram_size=1)).token_ids
    assert len(set(plain.token_ids)) < 40 == len(set(once))


def test_what_cannot_be_sampled_is_refused_before_anything_runs(llm: ExL2LLM) -> None:
    with pytest.raises(RequestError, match="banned_tokens must hold token ids from 0 to"):
        llm.generate("Water", greedy(banned_tokens=(10**6,)))
    with pytest.raises(RequestError, match="no effect"):
        llm.generate("Water", greedy(negative_prompt="Fire"))
