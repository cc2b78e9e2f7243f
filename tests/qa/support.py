"""Small real stand-ins for what stands on either side of a pipeline: an index of given chunks, a scripted engine.

The scripted engine says what it is told, whatever constraint it gets, so that lies can be tested. The random engine
draws uniformly among the tokens its constraint allows: a model without any sense, held by the constraint alone.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from exl2_rag.errors import RetrievalError
from exl2_rag.llm.chat_template import ChatTemplate, encode_chat
from exl2_rag.llm.constraint import Constraint
from exl2_rag.llm.request import GenerationResult, SamplingParams, Timings, Usage
from exl2_rag.llm.tokenizer import Tokenizer
from exl2_rag.retrieval.document import Chunk, Document, ScoredChunk
from tests.support.byte_tokenizer import CHAT_TEMPLATE

DELIMITER = "5f0c91ab"

ENGINE_DOC = Document(
    source="manual/engine.md",
    title="Engine",
    text="Pages hold 32 tokens each. A page is shared by every request with the same prefix.\n\n"
    "The cache is emptied “tail first”. Pinned pages stay — always.",
    media_type="text/markdown",
)
PETS_DOC = Document(
    source="pets.pdf",
    title="Pets",
    text='The cat "Felix" sleeps \\ eats.\nDogs bark at 3.14 metres.',
    media_type="application/pdf",
    page_starts=(0, 31),
)


def chunk_of(document: Document, start: int, end: int, *, label: str, heading: str = "") -> Chunk:
    """The chunk of a document between two offsets."""
    return Chunk(
        chunk_id=f"id-{label}",
        label=label,
        source=document.source,
        title=document.title,
        heading=heading,
        text=document.text[start:end],
        start=start,
        end=end,
        page=document.page_at(start),
    )


BREAK = ENGINE_DOC.text.index("\n\n")
PAGES = chunk_of(ENGINE_DOC, 0, BREAK, label="d2", heading="Pages")
CACHE = chunk_of(ENGINE_DOC, BREAK + 2, len(ENGINE_DOC.text), label="d10", heading="Cache")
PETS = chunk_of(PETS_DOC, 0, len(PETS_DOC.text), label="d1")


class ListedChunks:
    """Finds the given chunks for every question, best first; retriever and index at once."""

    delimiter = DELIMITER

    def __init__(self, *chunks: Chunk) -> None:
        self.chunks = chunks
        self.asked_k: list[int] = []
        self.texts = {document.source: document.text for document in (ENGINE_DOC, PETS_DOC)}
        self.texts |= {chunk.source: chunk.text for chunk in chunks if chunk.source not in self.texts}

    @property
    def index(self) -> ListedChunks:
        return self

    def retrieve(self, question: str, k: int = 5) -> list[ScoredChunk]:
        self.asked_k.append(k)
        return [ScoredChunk(chunk, 1.0 - n / 10) for n, chunk in enumerate(self.chunks[:k])]

    def retrieve_many(self, questions: Sequence[str], k: int = 5) -> list[list[ScoredChunk]]:
        return [self.retrieve(question, k) for question in questions]

    def document_text(self, source: str) -> str:
        if source not in self.texts:
            raise RetrievalError(f"the index holds no document {source!r}")
        return self.texts[source]


class ScriptedEngine:
    """Says `reply(question)` to every prompt. Tokens are bytes."""

    keeps_pages = False

    def __init__(
        self,
        tokenizer: Tokenizer,
        reply: str | Callable[[str], str] = "",
        *,
        max_seq_len: int = 4096,
        model_dir: Path | None = None,
        chat_template: str = CHAT_TEMPLATE,
    ) -> None:
        self.tokenizer = tokenizer
        self.template = ChatTemplate({"default": chat_template}, variables={"bos_token": "<|bos|>"}, origin="a test")
        self.reply = reply if callable(reply) else lambda _: reply
        self.max_seq_len = max_seq_len
        self.model_dir = model_dir
        self.prompts: list[str] = []
        self.prefixes: list[str] = []
        self.order: Callable[[int], list[int]] = lambda count: list(range(count))
        self.constraints: list[Constraint] = []

    def cached_order(
        self, prefix: Sequence[int], blocks: Sequence[Sequence[int]], *, first: Sequence[Sequence[int]] | None = None
    ) -> list[int]:
        self.prefixes.append(self.tokenizer.decode(prefix, skip_special=False))
        return self.order(len(blocks))

    def encode_chat(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        return encode_chat(self.tokenizer, self.template, messages)

    def generate(self, prompt: Sequence[int], sampling: SamplingParams, *, constraint: Constraint) -> GenerationResult:
        self.prompts.append(self.tokenizer.decode(prompt, skip_special=False))
        self.constraints.append(constraint)
        token_ids = self.continue_with(self.prompts[-1], constraint)
        assert sampling.max_tokens is not None
        kept = token_ids[: sampling.max_tokens]
        return GenerationResult(
            text=self.tokenizer.decode(kept),
            token_ids=tuple(kept),
            finish_reason="stop" if len(kept) == len(token_ids) else "length",
            usage=Usage(prompt_tokens=len(prompt), cached_tokens=7, completion_tokens=len(kept)),
            timings=Timings(queued_s=0.0, first_token_s=0.25, total_s=0.5),
        )

    async def agenerate(
        self, prompt: Sequence[int], sampling: SamplingParams, *, constraint: Constraint
    ) -> GenerationResult:
        return self.generate(prompt, sampling, constraint=constraint)

    def continue_with(self, prompt: str, constraint: Constraint) -> list[int]:
        question = prompt.rpartition("question>>\n")[2].partition("<|end|>")[0]
        return self.tokenizer.encode(self.reply(question))


class RandomEngine(ScriptedEngine):
    """Draws each token among those the constraint allows."""

    def __init__(self, tokenizer: Tokenizer, *, seed: int = 0, max_seq_len: int = 1 << 20) -> None:
        super().__init__(tokenizer, max_seq_len=max_seq_len)
        self.rng = random.Random(seed)

    def continue_with(self, prompt: str, constraint: Constraint) -> list[int]:
        matcher = constraint.compile(self.tokenizer)
        token_ids: list[int] = []
        while not matcher.is_finished:
            allowed = matcher.fill_mask().nonzero()[0].tolist()
            # The end of a string is chosen more often than chance would, or texts would be as long as allowed.
            quote = ord('"')
            token = quote if quote in allowed and self.rng.random() < 0.1 else self.rng.choice(allowed)
            if token in self.tokenizer.eos_token_ids:
                break
            matcher.advance(token)
            token_ids.append(token)
        return token_ids
