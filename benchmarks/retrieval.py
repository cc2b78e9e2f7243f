"""Recall of dense, lexical and hybrid retrieval on SQuAD part A: 1,123 passages, each a chunk of its own.

    python benchmarks/retrieval.py [--squad DIR] [--limit N] [--store exact|chroma] [--vectors FILE] [--train N]

Every answerable question (5,598; `--limit` takes the first N of them in a fixed shuffled order) is asked to retrievers
over one index: embeddings alone, BM25 alone, both fused. A question counts at k if the passage it was written for is
among the first k. `--train N` asks N questions about training paragraphs instead; weights may be chosen there, never on
part A. `--vectors` keeps embeddings in a file, so that a second run embeds nothing.

Prints one JSON object.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import lzma
import random
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from exl2_rag.retrieval.document import Document
from exl2_rag.retrieval.embedding import Embedder, Vectors, default_embedder
from exl2_rag.retrieval.index import DocumentIndex
from exl2_rag.retrieval.retriever import Retriever

SQUAD = Path(__file__).resolve().parents[1].parent / "shared" / "data" / "squad"
CORPUS, QUESTIONS, TRAIN = (
    "retrieval-part-a.corpus.jsonl.xz",
    "retrieval-part-a.questions.jsonl.xz",
    "train-v1.1.json.xz",
)
TRAIN_ARTICLES = 28
DEPTHS = (1, 5, 10)
BATCH = 256
MODES: dict[str, dict[str, Any]] = {
    "dense": {"dense_weight": 1.0},
    "bm25": {"dense_weight": 0.0},
    "hybrid": {},
    "hybrid_rank_fusion": {"fusion": "rank"},
}

Question = tuple[str, str]
"""A question and the id of the passage it was written for."""


def part_a(squad: Path) -> tuple[list[Document], list[Question]]:
    """The passages of part A and its answerable questions."""
    documents = [
        Document(row["pid"], row["title"].replace("_", " "), row["text"], "text/plain") for row in _rows(squad / CORPUS)
    ]
    return documents, [(row["question"], row["gold_pid"]) for row in _rows(squad / QUESTIONS) if row["answerable"]]


def train_part(squad: Path) -> tuple[list[Document], list[Question]]:
    """All paragraphs of some training articles and the questions about them."""
    with lzma.open(squad / TRAIN, "rt", encoding="utf-8") as stream:
        articles = random.Random(7).sample(json.load(stream)["data"], TRAIN_ARTICLES)
    documents: list[Document] = []
    questions: list[Question] = []
    for article in articles:
        for number, paragraph in enumerate(article["paragraphs"]):
            pid = f"{article['title']}#{number}"
            documents.append(Document(pid, article["title"].replace("_", " "), paragraph["context"], "text/plain"))
            questions.extend((one["question"], pid) for one in paragraph["qas"])
    return documents, questions


def recall(retriever: Retriever, questions: Sequence[Question]) -> dict[str, float]:
    """Share of questions whose passage is among the first k, for each depth, and the mean reciprocal rank at 10."""
    ranks: list[int | None] = []
    started = time.perf_counter()
    for start in range(0, len(questions), BATCH):
        batch = questions[start : start + BATCH]
        found = retriever.retrieve_many([question for question, _ in batch], max(DEPTHS))
        for (_, gold), chunks in zip(batch, found, strict=True):
            sources = [scored.chunk.source for scored in chunks]
            ranks.append(sources.index(gold) + 1 if gold in sources else None)
    figures = {f"recall@{k}": sum(1 for rank in ranks if rank and rank <= k) / len(ranks) for k in DEPTHS}
    figures["mrr@10"] = sum(1 / rank for rank in ranks if rank) / len(ranks)
    figures["ms_per_question"] = (time.perf_counter() - started) * 1000 / len(ranks)
    return {name: round(value, 4) for name, value in figures.items()}


class KeptEmbedder:
    """An embedder that remembers what it has embedded, in a file if there is one; for repeated runs only."""

    def __init__(self, embedder: Embedder, path: Path | None) -> None:
        self._embedder = embedder
        self._path = path
        self._held: dict[str, Vectors] = {}
        self.id, self.dimension, self.max_tokens = embedder.id, embedder.dimension, embedder.max_tokens
        if path is not None and path.is_file():
            with np.load(path, allow_pickle=False) as held:
                if str(held["embedder"]) == embedder.id:
                    self._held = dict(zip(map(str, held["keys"]), held["vectors"], strict=True))

    def count_tokens(self, texts: Sequence[str]) -> list[int]:
        return self._embedder.count_tokens(texts)

    def embed(self, texts: Sequence[str]) -> Vectors:
        keys = [hashlib.blake2b(text.encode(), digest_size=16).hexdigest() for text in texts]
        missing = {key: text for key, text in zip(keys, texts, strict=True) if key not in self._held}
        if missing:
            self._held.update(zip(missing, self._embedder.embed(list(missing.values())), strict=True))
        return np.stack([self._held[key] for key in keys])

    def save(self) -> None:
        if self._path is not None:
            vectors = np.stack(list(self._held.values()))
            np.savez(self._path, embedder=np.array(self.id), keys=np.array(list(self._held)), vectors=vectors)


def measure(
    documents: Sequence[Document], questions: Sequence[Question], embedder: KeptEmbedder, store: str
) -> dict[str, Any]:
    """Index the passages, ask the questions in every mode."""
    with _index(documents, embedder, store) as (index, seconds):
        embedder.embed([question for question, _ in questions])  # so that times are those of searching
        embedder.save()
        results = {name: recall(Retriever(index, **options), questions) for name, options in MODES.items()}
        n_chunks = index.n_chunks
    return {
        "passages": len(documents),
        "chunks": n_chunks,
        "questions": len(questions),
        "embedder": embedder.id,
        "store": store,
        "index_s": round(seconds, 1),
        "results": results,
    }


@contextmanager
def _index(documents: Sequence[Document], embedder: KeptEmbedder, store: str) -> Iterator[tuple[DocumentIndex, float]]:
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        # Chunks as long as the longest passage: here retrieval is measured, not chunking.
        whole = WholePassages(embedder)
        with DocumentIndex.create_or_open(folder, embedder=whole, store=store, chunk_tokens=100_000) as index:
            index.add(documents)
            index.lexical()
            yield index, time.perf_counter() - started


class WholePassages:
    """Lets a passage beyond the model's limit stay one chunk: its vector is the mean of its parts' vectors."""

    def __init__(self, embedder: KeptEmbedder) -> None:
        self._inner = embedder
        self.id, self.dimension, self.max_tokens = embedder.id, embedder.dimension, 100_000

    def count_tokens(self, texts: Sequence[str]) -> list[int]:
        return self._inner.count_tokens(texts)

    def embed(self, texts: Sequence[str]) -> Vectors:
        vectors = []
        for text in texts:
            total = self._inner.embed(self._parts(text)).sum(axis=0)
            vectors.append(total / np.linalg.norm(total))
        return np.stack(vectors)

    def _parts(self, text: str) -> list[str]:
        limit = self._inner.max_tokens
        parts: list[str] = []
        rest = text.split(" ")
        while rest:
            size = len(rest)
            while self._inner.count_tokens([" ".join(rest[:size])])[0] > limit:
                size = size * 9 // 10
            parts.append(" ".join(rest[:size]))
            rest = rest[size:]
        return parts


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    with lzma.open(path, "rt", encoding="utf-8") as stream:
        for line in stream:
            yield json.loads(line)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--squad", type=Path, default=SQUAD)
    parser.add_argument("--limit", type=int, default=None)
    parser.add_argument("--store", choices=["exact", "chroma"], default="exact")
    parser.add_argument("--vectors", type=Path, default=None)
    parser.add_argument("--train", type=int, default=None)
    arguments = parser.parse_args()
    if not (arguments.squad / CORPUS).is_file():
        sys.exit(f"expected {CORPUS} in {arguments.squad}; give its folder with --squad")
    documents, questions = part_a(arguments.squad) if arguments.train is None else train_part(arguments.squad)
    random.Random(0).shuffle(questions)
    questions = questions[: arguments.limit if arguments.train is None else arguments.train]
    embedder = KeptEmbedder(default_embedder(), arguments.vectors)
    result = measure(documents, questions, embedder, arguments.store)
    print(json.dumps({"set": "part-a" if arguments.train is None else "train", **result}))


if __name__ == "__main__":
    main()
