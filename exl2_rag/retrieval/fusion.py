"""Two rankings made into one. Plain numbers; knows neither vectors nor words.

A ranking is a list of (id, score), best first.
"""

from __future__ import annotations

from collections.abc import Sequence

Ranking = Sequence[tuple[str, float]]
RANK_CONSTANT = 60
"""Of reciprocal rank fusion: how little the first ranks stand out. Source: Cormack et al., 2009."""


def fuse_scores(dense: Ranking, lexical: Ranking, *, dense_weight: float = 0.5) -> list[tuple[str, float]]:
    """Min-max normalise both rankings and add them; who is missing from one counts as its worst.

    Returns:
        All ids of either ranking, best first, ties by id. Scores lie between 0 and 1.
    """
    total: dict[str, float] = {}
    for ranking, weight in ((dense, dense_weight), (lexical, 1 - dense_weight)):
        for identifier, score in _normalised(ranking):
            total[identifier] = total.get(identifier, 0.0) + weight * score
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


def _normalised(ranking: Ranking) -> list[tuple[str, float]]:
    if not ranking:
        return []
    scores = [score for _, score in ranking]
    low, high = min(scores), max(scores)
    if high == low:
        return [(identifier, 1.0) for identifier, _ in ranking]
    return [(identifier, (score - low) / (high - low)) for identifier, score in ranking]


def _sorted(total: dict[str, float]) -> list[tuple[str, float]]:
    return sorted(total.items(), key=lambda item: (-item[1], item[0]))
