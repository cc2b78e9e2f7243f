"""What an answer is, and the strict reading of a model's reply. Plain data; knows neither engine nor index.

A model's reply is a claim about documents, not a fact: `parse_reply` only reads it. What holds against the documents
is decided in `exl2_rag.qa.citations`, and only that becomes a `Claim` of an `Answer`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from exl2_rag.errors import AnswerError
from exl2_rag.llm.request import Usage
from exl2_rag.qa.citations import MatchKind


@dataclass(frozen=True, slots=True)
class Citation:
    """A quote and its place. `document_text(source)[start:end]` is `quote`, character for character.

    Attributes:
        source: the file, as the index names it.
        title, heading: of the document and of the part the quote stands in.
        page: page number from 1, or None where the format has no pages.
        start, end: character offsets in the document's text.
        quote: the document's own words there.
        chunk_id, label: the retrieved chunk that holds it, and its short name in the prompt.
        match: how the model's wording compared: "exact", "normalised" (typography differs) or "near".
    """

    source: str
    title: str
    heading: str
    page: int | None
    start: int
    end: int
    quote: str
    chunk_id: str
    label: str
    match: MatchKind


@dataclass(frozen=True, slots=True)
class Claim:
    """A statement and the verified quote it rests on. The model's own words, as a statement, are not verified."""

    text: str
    citation: Citation


@dataclass(frozen=True, slots=True)
class RawClaim:
    """A claim as the model wrote it, nothing verified."""

    source: str
    quote: str
    text: str


@dataclass(frozen=True, slots=True)
class RejectedClaim:
    """A claim whose quote no shown document holds; kept so that it can be counted, never part of the answer."""

    claim: RawClaim
    reason: str


@dataclass(frozen=True, slots=True)
class ShownChunk:
    """A retrieved chunk. `shown` is False for one left out because the prompt would not have fitted the model."""

    chunk_id: str
    label: str
    source: str
    score: float
    shown: bool


@dataclass(frozen=True, slots=True)
class AnswerTimings:
    """Wall-clock seconds. In a batch, `retrieval_s` and `total_s` are those of the whole batch."""

    retrieval_s: float
    first_token_s: float
    generation_s: float
    total_s: float


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer whose every claim carries a verified quote.

    Attributes:
        question: as asked.
        answerable: True if at least one claim stands. False: the model declined, or nothing it said held.
        text: the claims' texts in one line; empty if not answerable.
        claims: what holds.
        rejected: what the model claimed with quotes that no shown document holds.
        truncated: the reply was cut off at max_tokens. Claims that were complete by then stand, verified like any
            other; what came after is missing.
        failure: why there is no reply, or why it could not be read; empty if all went well. Only `ask_many` returns
            an answer with a failure; `ask` raises the error.
        retrieved: all retrieved chunks, best first.
        usage: token counts; `usage.cached_tokens` of the prompt were not computed again.
        timings: seconds.
        raw: the model's reply, unchanged.
    """

    question: str
    answerable: bool
    text: str
    claims: tuple[Claim, ...]
    rejected: tuple[RejectedClaim, ...]
    truncated: bool
    failure: str
    retrieved: tuple[ShownChunk, ...]
    usage: Usage
    timings: AnswerTimings
    raw: str

    @property
    def dropped(self) -> tuple[ShownChunk, ...]:
        """Retrieved chunks that did not fit the model's context and were not shown to it."""
        return tuple(chunk for chunk in self.retrieved if not chunk.shown)


@dataclass(frozen=True, slots=True)
class Reply:
    """A model's reply as read, nothing verified."""

    answerable: bool
    claims: tuple[RawClaim, ...]
    truncated: bool = False


def parse_reply(text: str, *, cut_off: bool = False) -> Reply:
    """Read a model's reply.

    Args:
        text: the reply.
        cut_off: it ended because of max_tokens; then an unfinished reply gives its complete claims, marked truncated.

    Raises:
        AnswerError: the reply is not the JSON that was asked for, or it contradicts itself.
    """
    try:
        value = json.loads(text, object_pairs_hook=_unique_keys)
    except (json.JSONDecodeError, RecursionError) as error:
        if cut_off:
            return Reply(answerable=True, claims=_complete_claims(text), truncated=True)
        raise AnswerError(
            f"expected the reply as JSON, got text that does not parse ({error}): {_shorten(text)}. "
            "Ask a model that knows the prompt form, or let the quote constraint hold it to the form"
        ) from error
    if not isinstance(value, dict) or value.keys() != {"answerable", "claims"}:
        raise AnswerError(f'expected an object with "answerable" and "claims" alone, got {_shorten(text)}')
    answerable, claims = value["answerable"], value["claims"]
    if not isinstance(answerable, bool) or not isinstance(claims, list):
        raise AnswerError(f'expected "answerable" as true or false and "claims" as a list, got {_shorten(text)}')
    if answerable != bool(claims):
        raise AnswerError(
            f"the reply contradicts itself: answerable is {json.dumps(answerable)} with {len(claims)} claims; "
            "an answer has at least one, a refusal none"
        )
    return Reply(answerable, tuple(_claim(row) for row in claims))


def _claim(row: Any) -> RawClaim:
    fields = ("source", "quote", "text")
    if not isinstance(row, dict) or row.keys() != set(fields) or not all(isinstance(row[name], str) for name in fields):
        raise AnswerError(
            f'expected each claim as {{"source": text, "quote": text, "text": text}}, got {_shorten(json.dumps(row))}'
        )
    return RawClaim(row["source"], row["quote"], row["text"])


_CLAIMS_START = '{"answerable":true,"claims":['


def _complete_claims(text: str) -> tuple[RawClaim, ...]:
    """The whole claims at the head of a reply that was cut off."""
    claims: list[RawClaim] = []
    if not text.startswith(_CLAIMS_START):
        return ()
    place = len(_CLAIMS_START)
    decoder = json.JSONDecoder(object_pairs_hook=_unique_keys)
    while text.startswith("{", place):
        try:
            row, place = decoder.raw_decode(text, place)
        except json.JSONDecodeError:
            break
        claims.append(_claim(row))
        if not text.startswith(",", place):
            break
        place += 1
    return tuple(claims)


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        raise AnswerError(f"expected each key once, got {_shorten(', '.join(key for key, _ in pairs))}")
    return value


def _shorten(text: str, limit: int = 200) -> str:
    return repr(text if len(text) <= limit else text[:limit] + "…")
