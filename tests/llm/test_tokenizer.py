from __future__ import annotations

import json
import unicodedata
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from exl2_rag.errors import RequestError, TokenizerError
from exl2_rag.llm.tokenizer import TextBlock, Tokenizer
from tests.support.byte_tokenizer import BOS_ID, END_ID, EOS_ID, USER_ID, VOCAB_SIZE, write_byte_tokenizer
from tests.support.shared_data import shared_path
from tests.support.tokenizer_families import FAMILIES, SHARED_FAMILIES, family, shared_definition

EMOJI = ["👍🏽", "👩\u200d👩\u200d👧", "\U0001f1e9\U0001f1ea"]
MARKS = ["e\u0301", "ก็", "\u200b", "\ufeff", "\ufffd", "\x00", "\n\n", "  ", "\t"]
SPECIAL_LOOKING = ["<s>", "</s>", "[INST]", "<|im_end|>", "<unk>", "<|end|>", "<|bos|>", "<0x0A>"]
AWKWARD = [*EMOJI, *MARKS, *SPECIAL_LOOKING, "𝔘", "日本語", "don't", "3.14"]
# "▁" is how SentencePiece writes a space; its own tokenizers cannot give it back either.
TEXTS = st.lists(
    st.one_of(st.text(st.characters(codec="utf-8", exclude_characters="▁"), max_size=12), st.sampled_from(AWKWARD)),
    max_size=8,
).map("".join)
PROPERTY = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

each_family = pytest.mark.parametrize("name", FAMILIES)


def read_back(name: str, text: str) -> str:
    """What a family gives back for a text: Qwen2's normalises to NFC."""
    return unicodedata.normalize("NFC", text) if name == "qwen2" else text


def without_lost_space(name: str, text: str) -> str:
    """A Metaspace tokenizer takes a space at the head of a text for the one it would have added."""
    return text.removeprefix(" ") if name.startswith("metaspace") else text


def bos_text(tokenizer: Tokenizer) -> str:
    return "" if tokenizer.bos_token_id is None else tokenizer.token_bytes(tokenizer.bos_token_id).decode()


@pytest.fixture
def model_dir(tmp_path: Path) -> Path:
    write_byte_tokenizer(tmp_path)
    return tmp_path


def edit_json(path: Path, **changes: Any) -> None:
    content = json.loads(path.read_text("utf-8")) if path.exists() else {}
    content.update(changes)
    path.write_text(json.dumps(content), encoding="utf-8")


# --- encoding ---------------------------------------------------------------------------------------------------------


def test_the_byte_tokenizer_gives_one_token_a_byte(model_dir: Path) -> None:
    tokenizer = Tokenizer.from_dir(model_dir)
    text = "héllo\n<|end|> 👍"
    assert tokenizer.encode(text) == list(text.encode())
    assert (tokenizer.vocab_size, tokenizer.bos_token_id, tokenizer.eos_token_ids) == (
        VOCAB_SIZE,
        BOS_ID,
        (EOS_ID, END_ID),
    )
    assert tokenizer.adds_bos


def test_special_tokens_are_read_from_text_only_when_asked(model_dir: Path) -> None:
    tokenizer = Tokenizer.from_dir(model_dir)
    assert tokenizer.encode("<|user|>a", special_tokens=True) == [USER_ID, ord("a")]
    assert max(tokenizer.encode("<|user|>a")) < 256


@pytest.mark.parametrize("name", SHARED_FAMILIES)
def test_encoding_agrees_with_the_tokenizers_library(name: str) -> None:
    tokenizer = family(name)
    reference = tokenizers.Tokenizer.from_str(json.dumps(shared_definition(name)))
    texts = [
        "Hello world",
        "",
        " two  spaces ",
        "[INST] hi [/INST]</s>",
        "naïve café 日本語 👍🏽",
        "a\n\n\tb",
        "<s><unk>x",
    ]
    for parse in (True, False):
        reference.encode_special_tokens = not parse
        for text in texts:
            expected = reference.encode(text, add_special_tokens=False).ids
            assert tokenizer.encode(text, special_tokens=parse) == expected, (parse, text)


def test_qwen2_encodings_equal_the_published_ones() -> None:
    tokenizer = family("qwen2")
    gold = json.loads((shared_path("data/tokenizers/qwen2") / "gold-encodings.json").read_text("utf-8"))
    pairs = gold if isinstance(gold, list) else gold["encodings"]
    assert len(pairs) == 47
    for pair in pairs:
        assert tokenizer.encode(pair["text"]) == pair["ids"], pair["text"]


@each_family
@PROPERTY
@given(text=TEXTS)
def test_ordinary_text_never_becomes_a_special_token(name: str, text: str) -> None:
    tokenizer = family(name)
    ids = tokenizer.encode(text)
    assert not any(tokenizer.is_special(n) for n in ids)
    assert tokenizer.decode(ids) == without_lost_space(name, read_back(name, text))


def test_markup_tokens_that_are_not_flagged_special_are_ordinary_in_untrusted_text(model_dir: Path) -> None:
    definition = json.loads((model_dir / "tokenizer.json").read_text("utf-8"))
    definition["model"]["vocab"] |= {token["content"]: token["id"] for token in definition["added_tokens"]}
    definition["model"]["vocab"] |= {"th": VOCAB_SIZE}
    definition["model"]["merges"] = [["t", "h"]]
    plain = {**definition["added_tokens"][0], "special": False}
    think, spaces = (
        {**plain, "id": VOCAB_SIZE + 1, "content": "<think>"},
        {**plain, "id": VOCAB_SIZE + 2, "content": "   "},
    )
    definition["added_tokens"] += [think, spaces]
    (model_dir / "tokenizer.json").write_text(json.dumps(definition), encoding="utf-8")
    tokenizer = Tokenizer.from_dir(model_dir)
    assert tokenizer.encode("<think>", special_tokens=True) == [think["id"]]
    assert tokenizer.encode("<think>") == [ord("<"), VOCAB_SIZE, *b"ink>"], "as the model writes ordinary text"
    assert tokenizer.decode([think["id"]]) == "<think>", "not flagged special, so it is part of the text"
    assert tokenizer.encode("a   b") == [ord("a"), spaces["id"], ord("b")], "a run of spaces is no mark of structure"


def test_a_special_token_that_merges_lead_to_is_spelled_out(model_dir: Path) -> None:
    definition = json.loads((model_dir / "tokenizer.json").read_text("utf-8"))
    definition["model"]["vocab"] |= {token["content"]: token["id"] for token in definition["added_tokens"]}
    definition["model"]["vocab"] |= {"<x": VOCAB_SIZE, "<x>": VOCAB_SIZE + 1}
    definition["model"]["merges"] = [["<", "x"], ["<x", ">"]]
    definition["added_tokens"].append({**definition["added_tokens"][0], "id": VOCAB_SIZE + 1, "content": "<x>"})
    (model_dir / "tokenizer.json").write_text(json.dumps(definition), encoding="utf-8")
    tokenizer = Tokenizer.from_dir(model_dir)
    assert tokenizer.encode("a<x>", special_tokens=True) == [ord("a"), VOCAB_SIZE + 1]
    assert tokenizer.encode("a<x><xy") == [*b"a<x>", VOCAB_SIZE, ord("y")]


def test_bos_is_added_once(model_dir: Path) -> None:
    tokenizer = Tokenizer.from_dir(model_dir)
    assert tokenizer.encode("a", add_bos=True) == [BOS_ID, ord("a")]
    assert tokenizer.encode("<|bos|>a", add_bos=True, special_tokens=True) == [BOS_ID, ord("a")]
    assert tokenizer.encode("", add_bos=True) == [BOS_ID]


def test_asking_for_a_bos_that_does_not_exist_is_an_error() -> None:
    with pytest.raises(RequestError, match="no BOS token"):
        family("qwen2").encode("a", add_bos=True)


def test_many_threads_can_encode_at_once(model_dir: Path) -> None:
    tokenizer = Tokenizer.from_dir(model_dir)
    texts = [f"{n} <|end|> é" for n in range(200)]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(tokenizer.encode, texts)) == [list(text.encode()) for text in texts]


# --- blocks -----------------------------------------------------------------------------------------------------------


@each_family
def test_decoded_blocks_equal_the_joined_text(name: str) -> None:
    tokenizer = family(name)
    special = tokenizer.special_token_texts[-1]
    blocks = [
        TextBlock(f"{bos_text(tokenizer)}{special} rules\n", trusted=True),
        TextBlock(f"Doc {special} one.\n", trusted=False),
        TextBlock(" Doc two.\n", trusted=False),
        TextBlock("", trusted=False),
        TextBlock("question?", trusted=False),
        TextBlock(f"{special} ", trusted=True),
    ]
    ids = tokenizer.encode_blocks(blocks)
    assert tokenizer.decode(ids, skip_special=False) == "".join(block.text for block in blocks)
    assert sum(tokenizer.token_bytes(n).decode(errors="replace") == special for n in ids) == 2


@each_family
@PROPERTY
@given(texts=st.lists(TEXTS, max_size=5), with_bos=st.booleans())
def test_untrusted_blocks_decode_to_their_text_and_hold_no_special_token(
    name: str, texts: list[str], with_bos: bool
) -> None:
    tokenizer = family(name)
    head = [TextBlock(bos_text(tokenizer), trusted=True)] if with_bos else []
    ids = tokenizer.encode_blocks([*head, *(TextBlock(text, trusted=False) for text in texts)])
    assert sum(tokenizer.is_special(n) for n in ids) == bool(with_bos and bos_text(tokenizer))
    expected = "".join([*(block.text for block in head), *(read_back(name, text) for text in texts)])
    assert tokenizer.decode(ids, skip_special=False) == expected


@each_family
def test_ids_of_a_block_do_not_depend_on_what_follows(name: str) -> None:
    tokenizer = family(name)
    blocks = [TextBlock("System rules", trusted=True), TextBlock("s and more", trusted=False), TextBlock(" end", False)]
    whole = tokenizer.encode_blocks(blocks)
    for n in range(len(blocks)):
        ids = tokenizer.encode_blocks(blocks[:n])
        assert whole[: len(ids)] == ids


@pytest.mark.parametrize("name", ["mistral-v1", "metaspace-first", "metaspace-always"])
def test_a_sentencepiece_space_stands_at_the_head_only(name: str) -> None:
    tokenizer = family(name)
    blocks = [TextBlock("<s>Hello", trusted=True), TextBlock("world", trusted=False)]
    pieces = [tokenizer.token_bytes(n) for n in tokenizer.encode_blocks(blocks)]
    assert b"".join(pieces) == b"<s> Helloworld"


# --- decoding ---------------------------------------------------------------------------------------------------------


@each_family
@PROPERTY
@given(text=TEXTS)
@example(text=" leading")
@example(text="👍🏽👩‍👩‍👧 e\u0301")
def test_pieces_joined_are_the_text_and_hold_whole_characters(name: str, text: str) -> None:
    tokenizer = family(name)
    ids = tokenizer.encode(text)
    decoder = tokenizer.incremental()
    pieces = [decoder.push(n) for n in ids]
    assert "".join(pieces).count("\ufffd") == text.count("\ufffd")
    assert "".join(pieces) == without_lost_space(name, read_back(name, text))
    assert decoder.flush() == ""


@each_family
@PROPERTY
@given(data=st.data())
def test_any_ids_decode_the_same_at_once_and_one_by_one(name: str, data: st.DataObject) -> None:
    tokenizer = family(name)
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=30))
    expected = b"".join(tokenizer.token_bytes(n) for n in ids if not tokenizer.is_special(n)).decode(errors="replace")
    decoder = tokenizer.incremental(after=[tokenizer.encode("x")[0]])
    assert "".join([*map(decoder.push, ids), decoder.flush()]) == expected
    assert tokenizer.decode(ids, after=[tokenizer.encode("x")[0]]) == expected


@pytest.mark.parametrize("name", SHARED_FAMILIES)
def test_decoding_agrees_with_the_tokenizers_library(name: str) -> None:
    tokenizer = family(name)
    reference = tokenizers.Tokenizer.from_str(json.dumps(shared_definition(name)))
    for text in ["Hello world", " two  spaces ", "naïve café 日本語 👍🏽", "a\n\n\tb", "x y"]:
        ids = [*([1] if tokenizer.bos_token_id == 1 else []), *tokenizer.encode(text)]
        assert tokenizer.decode(ids) == reference.decode(ids), text


def test_an_incomplete_character_waits_for_its_last_byte(model_dir: Path) -> None:
    decoder = Tokenizer.from_dir(model_dir).incremental()
    assert [decoder.push(byte) for byte in "a👍b".encode()] == ["a", "", "", "", "👍", "b"]


def test_a_text_that_ends_inside_a_character_says_so(model_dir: Path) -> None:
    tokenizer = Tokenizer.from_dir(model_dir)
    decoder = tokenizer.incremental()
    assert [decoder.push(byte) for byte in "é".encode()[:1]] == [""]
    assert decoder.flush() == "\ufffd"
    assert tokenizer.decode(list("é".encode()[:1])) == "\ufffd"


def test_special_tokens_are_left_out_unless_asked_for(model_dir: Path) -> None:
    tokenizer = Tokenizer.from_dir(model_dir)
    ids = [BOS_ID, ord("a"), END_ID]
    assert tokenizer.decode(ids) == "a"
    assert tokenizer.decode(ids, skip_special=False) == "<|bos|>a<|end|>"


def test_ids_beyond_the_vocabulary_have_no_text_and_negative_ones_are_an_error(model_dir: Path) -> None:
    tokenizer = Tokenizer.from_dir(model_dir)
    assert tokenizer.decode([ord("a"), VOCAB_SIZE + 5, ord("b")]) == "ab"
    with pytest.raises(RequestError, match="0 or more"):
        tokenizer.decode([-1])


def test_a_continuation_keeps_its_leading_space_and_a_fresh_turn_does_not() -> None:
    tokenizer = family("mistral-v3")
    paris = tokenizer.encode("Paris")
    assert tokenizer.decode(paris, after=tokenizer.encode("The capital is")) == " Paris"
    assert tokenizer.decode(paris, after=tokenizer.encode("[INST] x [/INST]", special_tokens=True)) == "Paris"
    assert tokenizer.decode(paris) == "Paris"


# --- files ------------------------------------------------------------------------------------------------------------


def test_a_missing_tokenizer_is_named_with_its_path(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match=r"tokenizer\.json") as caught:
        Tokenizer.from_dir(tmp_path)
    assert str(tmp_path) in str(caught.value)
    with pytest.raises(TokenizerError, match="does not exist"):
        Tokenizer.from_dir(tmp_path / "nowhere")
    with pytest.raises(TokenizerError, match="found no file"):
        Tokenizer.from_file(tmp_path / "tokenizer.json")
    (tmp_path / "tokenizer.model").write_bytes(b"")
    with pytest.raises(TokenizerError, match="convert it"):
        Tokenizer.from_dir(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not readable as JSON"),
        ("[]", "must hold a JSON object"),
        ("{}", 'no "model"'),
        ('{"model": {}, "added_tokens": [{"id": "1"}]}', "needs an id and a content"),
        ('{"model": {"type": "Nonsense"}}', "not a tokenizer that can be read"),
    ],
)
def test_a_broken_tokenizer_file_is_an_error(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(TokenizerError, match=message):
        Tokenizer.from_dir(tmp_path)


@pytest.mark.parametrize("decoder", [None, {"type": "WordPiece", "prefix": "##", "cleanup": True}])
def test_a_vocabulary_of_another_kind_is_refused(model_dir: Path, decoder: dict[str, Any] | None) -> None:
    edit_json(model_dir / "tokenizer.json", decoder=decoder)
    with pytest.raises(TokenizerError, match="decoder"):
        Tokenizer.from_dir(model_dir)


def test_padding_and_truncation_of_the_file_are_not_applied_to_prompts(model_dir: Path) -> None:
    truncation = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    edit_json(model_dir / "tokenizer.json", truncation=truncation)
    assert len(Tokenizer.from_dir(model_dir).encode("x" * 100)) == 100


def test_every_declared_end_id_counts(model_dir: Path) -> None:
    edit_json(model_dir / "config.json", eos_token_id=[EOS_ID, 300])
    edit_json(model_dir / "tokenizer_config.json", eos_token="<|tool|>")
    assert Tokenizer.from_dir(model_dir).eos_token_ids == (EOS_ID, END_ID, 300, 262)


def test_without_declared_ends_the_special_tokens_named_like_one_count(model_dir: Path) -> None:
    assert set(Tokenizer.from_file(model_dir / "tokenizer.json").eos_token_ids) == {EOS_ID, END_ID}


def test_the_config_decides_about_bos_and_otherwise_the_post_processor(model_dir: Path) -> None:
    edit_json(model_dir / "tokenizer_config.json", add_bos_token=False)
    assert not Tokenizer.from_dir(model_dir).adds_bos
    alone = Tokenizer.from_file(model_dir / "tokenizer.json")
    assert (alone.adds_bos, alone.bos_token_id) == (True, BOS_ID)
    edit_json(model_dir / "tokenizer.json", post_processor=None)
    assert not Tokenizer.from_file(model_dir / "tokenizer.json").adds_bos


def test_tokens_that_only_the_config_lists_are_added(model_dir: Path) -> None:
    listed = {str(VOCAB_SIZE): {"content": "<|new|>", "special": True}}
    edit_json(model_dir / "tokenizer_config.json", added_tokens_decoder=listed)
    tokenizer = Tokenizer.from_dir(model_dir)
    assert tokenizer.vocab_size == VOCAB_SIZE + 1
    assert tokenizer.encode("<|new|>", special_tokens=True) == [VOCAB_SIZE]
    assert tokenizer.is_special(VOCAB_SIZE)


def test_a_declared_end_that_is_an_ordinary_word_of_the_vocabulary_becomes_special(model_dir: Path) -> None:
    definition = json.loads((model_dir / "tokenizer.json").read_text("utf-8"))
    ends = [token for token in definition["added_tokens"] if token["content"] == "<|eos|>"]
    definition["model"]["vocab"] |= {token["content"]: token["id"] for token in definition["added_tokens"]}
    definition["added_tokens"].remove(ends[0])
    (model_dir / "tokenizer.json").write_text(json.dumps(definition), encoding="utf-8")
    tokenizer = Tokenizer.from_dir(model_dir)
    assert tokenizer.is_special(EOS_ID)
    assert tokenizer.encode("a<|eos|>", special_tokens=True) == [ord("a"), EOS_ID]


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        ("tokenizer_config.json", {"added_tokens_decoder": {"256": {"content": "<other>"}}}, "of different models"),
        ("tokenizer_config.json", {"added_tokens_decoder": {"999": {"content": "<other>"}}}, "of different models"),
        ("tokenizer_config.json", {"added_tokens_decoder": {"x": 1}}, "must map an id"),
        ("tokenizer_config.json", {"eos_token": "</s>"}, "no such token"),
        ("tokenizer_config.json", {"add_bos_token": "yes"}, "must be a bool"),
        ("generation_config.json", {"eos_token_id": 5000}, "of different models"),
        ("generation_config.json", {"eos_token_id": "2"}, "must be a token id"),
    ],
)
def test_files_that_contradict_each_other_are_an_error(
    model_dir: Path, file: str, changes: dict[str, Any], message: str
) -> None:
    edit_json(model_dir / file, **changes)
    with pytest.raises(TokenizerError, match=message):
        Tokenizer.from_dir(model_dir)
