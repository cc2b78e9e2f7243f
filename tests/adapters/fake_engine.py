"""A stand-in for `ExL2LLM` without a model: it answers with scripted pieces and counts what it is asked.

For what a real engine shows only by chance: which call arrived, how many pieces, what is running while a stream is
half read. Everything else is tested against the real engine.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from exl2_rag.adapters import langchain_runnable
from exl2_rag.errors import ChatTemplateError, ContextOverflowError
from exl2_rag.llm.request import FinishReason, GenerationResult, SamplingParams, StreamPiece, Timings, Usage

TIMINGS = Timings(queued_s=0.0, first_token_s=0.1, total_s=0.2)


@dataclass
class Asked:
    """One call of the engine."""

    method: str
    prompt: Any
    sampling: SamplingParams
    constraint: Any = None


class FakeTokenizer:
    """A token a character."""

    def encode(self, text: str, *, special_tokens: bool = False, add_bos: bool = False) -> list[int]:
        return [ord(letter) for letter in text]


@dataclass
class FakeEngine:
    """Answers every prompt with `pieces`, one token each."""

    pieces: Sequence[str] = ("Hello", ", ", "world")
    finish_reason: FinishReason = "stop"
    max_seq_len: int = 4000
    model_name: str = "fake-model"
    cached_tokens: int = 3
    delay_s: float = 0.0
    has_chat_template: bool = True
    asked: list[Asked] = field(default_factory=list)
    active_requests: int = 0
    closed: bool = False
    tokenizer: FakeTokenizer = field(default_factory=FakeTokenizer)

    # What every request does.

    def _admit(self, method: str, prompt: Any, sampling: SamplingParams | None, constraint: Any) -> int:
        n_tokens = len(self.encode_chat(prompt)) if "chat" in method else len(prompt)
        if n_tokens > self.max_seq_len:
            raise ContextOverflowError(
                f"the prompt has {n_tokens} tokens, the limit is {self.max_seq_len}",
                prompt_tokens=n_tokens,
                limit_tokens=self.max_seq_len,
            )
        self.asked.append(Asked(method, prompt, sampling or SamplingParams(), constraint))
        return n_tokens

    def _result(self, n_tokens: int) -> GenerationResult:
        ids = tuple(range(len(self.pieces)))
        return GenerationResult("".join(self.pieces), ids, self.finish_reason, self._usage(n_tokens), TIMINGS)

    def _usage(self, n_tokens: int) -> Usage:
        cached = min(self.cached_tokens, n_tokens)
        return Usage(prompt_tokens=n_tokens, cached_tokens=cached, completion_tokens=len(self.pieces))

    def _stream(self, n_tokens: int) -> Iterator[StreamPiece]:
        for number, text in enumerate(self.pieces):
            yield StreamPiece(text, (number,))
        yield StreamPiece("", (), self.finish_reason, self._usage(n_tokens), TIMINGS)

    # The interface of ExL2LLM.

    def encode_chat(self, messages: Any) -> list[int]:
        if not self.has_chat_template:
            raise ChatTemplateError("this model has no chat template")
        return [ord(letter) for m in messages for letter in f"<{m['role']}>{m['content']}"]

    def generate(self, prompt: Any, sampling: SamplingParams | None = None, *, constraint: Any = None) -> Any:
        if isinstance(prompt, list):
            self.asked.append(Asked("generate", prompt, sampling or SamplingParams(), constraint))
            return [self._result(len(one)) for one in prompt]
        return self._result(self._admit("generate", prompt, sampling, constraint))

    def chat(
        self, messages: Any, sampling: SamplingParams | None = None, *, tools: Any = None, constraint: Any = None
    ) -> GenerationResult:
        return self._result(self._admit("chat", messages, sampling, constraint))

    def stream(
        self, prompt: Any, sampling: SamplingParams | None = None, *, constraint: Any = None
    ) -> Iterator[StreamPiece]:
        return self._running(self._admit("stream", prompt, sampling, constraint))

    def stream_chat(
        self, messages: Any, sampling: SamplingParams | None = None, *, tools: Any = None, constraint: Any = None
    ) -> Iterator[StreamPiece]:
        return self._running(self._admit("stream_chat", messages, sampling, constraint))

    def _running(self, n_tokens: int) -> Iterator[StreamPiece]:
        self.active_requests += 1
        try:
            yield from self._stream(n_tokens)
        finally:
            self.active_requests -= 1

    async def agenerate(self, prompt: Any, sampling: SamplingParams | None = None, *, constraint: Any = None) -> Any:
        if isinstance(prompt, list):
            self.asked.append(Asked("agenerate", prompt, sampling or SamplingParams(), constraint))
            return await asyncio.gather(*(self._arun(len(one)) for one in prompt))
        return await self._arun(self._admit("agenerate", prompt, sampling, constraint))

    async def achat(
        self, messages: Any, sampling: SamplingParams | None = None, *, tools: Any = None, constraint: Any = None
    ) -> GenerationResult:
        return await self._arun(self._admit("achat", messages, sampling, constraint))

    async def _arun(self, n_tokens: int) -> GenerationResult:
        self.active_requests += 1
        try:
            await asyncio.sleep(self.delay_s)
            return self._result(n_tokens)
        finally:
            self.active_requests -= 1

    def astream(
        self, prompt: Any, sampling: SamplingParams | None = None, *, constraint: Any = None
    ) -> AsyncIterator[StreamPiece]:
        return self._arunning(self._admit("astream", prompt, sampling, constraint))

    def astream_chat(
        self, messages: Any, sampling: SamplingParams | None = None, *, tools: Any = None, constraint: Any = None
    ) -> AsyncIterator[StreamPiece]:
        return self._arunning(self._admit("astream_chat", messages, sampling, constraint))

    async def _arunning(self, n_tokens: int) -> AsyncIterator[StreamPiece]:
        self.active_requests += 1
        try:
            for piece in self._stream(n_tokens):
                await asyncio.sleep(self.delay_s)
                yield piece
        finally:
            self.active_requests -= 1

    def __call__(self, model_input: Any) -> Any:
        return langchain_runnable(self, model_input)  # type: ignore[arg-type]

    def close(self) -> None:
        self.closed = True
