"""SQuAD as training material: passages cut into sentences, questions with the sentence that answers each.

Knows nothing of tokens.
"""

from __future__ import annotations

import json
import lzma
import math
import random
import re
from collections import Counter
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from exl2_rag.retrieval.sentences import split_sentences


@dataclass(frozen=True, slots=True)
class Question:
    """A question, what answers it, and the sentence of its passage that holds the answer."""

    text: str
    answer: str
    sentence: int


@dataclass(frozen=True, slots=True)
class Passage:
    """A paragraph of an article. `rivals` are the passages of the article that are most like each question."""

    article: int
    title: str
    text: str
    sentences: tuple[str, ...]
    questions: tuple[Question, ...]


@dataclass(slots=True)
class Corpus:
    """Passages by article, and how telling each word is."""

    passages: list[Passage]
    by_article: dict[int, list[int]] = field(default_factory=dict)
    weights: dict[str, float] = field(default_factory=dict)

    def overlap(self, question: str, text: str) -> float:
        """Sum of the weights of the content words that both texts have."""
        return sum(self.weights.get(word, 6.0) for word in content_words(question) & content_words(text))


_WORD = re.compile(r"[^\W_]+")
_STOP_WORDS = frozenset(
    re.findall(
        r"\w+",
        "a an the of in on at to for by with from as and or but is are was were be been being do does did done has "
        "have had what which who whom whose when where why how many much that this these those it its his her their he "
        "she they there not no also than then so such into about after before between during one other some any all "
        "can could would will may might must shall should if",
    )
)
_ENDINGS = re.compile(r"(?:ing|ed|es|s|ly|ion|ions|al|er|ers|e|y|ies|ied)$")


@cache
def _stem(word: str) -> str:
    return _ENDINGS.sub("", word) if len(word) > 4 else word


@cache
def content_words(text: str) -> frozenset[str]:
    """The words that matter for finding a sentence, without their endings."""
    return frozenset(_stem(word) for word in _WORD.findall(text.lower()) if word not in _STOP_WORDS)


def read_squad(path: Path) -> Corpus:
    """Read a SQuAD v1.1 file (JSON, xz).

    A question whose answer lies in no single sentence is left out. If several sentences hold the answer's text, the one
    that shares most with the question is taken for the one meant: the file gives only the first place.
    """
    with lzma.open(path) as file:
        articles = json.load(file)["data"]
    counts: Counter[str] = Counter()
    for article in articles:
        for paragraph in article["paragraphs"]:
            counts.update(content_words(paragraph["context"]))
    total = sum(len(article["paragraphs"]) for article in articles)
    corpus = Corpus([], {}, {word: math.log((total + 1) / (count + 0.5)) for word, count in counts.items()})
    for number, article in enumerate(articles):
        title = article["title"].replace("_", " ")
        for paragraph in article["paragraphs"]:
            text = paragraph["context"].strip()
            sentences = tuple(text[start:end] for start, end in split_sentences(text))
            questions = []
            for row in paragraph["qas"]:
                question, answer = row["question"].strip(), row["answers"][0]["text"].strip()
                holding = [n for n, sentence in enumerate(sentences) if answer in sentence]
                if question and holding:
                    best = max(holding, key=lambda n: corpus.overlap(question, sentences[n]))
                    questions.append(Question(question, answer, best))
            corpus.by_article.setdefault(number, []).append(len(corpus.passages))
            corpus.passages.append(Passage(number, title, text, sentences, tuple(questions)))
    return corpus


def split_articles(corpus: Corpus, *, held_out: int, seed: int) -> tuple[list[int], list[int]]:
    """Indices of the passages to train on and of those of `held_out` whole articles to check on."""
    articles = sorted(corpus.by_article)
    aside = set(random.Random(seed).sample(articles, held_out))
    train = [n for article in articles if article not in aside for n in corpus.by_article[article]]
    return train, [n for article in sorted(aside) for n in corpus.by_article[article]]


def closest_rival(corpus: Corpus, passage: int, question: str, rng: random.Random, *, among: int = 12) -> int:
    """Of some other passages of the same article, the one most like the question."""
    others = [n for n in corpus.by_article[corpus.passages[passage].article] if n != passage]
    if not others:
        return passage
    chosen = rng.sample(others, min(among, len(others)))
    return max(chosen, key=lambda n: corpus.overlap(question, corpus.passages[n].text))
