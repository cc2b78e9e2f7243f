"""Scores for answers: exact match and F1 as SQuAD counts them, abstention, and what a baseline without a model needs.

Knows texts only; what is measured with it stands in `benchmarks/answers.py`.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

from exl2_rag.retrieval.sentences import split_sentences

_ARTICLES = re.compile(r"\b(?:a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)

STOP_WORDS = frozenset(
    """
    a about after all also an and any are as at be because been before being between both but by can could
    did do does during each for from had has have he her his how if in into is it its many more most much no
    not of on one only or other our over she should so some such than that the their them then there these
    they this those through to too under until up was we were what when where which while who whom whose why
    will with would you your
    """.split()  # noqa: SIM905 (a list literal would be one word a line)
)
"""Words that say little about what a sentence is about; question words among them."""


def normalise_answer(text: str) -> str:
    """Lower case, without ASCII punctuation, English articles and extra white space: SQuAD's normal form."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact_match(prediction: str, golds: Iterable[str]) -> bool:
    """Whether the normal forms of `prediction` and of one gold answer are equal. No gold answer: of the empty text."""
    return any(normalise_answer(prediction) == normalise_answer(gold) for gold in list(golds) or [""])


def f1_score(prediction: str, golds: Iterable[str]) -> float:
    """Best F1 of word overlap with a gold answer, 0 to 1. No gold answer: compared with the empty text."""
    return max(
        _f1(normalise_answer(prediction).split(), normalise_answer(gold).split()) for gold in list(golds) or [""]
    )


def contains_answer(text: str, golds: Iterable[str]) -> bool:
    """Whether `text` holds a gold answer as whole words, both in normal form."""
    held = f" {normalise_answer(text)} "
    return any(normal and f" {normal} " in held for normal in map(normalise_answer, golds))


def _f1(prediction: Sequence[str], gold: Sequence[str]) -> float:
    if not prediction or not gold:
        return float(prediction == gold)
    same = sum((Counter(prediction) & Counter(gold)).values())
    return 2 * same / (len(prediction) + len(gold))


@dataclass(frozen=True, slots=True)
class Abstention:
    """How well declining met the questions that have no answer. A ratio without cases is None, not 0 or 1."""

    declined: int
    unanswerable: int
    rightly_declined: int

    @property
    def precision(self) -> float | None:
        """Share of declined questions that have no answer."""
        return self.rightly_declined / self.declined if self.declined else None

    @property
    def recall(self) -> float | None:
        """Share of questions without answer that were declined."""
        return self.rightly_declined / self.unanswerable if self.unanswerable else None


def abstention(cases: Iterable[tuple[bool, bool]]) -> Abstention:
    """Count cases of (has an answer, was answered)."""
    rows = list(cases)
    return Abstention(
        declined=sum(not answered for _, answered in rows),
        unanswerable=sum(not has_answer for has_answer, _ in rows),
        rightly_declined=sum(not has_answer and not answered for has_answer, answered in rows),
    )


def sentences(passage: str) -> list[str]:
    """The sentences of a passage, verbatim."""
    return [passage[start:end] for start, end in split_sentences(passage)]


def best_overlap_sentence(question: str, passage: str) -> str:
    """Baseline: the sentence with most of the question's words (stemmed, `STOP_WORDS` removed); of equals the first."""
    wanted = content_stems(question)
    return max(sentences(passage), key=lambda sentence: len(wanted & content_stems(sentence)))


def content_stems(text: str) -> frozenset[str]:
    """Stems of the words of `text` that are no stop words."""
    stem = _stemmer()
    return frozenset(stem(word) for word in re.findall(r"\w+", text.lower()) if word not in STOP_WORDS)


@lru_cache(maxsize=1)
def _stemmer() -> Callable[[str], str]:
    import Stemmer  # type: ignore[import-not-found]  # compiled, without stubs

    stem: Callable[[str], str] = Stemmer.Stemmer("english").stemWord
    return stem
