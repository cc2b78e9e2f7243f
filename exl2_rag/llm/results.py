"""Results out of the pieces they came in."""

from __future__ import annotations

import dataclasses

from exl2_rag.llm.prompt_report import PromptReport
from exl2_rag.llm.request import GenerationResult, StreamPiece


def joined_result(pieces: list[StreamPiece]) -> GenerationResult:
    """The whole of what came in pieces; with several continuations the first, which has the others."""
    by_index: dict[int, list[StreamPiece]] = {}
    for piece in pieces:
        by_index.setdefault(piece.index, []).append(piece)
    first, *others = [_joined(by_index[index]) for index in sorted(by_index)]
    return dataclasses.replace(first, alternatives=tuple(others)) if others else first


def _joined(pieces: list[StreamPiece]) -> GenerationResult:
    last = pieces[-1]
    assert last.finish_reason is not None
    assert last.usage is not None
    assert last.timings is not None
    logprobs = [one for piece in pieces for one in piece.logprobs or ()]
    return GenerationResult(
        text="".join(piece.text for piece in pieces),
        token_ids=tuple(token_id for piece in pieces for token_id in piece.token_ids),
        finish_reason=last.finish_reason,
        usage=last.usage,
        timings=last.timings,
        index=last.index,
        logprobs=None if last.logprobs is None else tuple(logprobs),
        prompt=last.prompt or PromptReport(),
        cache_explain=last.cache_explain,
        speculation=last.speculation,
    )
