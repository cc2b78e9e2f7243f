"""In which order the chunks of a prompt stand, so that the engine can use again what it has computed.

Keys and values are reusable from the front of a prompt only. Chunks have no order of their own, so those come first
that the cache can go on with from the rules; among the others, those shown most often so far, since what comes first
is most likely to be found again. Knows tokens only to ask the engine.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Sequence
from typing import Protocol

from exl2_rag.llm.tokenizer import Tokenizer
from exl2_rag.qa.prompt import block_title, document_block, label_order
from exl2_rag.retrieval.document import Chunk

MAX_COUNTED = 100_000
"""Chunks whose showings are counted; beyond, the rarer half is forgotten."""


class PrefixCache(Protocol):
    """What the order asks of an engine. `ExL2LLM` fits as it is."""

    @property
    def tokenizer(self) -> Tokenizer: ...  # noqa: D102

    def cached_order(
        self, prefix: Sequence[int], blocks: Sequence[Sequence[int]], *, first: Sequence[Sequence[int]] | None = None
    ) -> list[int]:
        """Indices of all blocks: first those that go on from the prefix on the deepest cached path."""
        ...


class ChunkPopularity:
    """How often each chunk has been shown. Safe from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._shown: Counter[str] = Counter()

    def note(self, chunks: Sequence[Chunk]) -> None:
        """Count a showing of each."""
        with self._lock:
            self._shown.update(chunk.label for chunk in chunks)
            if len(self._shown) > MAX_COUNTED:
                self._shown = Counter(dict(self._shown.most_common(MAX_COUNTED // 2)))

    def sort(self, chunks: Sequence[Chunk]) -> list[Chunk]:
        """The most popular first, equals by label."""
        with self._lock:
            return sorted(chunks, key=lambda chunk: (-self._shown[chunk.label], label_order(chunk.label)))


def deepest_cached(
    engine: PrefixCache, chunks: Sequence[Chunk], delimiter: str, token_ids: Sequence[int]
) -> list[Chunk]:
    """The chunks in the order that continues the deepest cached path.

    Args:
        chunks: in the order that is preferred where the cache does not care; at least one.
        token_ids: the prompt that shows them in this order, with more behind them.
    """
    texts = [
        document_block(delimiter, chunk.label, block_title(chunk.title, chunk.heading), chunk.text) for chunk in chunks
    ]
    blocks = [engine.tokenizer.encode_continuation(text) for text in texts]
    tail = [token for block in blocks[1:] for token in block]
    end = _find_last(token_ids, tail)
    if len(chunks) < 2 or end is None:
        return list(chunks)
    first = blocks
    if not _ends_with(token_ids[:end], blocks[0]):
        # SentencePiece tokenizers put a space before the text that follows a special token.
        first = [engine.tokenizer.encode_continuation(" " + text) for text in texts]
        if not _ends_with(token_ids[:end], first[0]):
            return list(chunks)
    prefix = token_ids[: end - len(first[0])]
    return [chunks[place] for place in engine.cached_order(prefix, blocks, first=first)]


def _ends_with(tokens: Sequence[int], end: Sequence[int]) -> bool:
    return list(tokens[max(0, len(tokens) - len(end)) :]) == list(end)


def _find_last(tokens: Sequence[int], wanted: Sequence[int]) -> int | None:
    """Where `wanted`, at least one token, begins in `tokens` for the last time."""
    if not wanted:
        return None
    for place in range(len(tokens) - len(wanted), -1, -1):
        if tokens[place] == wanted[0] and list(tokens[place : place + len(wanted)]) == list(wanted):
            return place
    return None
