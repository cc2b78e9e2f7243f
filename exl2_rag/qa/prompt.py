"""The prompt form: how a question and its documents are put to a model, and how its reply is written.

A model trained for this project is trained on exactly this text, so it carries a version, `PROMPT_FORM_VERSION`,
which the model's card names. Changing any character of what these functions return is a new version.

A prompt is a list of token blocks: the system text, one block per document chunk, the question. Each block is
tokenised by itself and is a pure function of what it shows (no rank, no score, no "document 3 of 8"), and chunks stand
in an order that the question has no part in; so two questions over the same documents share their leading tokens and
the engine computes those once. This module knows nothing of tokens, of retrieval scores or of the engine.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from typing import Any, Protocol, TypeVar

from exl2_rag.errors import RequestError, RetrievalError
from exl2_rag.llm.tokenizer import TextBlock

PROMPT_FORM_VERSION = "1"

SYSTEM_TEXT = (
    "Answer the question from the documents. Quote them word for word. If they do not hold the answer, say so.\n"
    'Reply with JSON: {"answerable": true or false, "claims": '
    '[{"source": id, "quote": words of that document, "text": short answer}]}'
)


DECLINED = '{"answerable":false,"claims":[]}'
"""The reply of a model that finds no answer in the documents."""


def answer_json(claims: Iterable[tuple[str, str, str]]) -> str:
    """The reply of a model that answers: compact JSON, keys in the order the constraint forces.

    Args:
        claims: (source label, quote, text) of each claim, at least one.
    """
    rows = [{"source": source, "quote": quote, "text": text} for source, quote, text in claims]
    if not rows:
        raise ValueError("an answer needs at least one claim; the reply that declines is DECLINED")
    return json.dumps({"answerable": True, "claims": rows}, ensure_ascii=False, separators=(",", ":"))


class PromptChunk(Protocol):
    """What a prompt shows of a chunk. `retrieval.document.Chunk` fits as it is."""

    @property
    def label(self) -> str: ...  # noqa: D102

    @property
    def title(self) -> str: ...  # noqa: D102

    @property
    def heading(self) -> str: ...  # noqa: D102

    @property
    def text(self) -> str: ...  # noqa: D102


ChunkT = TypeVar("ChunkT", bound=PromptChunk)


def block_title(title: str, heading: str = "") -> str:
    """The title line of a document block: the document's title, and the chunk's heading if it has one."""
    joined = f"{title} - {heading}" if heading else title
    return " ".join(joined.split())  # a line break here would end the header line early


def document_block(delimiter: str, label: str, title: str, text: str) -> str:
    """One chunk as the model sees it. `title` is what `block_title` returns."""
    return f"<<{delimiter} {label}>> {title}\n{text}\n"


def question_block(delimiter: str, question: str) -> str:
    """The question as the model sees it, after the documents."""
    return f"<<{delimiter} question>>\n{question}"


def chunk_block(chunk: PromptChunk, delimiter: str) -> TextBlock:
    """A chunk as a token block of a prompt."""
    title = block_title(chunk.title, chunk.heading)
    return TextBlock(document_block(delimiter, chunk.label, title, chunk.text), trusted=False)


def label_order(label: str) -> tuple[str, int, str]:
    """Sort key of labels: "d9" before "d10"."""
    match = re.fullmatch(r"(.*?)(\d+)", label, re.DOTALL)
    return (match[1], int(match[2]), label) if match else (label, -1, label)


def order_chunks(chunks: Iterable[ChunkT]) -> list[ChunkT]:
    """The chunks in the order of their labels, each once. It depends on the chunks alone, never on the question."""
    by_label: dict[str, ChunkT] = {}
    for chunk in chunks:
        by_label.setdefault(chunk.label, chunk)
    return sorted(by_label.values(), key=lambda chunk: label_order(chunk.label))


def build_messages(
    question: str, chunks: Sequence[PromptChunk], delimiter: str, *, keep_order: bool = False
) -> list[dict[str, Any]]:
    """The chat messages that ask `question` about `chunks`, as token blocks for `ExL2LLM.encode_chat`.

    Args:
        question: what is asked.
        chunks: the chunks to show.
        delimiter: the secret of the index the chunks come from.
        keep_order: show them as they come; otherwise each label once, in the order of the labels.

    Returns:
        A system message and a user message; the user message's content is a list of untrusted `TextBlock`, one per
        chunk and one for the question. Untrusted text is never parsed for special tokens.

    Raises:
        RequestError: the question is empty or holds the delimiter.
        RetrievalError: a chunk holds the delimiter, which indexing should have stripped.
    """
    if not question.strip():
        raise RequestError("expected a question, got an empty text; ask something")
    if delimiter.lower() in question.lower():
        raise RequestError(
            "the question holds the index's secret delimiter, with which it could pose as a document; leave it out"
        )
    blocks: list[TextBlock] = []
    for chunk in chunks if keep_order else order_chunks(chunks):
        title = block_title(chunk.title, chunk.heading)
        if delimiter.lower() in f"{title}\n{chunk.text}".lower():
            raise RetrievalError(
                f"chunk {chunk.label} holds the index's secret delimiter, which indexing strips; index its source again"
            )
        blocks.append(chunk_block(chunk, delimiter))
    blocks.append(TextBlock(question_block(delimiter, question), trusted=False))
    return [{"role": "system", "content": SYSTEM_TEXT}, {"role": "user", "content": blocks}]
