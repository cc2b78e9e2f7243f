"""From a question to an answer with verified quotes: the only module that holds an engine and an index at once.

    question -> retrieve -> fit into the model's context -> token blocks -> generate under the quote constraint
             -> read the reply -> verify every quote -> Answer

Chunks are shown whole or not at all. Neighbouring chunks are not merged into one block: a merged block would depend on
which chunks were found together, and the engine could not use it again for the next question. Canonical order puts
neighbours next to each other anyway.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from exl2_rag.errors import (
    AnswerError,
    ChatTemplateError,
    ContextOverflowError,
    EngineClosedError,
    Exl2RagError,
    RetrievalError,
    SettingsError,
)
from exl2_rag.llm.request import GenerationResult, SamplingParams, Timings, Usage
from exl2_rag.llm.tokenizer import TextBlock
from exl2_rag.qa.answer import (
    Answer,
    AnswerTimings,
    Citation,
    Claim,
    RawClaim,
    RejectedClaim,
    Reply,
    ShownChunk,
    parse_reply,
)
from exl2_rag.qa.chunk_order import ChunkPopularity, deepest_cached
from exl2_rag.qa.citations import QuoteMatch, verify_quote
from exl2_rag.qa.kv_sources import document_positions, kv_source
from exl2_rag.qa.prompt import build_messages, chunk_block, order_chunks
from exl2_rag.qa.settings import QASettings
from exl2_rag.retrieval.document import Chunk, ScoredChunk
from exl2_rag.retrieval.sentences import split_sentences

if TYPE_CHECKING:
    from exl2_rag.llm.api import ExL2LLM
    from exl2_rag.llm.constraint import AnswerWithQuotes
    from exl2_rag.llm.request_options import RequestOptions
    from exl2_rag.retrieval.index import DocumentIndex
    from exl2_rag.retrieval.retriever import Retriever

MAX_CALLS_AT_ONCE = 64
"""Calls of one `ask_many` that wait on the engine together; more than an engine usually runs at once."""


class DocumentQA:
    """Answers questions from the documents of an index. Safe to use from many threads.

    Args:
        llm: the engine; any model with a chat template. Small or old ones may quote true sentences that miss the point.
        index: an index, or a retriever over one.
        settings: None: what the model's card says, else the defaults of `QASettings`.
    """

    def __init__(self, llm: ExL2LLM, index: DocumentIndex | Retriever, settings: QASettings | None = None) -> None:
        self.llm = llm
        self.retriever = _retriever_of(index)
        self.settings = QASettings.for_model(llm.model_dir) if settings is None else settings
        self._popularity = ChunkPopularity()

    def ask(self, question: str, k: int | None = None) -> Answer:
        """Answer one question.

        Args:
            question: in any language the model and the embedder know.
            k: chunks to retrieve, instead of `settings.k`.

        Returns:
            An answer whose every claim has a verified quote. If the index finds nothing, a declined one.

        Raises:
            RequestError: the question is empty, or holds the index's secret delimiter.
            ContextOverflowError: not even the best chunk fits into the model's context.
            AnswerError: the reply is not the JSON that was asked for.
        """
        prepared = self._prepare(question, k)
        result = self._generate(prepared) if prepared.shown else None
        return _raise_on_failure(self._finish(prepared, result))

    async def aask(self, question: str, k: int | None = None) -> Answer:
        """As `ask`. When the task is cancelled, so is the request."""
        prepared = await asyncio.to_thread(self._prepare, question, k)
        result = None
        if prepared.shown:
            result = await self.llm.agenerate(prepared.token_ids, self._sampling(), **self._options(prepared))
        return _raise_on_failure(await asyncio.to_thread(self._finish, prepared, result))

    def ask_many(self, questions: Sequence[str], k: int | None = None) -> list[Answer]:
        """Answer several questions at once; the engine computes them as one batch and their shared documents once.

        Returns:
            The answers in the order of the questions. A request that fails, or a reply that cannot be read, gives an
            answer with `failure` set, so that it does not take the others with it.

        Raises:
            RequestError, ContextOverflowError: as `ask`, before anything is generated.
        """
        if isinstance(questions, str):
            raise SettingsError("ask_many takes a list of questions, got one text; use ask, or put it into a list")
        started = time.perf_counter()
        found = self.retriever.retrieve_many(list(questions), self.settings.k if k is None else k)
        retrieval_s = time.perf_counter() - started
        prepared = [
            self._fit(question, chunks, started, retrieval_s) for question, chunks in zip(questions, found, strict=True)
        ]
        asked = [one for one in prepared if one.shown]
        results: dict[int, GenerationResult | Exl2RagError] = {}
        if asked:
            # A request has its own constraint, so each is its own call; the engine joins them to one batch.
            with ThreadPoolExecutor(min(len(asked), MAX_CALLS_AT_ONCE), thread_name_prefix="ask-many") as pool:
                results = dict(zip(map(id, asked), pool.map(self._try_to_generate, asked), strict=True))
        return [self._finish(one, results.get(id(one))) for one in prepared]

    def purge(self, sources: Iterable[str]) -> int:
        """Erase from the engine's KV store what was made from documents of the index; call it when they leave it.

        Args:
            sources: as the index names them; they need not be in it any more.

        Returns:
            How many page images are gone.

        Raises:
            KVStoreError: another process writes to the store, or the disk fails.
        """
        index_id = self.retriever.index.index_id
        return sum(self.llm.purge(kv_source(index_id, source)) for source in sources)

    def _prepare(self, question: str, k: int | None) -> _Prepared:
        started = time.perf_counter()
        found = self.retriever.retrieve(question, self.settings.k if k is None else k)
        return self._fit(question, found, started, time.perf_counter() - started)

    def _fit(self, question: str, found: Sequence[ScoredChunk], started: float, retrieval_s: float) -> _Prepared:
        """The best chunks that fit the context together, whole, and the prompt that shows them."""
        limit = self.llm.max_seq_len - self.settings.max_tokens
        kept = sorted(found, key=lambda scored: -scored.score)
        n_tokens = 0
        while kept:
            shown = order_chunks(scored.chunk for scored in kept)
            token_ids = self._encode(question, shown)
            n_tokens = len(token_ids)
            if n_tokens <= limit:
                shown, token_ids = self._in_order(question, shown, kept, token_ids)
                self._popularity.note(shown)
                return _Prepared(question, tuple(found), tuple(shown), token_ids, started, retrieval_s)
            kept.pop()
        if not found:
            self._encode(question, [])  # for the errors of the question itself
            return _Prepared(question, (), (), [], started, retrieval_s)
        raise ContextOverflowError(
            f"the best chunk and the question need {n_tokens} tokens beside {self.settings.max_tokens} for the reply, "
            f"but the model takes {self.llm.max_seq_len}; ask for a shorter reply (max_tokens), index with smaller "
            "chunks, or use a model with a longer context",
            prompt_tokens=n_tokens,
            limit_tokens=limit,
        )

    def _in_order(
        self, question: str, shown: list[Chunk], kept: Sequence[ScoredChunk], token_ids: list[int]
    ) -> tuple[list[Chunk], list[int]]:
        """The chunks as `settings.order` has them, and their prompt; `token_ids` shows them in the order of labels."""
        if self.settings.order == "label" or len(shown) < 2:
            return shown, token_ids
        if self.settings.order == "relevance":
            best = {scored.chunk.label: -scored.score for scored in reversed(kept)}
            ordered = sorted(shown, key=lambda chunk: best[chunk.label])
        else:
            preferred = self._popularity.sort(shown)
            if preferred != shown:
                token_ids = self._encode(question, preferred)
            ordered = deepest_cached(self.llm, preferred, self.retriever.index.delimiter, token_ids)
            if ordered == preferred:
                return ordered, token_ids
        return ordered, self._encode(question, ordered)

    def _encode(self, question: str, chunks: Sequence[Chunk]) -> list[int]:
        messages = build_messages(question, chunks, self.retriever.index.delimiter, keep_order=True)
        try:
            return self.llm.encode_chat(messages)
        except ChatTemplateError:
            try:
                return self.llm.encode_chat(without_system_role(messages))
            except ChatTemplateError:
                pass
            raise  # it was not the system role

    def _constraint(self, chunks: Sequence[Chunk]) -> AnswerWithQuotes:
        from exl2_rag.llm.constraint import AnswerWithQuotes

        passages: dict[str, str | list[str]] = {}
        for chunk in chunks:
            if not chunk.text.strip():
                continue  # nothing in it can be quoted
            passages[chunk.label] = sentences_of(chunk) if self.settings.quote_unit == "sentence" else chunk.text
        return AnswerWithQuotes(
            passages,
            max_claims=self.settings.max_claims,
            min_words=self.settings.min_words,
            max_text_chars=self.settings.max_text_chars if self.settings.claim_text == "model" else 1,
        )

    def _options(self, prepared: _Prepared) -> RequestOptions:
        options: RequestOptions = {"constraint": self._constraint(prepared.shown)}
        if self.llm.keeps_pages:  # where each document begins, for the day when it is purged
            index = self.retriever.index
            sources = [kv_source(index.index_id, chunk.source) for chunk in prepared.shown]
            blocks = [self.llm.tokenizer.encode_blocks([chunk_block(one, index.delimiter)]) for one in prepared.shown]
            options["sources"] = document_positions(prepared.token_ids, zip(sources, blocks, strict=True))
        return options

    def _sampling(self) -> SamplingParams:
        return SamplingParams(max_tokens=self.settings.max_tokens, temperature=self.settings.temperature)

    def _generate(self, prepared: _Prepared) -> GenerationResult:
        return self.llm.generate(prepared.token_ids, self._sampling(), **self._options(prepared))

    def _try_to_generate(self, prepared: _Prepared) -> GenerationResult | Exl2RagError:
        try:
            return self._generate(prepared)
        except EngineClosedError:
            raise  # not this question's own trouble
        except Exl2RagError as error:
            return error

    def _finish(self, prepared: _Prepared, outcome: GenerationResult | Exl2RagError | None) -> Answer:
        """Read the reply and verify it. `outcome` is None if there was nothing to show to the model."""
        result = outcome if isinstance(outcome, GenerationResult) else None
        reply, failure = Reply(answerable=False, claims=()), ""
        if result is not None:
            try:
                reply = parse_reply(result.text, cut_off=result.finish_reason == "length")
            except AnswerError as error:
                failure = str(error)
        elif outcome is not None:
            failure = str(outcome)
        claims, rejected = verify_claims(reply.claims, prepared.shown)
        claims, outdated = self._check_offsets(claims)
        if self.settings.claim_text == "quote":
            claims = tuple(replace(claim, text=claim.citation.quote) for claim in claims)
        usage = result.usage if result else Usage(0, 0, 0)
        timings = result.timings if result else Timings(0.0, 0.0, 0.0)
        shown_labels = {chunk.label for chunk in prepared.shown}
        return Answer(
            question=prepared.question,
            answerable=bool(claims),
            text=" ".join(dict.fromkeys(claim.text for claim in claims)),
            claims=claims,
            rejected=rejected + outdated,
            truncated=reply.truncated,
            failure=failure,
            retrieved=tuple(_shown_chunk(scored, shown_labels) for scored in prepared.found),
            usage=usage,
            timings=AnswerTimings(
                retrieval_s=prepared.retrieval_s,
                first_token_s=timings.first_token_s,
                generation_s=timings.total_s,
                total_s=time.perf_counter() - prepared.started,
            ),
            raw=result.text if result else "",
        )

    def _check_offsets(self, claims: Sequence[Claim]) -> tuple[tuple[Claim, ...], tuple[RejectedClaim, ...]]:
        """Split off claims whose citation no longer holds because the index was changed since the chunk was retrieved.

        Chunks come from outside, too (a framework's nodes may carry altered text), so this asks the index itself.
        """
        held: list[Claim] = []
        outdated: list[RejectedClaim] = []
        for claim in claims:
            citation = claim.citation
            try:
                text = self.retriever.index.document_text(citation.source)
            except RetrievalError:
                text = ""
            if text[citation.start : citation.end] == citation.quote:
                held.append(claim)
            else:
                reason = f"{citation.source} in the index no longer has the quote where it was retrieved"
                outdated.append(RejectedClaim(RawClaim(citation.label, citation.quote, claim.text), reason))
        return tuple(held), tuple(outdated)


@dataclass(frozen=True, slots=True)
class _Prepared:
    """A question on its way: what was found, what of it is shown, and the prompt."""

    question: str
    found: tuple[ScoredChunk, ...]
    shown: tuple[Chunk, ...]
    token_ids: list[int]
    started: float
    retrieval_s: float


def sentences_of(chunk: Chunk) -> list[str]:
    """The sentences of a chunk, verbatim."""
    return [chunk.text[start:end] for start, end in split_sentences(chunk.text)]


def verify_claims(
    claims: Sequence[RawClaim], chunks: Sequence[Chunk]
) -> tuple[tuple[Claim, ...], tuple[RejectedClaim, ...]]:
    """Split a model's claims into those whose quotes stand in the shown chunks, and the rest.

    A quote that stands in another shown chunk than the one named is cited from where it stands.
    """
    held: list[Claim] = []
    rejected: list[RejectedClaim] = []
    by_label = {chunk.label: chunk for chunk in chunks}
    for claim in claims:
        named = by_label.get(claim.source)
        others = [chunk for chunk in chunks if chunk is not named]
        for chunk in [named, *others] if named else others:
            found = verify_quote(claim.quote, chunk.text)
            if found and (chunk is named or found.match != "near"):
                held.append(Claim(claim.text, _citation(found, chunk)))
                break
        else:
            shown = ", ".join(by_label) or "none"
            reason = "no shown document holds the quote" if named else f"there is no such source; shown were: {shown}"
            rejected.append(RejectedClaim(claim, reason))
    return tuple(held), tuple(rejected)


def without_system_role(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same messages for a chat template that has no system role: its text becomes the user's first block."""
    system, user = messages
    return [{"role": "user", "content": [TextBlock(system["content"] + "\n\n", trusted=False), *user["content"]]}]


def _citation(found: QuoteMatch, chunk: Chunk) -> Citation:
    return Citation(
        source=chunk.source,
        title=chunk.title,
        heading=chunk.heading,
        page=chunk.page,
        start=chunk.start + found.start,
        end=chunk.start + found.end,
        quote=found.quote,
        chunk_id=chunk.chunk_id,
        label=chunk.label,
        match=found.match,
    )


def _shown_chunk(scored: ScoredChunk, shown_labels: set[str]) -> ShownChunk:
    chunk = scored.chunk
    return ShownChunk(chunk.chunk_id, chunk.label, chunk.source, scored.score, chunk.label in shown_labels)


def _retriever_of(index: DocumentIndex | Retriever) -> Retriever:
    from exl2_rag.retrieval.index import DocumentIndex
    from exl2_rag.retrieval.retriever import Retriever

    return Retriever(index) if isinstance(index, DocumentIndex) else index


def _raise_on_failure(answer: Answer) -> Answer:
    if answer.failure:
        raise AnswerError(answer.failure)
    return answer
