"""A question in, ranked chunks out: dense and lexical search over one index, fused."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from exl2_rag.errors import RequestError, SettingsError
from exl2_rag.retrieval.document import ScoredChunk
from exl2_rag.retrieval.embedding import Vectors
from exl2_rag.retrieval.fusion import Ranking, fuse_ranks, fuse_scores
from exl2_rag.retrieval.index import DocumentIndex

Fusion = Literal["score", "rank"]
DEFAULT_K = 5


class Retriever:
    """Searches an open index.

    Args:
        index: stays open as long as the retriever is used, and belongs to the caller.
        fusion: "score" (min-max normalised scores) or "rank" (reciprocal rank fusion).
        dense_weight: share of the embedding's score in "score" fusion; 0 is BM25 alone, 1 is dense alone.
        candidates: chunks taken from each search before fusion; never fewer than asked for.

    Raises:
        SettingsError: a value out of range.
    """

    def __init__(
        self,
        index: DocumentIndex,
        *,
        fusion: Fusion = "score",
        dense_weight: float = 0.5,
        candidates: int = 50,
    ) -> None:
        if fusion not in ("score", "rank"):
            raise SettingsError(f'fusion must be "score" or "rank", got {fusion!r}')
        if not 0 <= dense_weight <= 1:
            raise SettingsError(f"dense_weight must be from 0 to 1, got {dense_weight}")
        if candidates < 1:
            raise SettingsError(f"candidates must be at least 1, got {candidates}")
        self.index = index
        self._fusion = fusion
        self._dense_weight = dense_weight
        self._candidates = candidates

    def retrieve(self, question: str, k: int = DEFAULT_K, *, sources: Sequence[str] | None = None) -> list[ScoredChunk]:
        """The k chunks that fit best, best first; fewer if the index has fewer.

        Args:
            question: what to look for; no longer than the embedder takes.
            k: at least 1.
            sources: look in these documents only.

        Raises:
            RequestError: an empty question or a k below 1.
            TextTooLongError: a question longer than the embedder takes.
        """
        return self.retrieve_many([question], k, sources=sources)[0]

    def retrieve_many(
        self, questions: Sequence[str], k: int = DEFAULT_K, *, sources: Sequence[str] | None = None
    ) -> list[list[ScoredChunk]]:
        """`retrieve` for several questions, embedded together."""
        if k < 1:
            raise RequestError(f"k must be at least 1, got {k}")
        for question in questions:
            if not question.strip():
                raise RequestError("the question is empty; ask something")
        if not questions:
            return []
        vectors = self.index.embedder.embed(questions)
        return [
            self._search(question, vector, k, None if sources is None else list(dict.fromkeys(sources)))
            for question, vector in zip(questions, vectors, strict=True)
        ]

    def _search(self, question: str, vector: Vectors, k: int, sources: list[str] | None) -> list[ScoredChunk]:
        depth = max(self._candidates, k)
        dense = self._nearest(vector, depth, sources)
        lexical = self._matching(question, depth, sources)
        if self._fusion == "rank":
            fused: Ranking = fuse_ranks(dense, lexical)
        else:
            fused = self._fuse_scores(question, vector, dense, lexical)
        chunks = self.index.find_chunks(identifier for identifier, _ in fused)  # one removed meanwhile is missing
        found = [ScoredChunk(chunks[identifier], score) for identifier, score in fused if identifier in chunks]
        return found[:k]

    def _nearest(self, vector: Vectors, depth: int, sources: list[str] | None) -> Ranking:
        store = self.index.store
        if sources is None:
            return store.query(vector, depth)
        found = [hit for source in sources for hit in store.query(vector, depth, {"source": source})]
        return sorted(found, key=lambda hit: (-hit[1], hit[0]))[:depth]

    def _matching(self, question: str, depth: int, sources: list[str] | None) -> Ranking:
        words = self.index.lexical()
        if sources is None:
            return words.search(question, depth)
        scores = words.scores(question)
        ids = [chunk.chunk_id for source in sources for chunk in self.index.chunks(source)]
        found = [(one, float(scores[words.row_of[one]])) for one in ids if one in words.row_of]
        return sorted((hit for hit in found if hit[1] > 0), key=lambda hit: (-hit[1], hit[0]))[:depth]

    def _fuse_scores(self, question: str, vector: Vectors, dense: Ranking, lexical: Ranking) -> Ranking:
        """Score fusion of exact scores: what one search did not bring up is looked up, not taken for 0."""
        by_vector, by_words = dict(dense), dict(lexical)
        held = self.index.store.vectors([identifier for identifier in by_words if identifier not in by_vector])
        by_vector.update((identifier, float(one @ vector)) for identifier, one in held.items())
        words = self.index.lexical()
        scores = words.scores(question)
        for identifier in by_vector:
            if identifier not in by_words and identifier in words.row_of:
                by_words[identifier] = float(scores[words.row_of[identifier]])
        return fuse_scores(list(by_vector.items()), list(by_words.items()), dense_weight=self._dense_weight)
