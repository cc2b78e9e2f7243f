from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from exl2_rag import Choice, ExL2LLM, SamplingParams
from exl2_rag.errors import RequestError
from exl2_rag.llm.output_text import OutputText
from exl2_rag.llm.token_healing import VocabularyPrefixes, heal
from tests.llm.test_output_text import Words
from tests.support.byte_tokenizer import USER_ID
from tests.support.synthetic import make_model_dir
from tests.support.tokenizer_families import family, shared_definition

PROMPTS = ["The link is http:", "I wan", "def main(", "naïve caf", "日本", "x = 1.", "Hello wor"]


def reference_fits(tokens: list[bytes], text: bytes, token_id: int) -> bool:
    return bool(tokens[token_id]) and (tokens[token_id].startswith(text) or text.startswith(tokens[token_id]))


@pytest.mark.parametrize("name", ["byte", "metaspace-always", "mistral-v1", "qwen2"])
def test_what_is_taken_could_begin_a_longer_token_and_whatever_fits_is_allowed(name: str) -> None:
    tokenizer = family(name)
    tokens = [b"" if tokenizer.is_special(n) else tokenizer.token_bytes(n) for n in range(tokenizer.vocab_size)]
    n_healed = 0
    for prompt in PROMPTS:
        ids = [*([] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]), *tokenizer.encode("A " + prompt)]
        healing = heal(tokenizer, ids)
        if healing is None:
            continue
        n_healed += 1
        taken = ids[-healing.n_tokens :]
        assert healing.text == b"".join(tokens[n] for n in taken)
        assert any(one.startswith(healing.text) and one != healing.text for one in tokens)
        # No more could have been taken.
        for n_more in range(healing.n_tokens + 1, min(len(ids), 5)):
            text = b"".join(tokens[n] for n in ids[-n_more:])
            starts = any(one.startswith(text) and one != text for one in tokens)
            assert not (starts and all(tokens[n] for n in ids[-n_more:])) or "\ufffd" in text.decode(errors="replace")
        assert tokenizer.decode(ids[: -healing.n_tokens]) + tokenizer.decode(
            taken, after=ids[: -healing.n_tokens]
        ) == tokenizer.decode(ids)
        assert healing.n_characters == len(tokenizer.decode(taken, after=ids[: -healing.n_tokens]))
        mask = healing.allowed([], tokenizer.vocab_size + 3)
        assert mask is not None
        assert not mask[tokenizer.vocab_size :].any()
        assert mask.tolist()[: len(tokens)] == [reference_fits(tokens, healing.text, n) for n in range(len(tokens))]
        assert healing.allowed(taken, tokenizer.vocab_size) is None
    assert n_healed >= 3 or name == "byte"


def test_special_tokens_and_the_first_token_stay() -> None:
    tokenizer = family("qwen2")
    special = next(n for n in range(tokenizer.vocab_size) if tokenizer.is_special(n))
    ids = tokenizer.encode("http:")
    assert heal(tokenizer, [special]) is None
    assert heal(tokenizer, [*ids, special]) is None
    assert heal(tokenizer, ids[-1:]) is None
    healing = heal(tokenizer, [special, *ids])
    assert healing is not None
    assert healing.n_tokens <= len(ids)


def test_a_text_that_is_in_no_longer_token_is_left() -> None:
    assert not VocabularyPrefixes([b"a", b"b", b"ab", b""]).can_grow(b"b")
    assert VocabularyPrefixes([b"a", b"b", b"ab", b""]).can_grow(b"a")
    assert VocabularyPrefixes([b"a", b"b", b"ab", b"a"]).beginning_of(b"abc") == [0, 3, 2]
    assert VocabularyPrefixes([b"a", b"b", b"ab", b""]).beginning_with(b"a") == [0, 2]


def test_healed_text_is_no_part_of_the_result_even_after_going_back() -> None:
    output = OutputText(Words(["ht", "tp://", "x", "y", ":"]), n_hidden=5)
    for token_id in (0, 1):
        output.push(token_id)
    output.roll_back(1)
    output.push(1)
    output.push(2)
    assert output.take() == "//x"
    banned = OutputText(Words(["ht", "tp://", "x", "tp:"]), banned=("//",), n_hidden=5)
    banned.push(0)
    banned.push(1)
    assert banned.n_banned_tokens == 1
    banned.roll_back(1)
    banned.push(3)
    banned.push(2)
    assert banned.take() == "x"


# --- through the engine ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ExL2LLM]:
    """A model of random weights with the tokenizer of Mistral 7B."""
    definition = shared_definition("mistral-v1")
    model_dir = make_model_dir(tmp_path_factory.mktemp("model"), vocab=32000, bos_token_id=1, eos_token_id=2)
    (model_dir / "tokenizer.json").write_text(json.dumps(definition), encoding="utf-8")
    config = {"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": True}
    (model_dir / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    (model_dir / "generation_config.json").unlink(missing_ok=True)
    with ExL2LLM(model_dir) as llm:
        yield llm


def test_the_continuation_begins_with_what_was_taken_and_the_text_leaves_it_out(llm: ExL2LLM) -> None:
    prompt = "The link is http:"
    for seed in range(5):
        how = SamplingParams(max_tokens=8, temperature=1.5, seed=seed, token_healing=True, ignore_eos=True)
        result = llm.generate(prompt, how)
        healing = heal(llm.tokenizer, llm.tokenizer.encode(prompt, add_bos=True))
        assert healing is not None
        spelled = b"".join(llm.tokenizer.token_bytes(n) for n in result.token_ids)
        assert spelled.startswith(healing.text)
        assert result.text == spelled[len(healing.text) :].decode(errors="replace")
        assert "".join(piece.text for piece in llm.stream(prompt, how)) == result.text


def test_without_anything_to_heal_nothing_changes(llm: ExL2LLM) -> None:
    ids = llm.tokenizer.encode("a b", add_bos=True)[:1]
    how = SamplingParams(max_tokens=6, temperature=0, ignore_eos=True)
    healed = SamplingParams(max_tokens=6, temperature=0, ignore_eos=True, token_healing=True)
    assert llm.generate(ids, healed).token_ids == llm.generate(ids, how).token_ids


def test_healing_and_a_constraint_are_refused_together(llm: ExL2LLM) -> None:
    with pytest.raises(RequestError, match="token_healing cannot go together with a constraint"):
        llm.generate("abc", SamplingParams(token_healing=True), constraint=Choice(["x", "y"]))


def test_a_prompt_of_special_tokens_is_left(tmp_path: Path) -> None:
    with ExL2LLM(make_model_dir(tmp_path)) as byte_llm:
        result = byte_llm.generate([USER_ID, 65], SamplingParams(max_tokens=3, token_healing=True, temperature=0))
        assert result.usage.prompt_tokens == 2  # no token of a byte vocabulary is longer
