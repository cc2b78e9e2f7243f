"""Answers to questions of SQuAD part A over all its passages, beside two baselines without a model.

    python benchmarks/answers.py [--model DIR] [--squad DIR] [--questions 200] [--seed 0] [--index DIR] [--json]

The 1,123 passages are indexed (exact store); 200 questions are drawn from all 8,671, so that about a third of them has
no answer, as in the set. Every question goes through `DocumentQA`, settings from the model's card. The baselines read
the passage that retrieval puts first, and never decline: a random sentence of it (the mean over all its sentences, so
without chance), and the sentence with most of the question's words, stemmed and without stop words.

Measured: quotes that stand verbatim at the offsets returned (must be all); answerable questions with a quote that holds
a gold answer; exact match and F1 (SQuAD's) of the claim's text; precision and recall of declining.
"""

from __future__ import annotations

import argparse
import json
import lzma
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from exl2_rag import demo
from exl2_rag.llm.api import ExL2LLM
from exl2_rag.qa.answer import Answer
from exl2_rag.qa.evaluation import (
    abstention,
    best_overlap_sentence,
    contains_answer,
    exact_match,
    f1_score,
    sentences,
)
from exl2_rag.qa.pipeline import DocumentQA
from exl2_rag.qa.settings import QASettings
from exl2_rag.retrieval.document import Document
from exl2_rag.retrieval.index import DocumentIndex

SQUAD = Path(__file__).resolve().parents[1].parent / "shared" / "data" / "squad"
CORPUS, QUESTIONS = "retrieval-part-a.corpus.jsonl.xz", "retrieval-part-a.questions.jsonl.xz"
BATCH = 25


@dataclass(frozen=True)
class Case:
    """A question with its gold answers (none if it has no answer) and the passage it was asked about."""

    question: str
    golds: tuple[str, ...]
    source: str


@dataclass(frozen=True)
class TextScores:
    """Means over the answerable questions."""

    holds_gold_answer: float
    exact_match: float
    f1: float


def read_lines(path: Path) -> list[dict[str, Any]]:
    with lzma.open(path, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def read_corpus(squad: Path) -> list[Document]:
    return [
        Document(source=row["pid"], title=row["title"].replace("_", " "), text=row["text"], media_type="text/plain")
        for row in read_lines(squad / CORPUS)
    ]


def draw_cases(squad: Path, count: int, seed: int) -> list[Case]:
    rows = random.Random(seed).sample(read_lines(squad / QUESTIONS), count)
    return [Case(row["question"], tuple(row["answers"]), row["gold_pid"]) for row in rows]


def is_verbatim(answer: Answer, document_text: Callable[[str], str]) -> list[bool]:
    """For each quote of an answer, whether the document has it at the offsets given."""
    citations = [claim.citation for claim in answer.claims]
    return [document_text(one.source)[one.start : one.end] == one.quote != "" for one in citations]


def score_texts(cases: Sequence[Case], shown: Iterable[Sequence[tuple[str, str]]]) -> TextScores:
    """Score what is shown for each answerable case: (quote, text) pairs, the best of which counts.

    With none, a case scores 0: it should have been answered.
    """
    rows = [
        (
            any(contains_answer(quote, case.golds) for quote, _ in pairs),
            any(exact_match(text, case.golds) for _, text in pairs),
            max((f1_score(text, case.golds) for _, text in pairs), default=0.0),
        )
        for case, pairs in zip(cases, shown, strict=True)
        if case.golds
    ]
    return TextScores(*(mean(float(row[n]) for row in rows) for n in range(3)))


def score_random_sentence(cases: Sequence[Case], passages: Sequence[str]) -> TextScores:
    """The mean over all sentences of each passage: what drawing one gives on average."""
    each = [
        [score_texts([case], [[(sentence, sentence)]]) for sentence in sentences(passage)]
        for case, passage in zip(cases, passages, strict=True)
        if case.golds
    ]
    return TextScores(
        *(
            mean(statistics.fmean(getattr(one, name) for one in scores) for scores in each)
            for name in ("holds_gold_answer", "exact_match", "f1")
        )
    )


def measure(qa: DocumentQA, index: DocumentIndex, cases: Sequence[Case]) -> dict[str, Any]:
    """Ask every question and score the answers beside the baselines."""
    answers: list[Answer] = []
    started = time.perf_counter()
    for first in range(0, len(cases), BATCH):
        answers += qa.ask_many([case.question for case in cases[first : first + BATCH]])
        print(f"{len(answers)} of {len(cases)} questions", file=sys.stderr)
    asked_s = time.perf_counter() - started

    verbatim = [flag for answer in answers for flag in is_verbatim(answer, index.document_text)]
    top = [index.document_text(answer.retrieved[0].source) for answer in answers]
    overlap = [best_overlap_sentence(case.question, passage) for case, passage in zip(cases, top, strict=True)]
    shown = [[(claim.citation.quote, claim.text) for claim in answer.claims] for answer in answers]
    declining = abstention((bool(case.golds), answer.answerable) for case, answer in zip(cases, answers, strict=True))
    answered = [pair for pair in zip(cases, shown, strict=True) if pair[0].golds and pair[1]]
    answerable = [(case, answer) for case, answer in zip(cases, answers, strict=True) if case.golds]
    prompt_tokens = sum(answer.usage.prompt_tokens for answer in answers)
    return {
        "questions": len(cases),
        "answerable": len(answerable),
        "quotes": len(verbatim),
        "quotes_verbatim": mean(map(float, verbatim)),
        "claims_rejected": sum(len(answer.rejected) for answer in answers),
        "replies_truncated": sum(answer.truncated for answer in answers),
        "replies_unreadable": sum(bool(answer.failure) for answer in answers),
        "model": asdict(score_texts(cases, shown)),
        "model_where_it_answered": {"questions": len(answered)}
        | asdict(score_texts([case for case, _ in answered], [pairs for _, pairs in answered])),
        "random_sentence": asdict(score_random_sentence(cases, top)),
        "best_overlap_sentence": asdict(score_texts(cases, [[(sentence, sentence)] for sentence in overlap])),
        "declined": declining.declined,
        "declined_precision": declining.precision,
        "declined_recall": declining.recall,
        "passage_first": mean(float(answer.retrieved[0].source == case.source) for case, answer in answerable),
        "passage_shown": mean(
            float(any(chunk.shown and chunk.source == case.source for chunk in answer.retrieved))
            for case, answer in answerable
        ),
        "cached_prompt_tokens": sum(answer.usage.cached_tokens for answer in answers) / max(1, prompt_tokens),
        "seconds_per_question": asked_s / len(cases),
    }


def mean(values: Iterable[float]) -> float:
    """The mean; 0 of nothing."""
    listed = list(values)
    return statistics.fmean(listed) if listed else 0.0


def print_table(result: dict[str, Any]) -> None:
    """The result for people."""
    print(f"{result['questions']} questions, {result['answerable']} of them answerable; model {result['model_name']}")
    print(f"quotes verbatim at their offsets: {result['quotes_verbatim']:.1%} of {result['quotes']}")
    print(f"{'answerable questions':<28}{'holds gold':>12}{'exact match':>13}{'F1':>8}")
    for name in ("model", "model_where_it_answered", "best_overlap_sentence", "random_sentence"):
        row = result[name]
        print(f"{name:<28}{row['holds_gold_answer']:>12.3f}{row['exact_match']:>13.3f}{row['f1']:>8.3f}")
    ratios = [result["declined_precision"], result["declined_recall"]]
    precision, recall = ("none" if ratio is None else f"{ratio:.3f}" for ratio in ratios)
    print(f"declined {result['declined']}: precision {precision}, recall {recall}")
    print(f"gold passage first {result['passage_first']:.3f}, shown {result['passage_shown']:.3f}")
    print(f"{result['cached_prompt_tokens']:.1%} of prompt tokens cached, {result['seconds_per_question']:.2f} s each")


def round_floats(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: round_floats(inner) for key, inner in value.items()}
    return round(value, 4) if isinstance(value, float) else value


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="model directory (default: the demo model)")
    parser.add_argument("--squad", type=Path, default=SQUAD, help="directory of the SQuAD files")
    parser.add_argument("--questions", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--index", type=Path, help="keep the index here and use it again (default: made anew)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    options = parser.parse_args()
    if not (options.squad / CORPUS).is_file():
        print(f"needs {CORPUS} and {QUESTIONS} in {options.squad}; name their directory with --squad", file=sys.stderr)
        return 2
    model_dir = options.model or demo.model_dir()
    settings = QASettings.for_model(model_dir)
    cases = draw_cases(options.squad, options.questions, options.seed)
    with ExitStack() as stack:
        directory = options.index or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        index = stack.enter_context(DocumentIndex.create_or_open(directory, store="exact"))
        started = time.perf_counter()
        index.add(read_corpus(options.squad))  # embeds only what is not there yet
        indexed_s = time.perf_counter() - started
        llm = stack.enter_context(ExL2LLM(model_dir))
        result = {
            "model_name": llm.model_name,
            "settings": asdict(settings),
            "passages": len(index.sources()),
            "seed": options.seed,
            "index_seconds": indexed_s,
        }
        result |= measure(DocumentQA(llm, index, settings), index, cases)
    result = round_floats(result)
    if options.json:
        print(json.dumps(result, ensure_ascii=False))
    else:
        print_table(result)
    return 0 if result["quotes_verbatim"] == 1 or result["quotes"] == 0 else 1


if __name__ == "__main__":
    sys.exit(main())
