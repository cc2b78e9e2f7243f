"""The answers benchmark counts what it says it counts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.answers import Case, is_verbatim, measure, score_random_sentence, score_texts
from exl2_rag.llm.tokenizer import Tokenizer
from exl2_rag.qa.pipeline import DocumentQA
from exl2_rag.qa.prompt import DECLINED, answer_json
from exl2_rag.qa.settings import QASettings
from tests.qa.support import CACHE, ENGINE_DOC, PAGES, PETS, ListedChunks, ScriptedEngine
from tests.support.byte_tokenizer import write_byte_tokenizer

SIZE = Case("How many tokens do pages hold?", ("32", "32 tokens"), ENGINE_DOC.source)
SHARED = Case("Who shares a page?", ("every request",), ENGINE_DOC.source)
NONSENSE = Case("Who painted the cache?", (), ENGINE_DOC.source)
REPLIES = {
    SIZE.question: answer_json([("d2", "Pages hold 32 tokens each.", "32")]),
    SHARED.question: answer_json([("d2", "A page is stored on the moon.", "every request")]),
    NONSENSE.question: DECLINED,
}


@pytest.fixture
def qa(tmp_path: Path) -> DocumentQA:
    write_byte_tokenizer(tmp_path)
    engine = ScriptedEngine(Tokenizer.from_dir(tmp_path), lambda question: REPLIES[question])
    return DocumentQA(engine, ListedChunks(PAGES, CACHE, PETS), QASettings())  # type: ignore[arg-type]


def test_a_run_is_scored_beside_its_baselines(qa: DocumentQA) -> None:
    index: Any = qa.retriever.index
    result = measure(qa, index, [SIZE, SHARED, NONSENSE])
    assert (result["questions"], result["answerable"]) == (3, 2)
    assert (result["quotes"], result["quotes_verbatim"], result["claims_rejected"]) == (1, 1.0, 1)
    assert result["model"] == {"holds_gold_answer": 0.5, "exact_match": 0.5, "f1": 0.5}
    assert result["model_where_it_answered"] == {"questions": 1, "holds_gold_answer": 1, "exact_match": 1, "f1": 1}
    assert result["best_overlap_sentence"]["holds_gold_answer"] == 1
    # Four sentences in the document: one holds the first answer, one the second.
    assert result["random_sentence"]["holds_gold_answer"] == 0.25
    assert (result["declined"], result["declined_precision"], result["declined_recall"]) == (2, 0.5, 1.0)
    assert (result["passage_first"], result["passage_shown"]) == (1.0, 1.0)


def test_a_quote_that_does_not_stand_at_its_offsets_is_counted(qa: DocumentQA) -> None:
    answer = qa.ask(SIZE.question)
    assert is_verbatim(answer, lambda _: ENGINE_DOC.text) == [True]
    assert is_verbatim(answer, lambda _: "x" + ENGINE_DOC.text) == [False]
    claim = answer.claims[0]
    empty = replace(claim, citation=replace(claim.citation, quote="", end=claim.citation.start))
    assert is_verbatim(replace(answer, claims=(empty,)), lambda _: ENGINE_DOC.text) == [False]


def test_an_answerable_question_left_open_scores_nothing() -> None:
    assert score_texts([SIZE], [[]]).f1 == 0
    assert score_texts([SIZE, NONSENSE], [[("32", "32")], []]).exact_match == 1


def test_the_random_baseline_is_the_mean_over_sentences() -> None:
    scores = score_random_sentence([SIZE], ["Pages hold 32 tokens. No more. No less. Done."])
    assert scores.holds_gold_answer == 0.25
