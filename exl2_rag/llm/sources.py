"""Which documents a prompt's text was taken from, and from which token on."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from exl2_rag.errors import RequestError

Sources = Iterable[str] | Mapping[str, int]


def source_positions(sources: Sources) -> tuple[tuple[str, int], ...]:
    """`GenerationRequest.sources` as pairs of a document's id and the position of its first token.

    Raises:
        RequestError: a lone text, an id that is no text or empty, or a position below 0.
    """
    if isinstance(sources, str):
        raise RequestError(f"sources must be a list of document ids, got the text {sources!r:.80}; put it into a list")
    pairs = tuple(sources.items()) if isinstance(sources, Mapping) else tuple((one, 0) for one in sources)
    for source, position in pairs:
        if not isinstance(source, str) or not source or not isinstance(position, int) or position < 0:
            raise RequestError(
                f"sources must be texts, or map texts to positions of 0 or more, got {source!r:.80}: {position!r:.80}"
            )
    return pairs
