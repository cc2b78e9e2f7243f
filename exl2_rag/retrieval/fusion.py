"""Two rankings made into one. Plain numbers; knows neither vectors nor words.

A ranking is a list of (id, score), best first.
"""

from __future__ import annotations

from collections.abc import Sequence

Ranking = Sequence[tuple[str, float]]
RANK_CONSTANT = 60
"""Of reciprocal rank fusion: how little the first ranks stand out. Source: Cormack et al., 2009."""


def fuse_scores(dense: Ranking, lexical: Ranking, *, dense_weight: float = 0.5) -> list[tuple[str, float]]:
    """Normalise both rankings by their best score and add them; who is missing from one counts 0 there.

    This is min-max normalisation with the scores' natural minimum, 0: no likeness, no word in common. The lowest score
    among the candidates would make the result depend on how many were fetched.

    Returns:
        All ids of either ranking, best first, ties by id. Scores lie between 0 and 1.
    """
    total: dict[str, float] = {}
    for ranking, weight in ((dense, dense_weight), (lexical, 1 - dense_weight)):
        best = max((score for _, score in ranking), default=0.0)
        for identifier, score in ranking:
            share = max(0.0, score) / best if best > 0 else 0.0
            total[identifier] = total.get(identifier, 0.0) + weight * share
    return _sorted(total)


def fuse_ranks(dense: Ranking, lexical: Ranking) -> list[tuple[str, float]]:
    """Reciprocal rank fusion: add 1 / (60 + rank) over both rankings, ranks from 1.

    Returns:
        All ids of either ranking, best first, ties by id.
    """
    total: dict[str, float] = {}
    for ranking in (dense, lexical):
        for rank, (identifier, _) in enumerate(ranking, start=1):
            total[identifier] = total.get(identifier, 0.0) + 1 / (RANK_CONSTANT + rank)
    return _sorted(total)


def _sorted(total: dict[str, float]) -> list[tuple[str, float]]:
    return sorted(total.items(), key=lambda item: (-item[1], item[0]))
