"""Lexical search: stems, unknown words, saving and loading."""

from pathlib import Path

from exl2_rag.retrieval.bm25 import Bm25Index

TEXTS = {
    "pages": "The page table shares pages between requests with equal prefixes.",
    "quotes": "A quote is verified against the document it cites.",
    "samplers": "Sampling draws a token from the distribution.",
}


def make() -> Bm25Index:
    return Bm25Index(list(TEXTS), list(TEXTS.values()))


def test_the_text_with_the_words_of_the_query_comes_first() -> None:
    assert make().search("verified quotes", 3)[0][0] == "quotes"


def test_words_are_compared_by_their_stem() -> None:
    assert make().search("sharing requested prefix", 3)[0][0] == "pages"
    assert make().search("sampled tokens", 3)[0][0] == "samplers"


def test_texts_without_a_word_of_the_query_are_not_found() -> None:
    assert [identifier for identifier, _ in make().search("distribution", 3)] == ["samplers"]


def test_a_query_without_known_words_finds_nothing() -> None:
    assert make().search("zyzzyva", 3) == []
    assert make().search("", 3) == []
    assert make().search("the of and", 3) == []


def test_an_empty_corpus_and_one_without_words_find_nothing() -> None:
    assert Bm25Index([], []).search("page", 3) == []
    assert Bm25Index(["a"], ["…!"]).search("page", 3) == []


def test_a_saved_index_finds_the_same(tmp_path: Path) -> None:
    index = make()
    index.save(tmp_path / "bm25")
    index.save(tmp_path / "bm25")  # over an older one
    loaded = Bm25Index.load(tmp_path / "bm25")
    assert loaded is not None
    assert loaded.search("equal prefixes of requests", 3) == index.search("equal prefixes of requests", 3)


def test_an_empty_index_can_be_saved(tmp_path: Path) -> None:
    Bm25Index([], []).save(tmp_path / "bm25")
    loaded = Bm25Index.load(tmp_path / "bm25")
    assert loaded is not None
    assert loaded.search("page", 1) == []


def test_a_missing_or_damaged_index_is_none_so_that_it_is_built_again(tmp_path: Path) -> None:
    assert Bm25Index.load(tmp_path / "bm25") is None
    make().save(tmp_path / "bm25")
    for path in (tmp_path / "bm25").iterdir():
        path.write_bytes(b"{")
    assert Bm25Index.load(tmp_path / "bm25") is None
