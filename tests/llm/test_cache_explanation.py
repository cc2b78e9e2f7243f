"""Usual faults that spoil prefix reuse are visible: on a real tokenizer, through the chat template, in words."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from exl2_rag import ExL2LLM, SamplingParams
from exl2_rag.demo import model_dir
from exl2_rag.llm.cache_explanation import CacheExplanation, explain
from exl2_rag.llm.prefix_trace import PrefixTrace
from exl2_rag.llm.request import GenerationResult

GREEDY = SamplingParams(max_tokens=1, temperature=0)
RULES = "You answer questions about the harbour rules from the documents below. Quote them word for word."
DOCUMENTS = [
    "Ships longer than forty metres wait outside the breakwater until a pilot comes on board.\n",
    "Fishing boats may land their catch between four and nine in the morning at the east quay.\n",
    "The crane on the north pier lifts twelve tons, and is closed in winds above force seven.\n",
]
QUESTION = "When may boats land their catch?"


@pytest.fixture(scope="module")
def model() -> Iterator[ExL2LLM]:
    with ExL2LLM(model_dir(), cache_tokens=8192) as one:
        yield one


@pytest.fixture
def llm(model: ExL2LLM) -> ExL2LLM:
    model.evict(everything=True)
    # Evicted pages are remembered; a prompt of these tests must not find those of the test before.
    model._thread.call(model._engine.reset)
    return model


def ask(llm: ExL2LLM, *, rules: str = RULES, documents: list[str] | None = None) -> CacheExplanation:
    text = "".join(DOCUMENTS if documents is None else documents) + QUESTION
    messages = [{"role": "system", "content": rules}, {"role": "user", "content": text}]
    return explained(llm.chat(messages, GREEDY))


def explained(result: GenerationResult) -> CacheExplanation:
    assert result.cache_explain is not None
    assert result.cache_explain.reused_tokens == result.usage.cached_tokens
    assert result.cache_explain.prompt_tokens == result.usage.prompt_tokens
    return result.cache_explain


def test_a_prompt_that_was_cached_as_a_whole(llm: ExL2LLM) -> None:
    assert ask(llm).reason == "never seen"
    found = ask(llm)
    assert (found.reason, found.differs_at, found.computed_tokens, found.hint) == ("last token", None, 1, None)
    assert found.from_memory == found.prompt_tokens - 1


def test_a_begin_of_sequence_token_put_twice(llm: ExL2LLM) -> None:
    bos = llm.tokenizer.bos_token_id
    assert bos is not None
    once = [bos, *llm.tokenizer.encode(RULES + DOCUMENTS[0])]
    llm.generate(once, GREEDY)
    found = explained(llm.generate([bos, *once], GREEDY))
    assert (found.reason, found.differs_at) == ("other text", 1)
    assert found.hint is not None
    assert "twice where the cached text has it once" in found.hint
    assert found.prompt_text.startswith(llm.tokenizer.decode([bos, bos], skip_special=False))
    llm.evict()
    llm._thread.call(llm._engine.reset)
    llm.generate([bos, *once], GREEDY)
    other = explained(llm.generate(once, GREEDY))
    assert other.hint is not None
    assert "twice where the prompt has it once" in other.hint


def test_a_date_in_the_system_prompt(llm: ExL2LLM) -> None:
    ask(llm, rules=f"Today is 2026-03-14. {RULES}")
    found = ask(llm, rules=f"Today is 2026-03-15. {RULES}")
    assert found.reason == "other text"
    assert "2026-03-15" in found.prompt_text
    assert "2026-03-14" in found.cached_text
    assert found.hint is not None
    assert "a date or time stands there" in found.hint
    assert found.reused_tokens < 20


def test_chunks_in_another_order(llm: ExL2LLM) -> None:
    ask(llm)
    found = ask(llm, documents=[DOCUMENTS[0], DOCUMENTS[2], DOCUMENTS[1]])
    assert found.reason == "other text"
    assert "crane" in found.prompt_text
    assert "Fishing boats" in found.cached_text
    assert found.hint is not None
    assert "same parts, other order" in found.hint


def test_whitespace_at_the_end_of_a_part(llm: ExL2LLM) -> None:
    ask(llm)
    found = ask(llm, rules=RULES + " ")
    assert found.reason == "other text"
    assert found.hint == "the two texts differ in whitespace only"
    assert found.prompt_text != found.cached_text


def test_another_tenant(llm: ExL2LLM) -> None:
    messages = [{"role": "user", "content": "".join(DOCUMENTS)}]
    llm.chat(messages, GREEDY, cache_salt="a")
    found = explained(llm.chat(messages, GREEDY, cache_salt="b"))
    assert (found.reason, found.reused_tokens, found.cached_window) == ("other identity", 0, ())
    assert "never shared" in str(found)


def test_a_text_that_was_evicted(llm: ExL2LLM) -> None:
    ask(llm)
    assert llm.evict() > 0
    found = ask(llm)
    assert found.reason == "evicted"
    assert found.evicted_tokens >= found.prompt_tokens - 1
    assert "has been evicted" in found.why


def test_an_explanation_can_be_had_without_a_request_and_says_the_same(llm: ExL2LLM) -> None:
    llm.generate(RULES + DOCUMENTS[0], GREEDY)
    before = llm.cache_report()
    dry = llm.explain_cache(RULES + DOCUMENTS[1])
    assert llm.cache_report() == before
    assert dry == explained(llm.generate(RULES + DOCUMENTS[1], GREEDY))
    assert "this prompt:" in str(dry)
    assert "cached text:" in str(dry)


def test_a_stream_explains_in_its_last_piece(llm: ExL2LLM) -> None:
    pieces = list(llm.stream(RULES, SamplingParams(max_tokens=4, temperature=0, ignore_eos=True)))
    assert [piece.cache_explain is not None for piece in pieces] == [False] * (len(pieces) - 1) + [True]


def test_an_explanation_is_plain_data(llm: ExL2LLM) -> None:
    ask(llm)
    found = ask(llm, rules=RULES.replace("below", "above"))
    read = json.loads(json.dumps(found.as_dict()))
    assert read["prompt_text"] == found.prompt_text
    assert read["reused_tokens"] == found.from_memory
    assert found.prompt_window[: found.n_before] == found.cached_window[: found.n_before]


def test_rows_that_found_no_page_are_said() -> None:
    found = explain(PrefixTrace(7, 7, "never seen"), list(range(10)), str, reused=4)
    assert (found.reason, found.reused_tokens, found.differs_at) == ("no room", 4, 7)


def test_tiers_add_up() -> None:
    found = explain(PrefixTrace(9, 9, "last token"), list(range(10)), str, from_ram=2, from_disk=4)
    assert (found.from_memory, found.from_ram, found.from_disk, found.reused_tokens) == (3, 2, 4, 9)
    assert "3 from memory, 2 from RAM, 4 from disk" in str(found)
