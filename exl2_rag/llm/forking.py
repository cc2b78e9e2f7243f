"""One prompt, many continuations, and requests of different kinds in one batch: a part of `ExL2LLM`."""

from __future__ import annotations

import asyncio
import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Iterable
from collections.abc import Sequence as Seq
from typing import TYPE_CHECKING, Unpack, cast

from exl2_rag.llm.engine_thread import EngineThread
from exl2_rag.llm.fork_point import Constraints, ForkPoint
from exl2_rag.llm.prompts import Prompt, Prompts
from exl2_rag.llm.request import GenerationRequest, GenerationResult, SamplingParams
from exl2_rag.llm.request_options import RequestOptions
from exl2_rag.llm.results import joined_result
from exl2_rag.llm.sequence import Sequence

if TYPE_CHECKING:
    from exl2_rag.llm.api import ExL2LLM
    from exl2_rag.llm.lora.choice import Lora


class Forking(ABC):
    """The part of `ExL2LLM` that continues one prompt many times."""

    _thread: EngineThread

    @abstractmethod
    def _encode(self, prompt: Prompt) -> tuple[int, ...]:
        """Token ids of a prompt."""

    @abstractmethod
    def _sequence(
        self, token_ids: tuple[int, ...], sampling: SamplingParams | None, **options: Unpack[RequestOptions]
    ) -> Sequence:
        """A prepared request."""

    @abstractmethod
    async def _gather(self, sequences: Iterable[Sequence]) -> list[GenerationResult]:
        """Run prepared sequences to their ends."""

    def generate_requests(self, requests: Seq[GenerationRequest]) -> list[GenerationResult]:
        """Run requests as one batch, each with a prompt, sampling, constraint and options of its own.

        Raises:
            RequestError, EngineError: as for `generate`.
        """
        return [joined_result(pieces) for pieces in self._thread.run_together(map(self._prepared, requests))]

    async def agenerate_requests(self, requests: Seq[GenerationRequest]) -> list[GenerationResult]:
        """`generate_requests` for a coroutine. Cancelling the task cancels the requests."""
        return await self._gather(await asyncio.to_thread(lambda: list(map(self._prepared, requests))))

    def fork_point(self, prompt: Prompt, *, cache_salt: str | None = None, lora: Lora | None = None) -> ForkPoint:
        """Compute a prompt, to continue it many times.

        Args:
            cache_salt, lora: as in `RequestOptions`; they hold for all that goes on from here.

        Raises:
            PinLimitError, RequestError, EngineError: as for `pin`.
        """
        llm, token_ids = cast("ExL2LLM", self), self._encode(prompt)
        pin = llm.pin(token_ids, cache_salt=cache_salt, lora=lora)
        return ForkPoint(llm, token_ids, pin, cache_salt=cache_salt, lora=lora)

    def generate_many(
        self,
        prefix: Prompt,
        suffixes: Prompts,
        sampling: SamplingParams | None = None,
        *,
        constraints: Constraints | None = None,
        **options: Unpack[RequestOptions],
    ) -> list[GenerationResult]:
        """Ask many things about one text: compute `prefix` once, and continue it with each of `suffixes` as one batch.

            answers = llm.generate_many(document, ["Q: Who? A:", "Q: When? A:"], sampling)
            fields = llm.generate_many(document, ["JSON: ", "JSON: "], constraints=[JsonSchema(one), JsonSchema(two)])

        Args:
            constraints: one for each suffix, where they differ.

        Raises:
            RequestError, EngineError: as for `generate`; one that fails ends them all.
        """
        # No pin is needed: one of them computes the prefix, and the others wait for it.
        salt, lora = options.pop("cache_salt", None), options.pop("lora", None)
        point = ForkPoint(cast("ExL2LLM", self), self._encode(prefix), cache_salt=salt, lora=lora)
        return point.generate(suffixes, sampling, constraints=constraints, **options)

    def _prepared(self, request: GenerationRequest) -> Sequence:
        options = {one.name: getattr(request, one.name) for one in dataclasses.fields(request)}
        token_ids, sampling = options.pop("token_ids"), options.pop("sampling")
        del options["dropped_tokens"]  # a result of shortening, which nobody asks for here
        return self._sequence(token_ids, sampling, **cast(RequestOptions, options))
