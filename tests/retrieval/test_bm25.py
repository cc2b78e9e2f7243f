"""Lexical search: stems, unknown words, saving and loading."""

from pathlib import Path

from exl2_rag.retrieval.bm25 import Bm25Index, lexical_tokens

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


def test_common_words_weigh_next_to_nothing() -> None:
    common, rare = make().search("the of and", 1)[0][1], make().search("distribution", 1)[0][1]
    assert common < 0.25 * rare


def test_words_are_compared_without_case_and_in_compatibility_form() -> None:
    assert lexical_tokens("DEﬁned Straße ｗｉｄｅ") == lexical_tokens("defined strasse wide")


def test_scripts_without_spaces_are_indexed_by_pairs_of_characters() -> None:
    assert lexical_tokens("東京都x2 は") == ["東京", "京都", "x2", "は"]
    index = Bm25Index(["a", "b"], ["東京都の人口", "大阪府の人口"])
    assert [identifier for identifier, _ in index.search("東京", 2)] == ["a"]


def test_scores_are_those_of_the_search_and_zero_elsewhere() -> None:
    index = make()
    found = dict(index.search("equal pages", 3))
    scores = index.scores("equal pages")
    assert {identifier: float(scores[row]) for identifier, row in index.row_of.items() if scores[row]} == found


def test_an_empty_corpus_and_one_without_words_find_nothing() -> None:
    assert Bm25Index([], []).search("page", 3) == []
    assert Bm25Index(["a"], ["…!"]).search("page", 3) == []


def test_a_saved_index_finds_the_same(tmp_path: Path) -> None:
    index = Bm25Index(list(TEXTS), list(TEXTS.values()), generation=7)
    index.save(tmp_path / "bm25")
    index.save(tmp_path / "bm25")  # over an older one
    loaded = Bm25Index.load(tmp_path / "bm25")
    assert loaded is not None
    assert loaded.generation == 7
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
