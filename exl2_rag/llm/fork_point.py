"""A prompt that is computed once and continued many times: one document, many questions or schemas."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Generator
from collections.abc import Sequence as Seq
from types import TracebackType
from typing import TYPE_CHECKING, Self, Unpack, cast, overload

from exl2_rag.errors import RequestError
from exl2_rag.llm.pin import Pin
from exl2_rag.llm.prompts import Prompt, Prompts, as_batch, as_token_ids
from exl2_rag.llm.request import GenerationRequest, GenerationResult, SamplingParams, StreamPiece
from exl2_rag.llm.request_options import RequestFields, RequestOptions

if TYPE_CHECKING:
    from exl2_rag.llm.api import ExL2LLM
    from exl2_rag.llm.constraint import Constraint
    from exl2_rag.llm.lora.choice import Lora

Constraints = Seq["Constraint | None"]


class ForkPoint:
    """A computed prompt whose pages stay in the cache until `release`. Also a context manager.

        with llm.fork_point(document) as point:
            answers = point.generate(["\\nQ: Who wrote this?\\nA:", "\\nQ: When?\\nA:"], sampling)
            invoice = point.generate("\\nAs JSON: ", constraint=JsonSchema(schema))
            with point.fork("\\nThe second chapter says: ") as deeper:  # a fork point further on
                ...

    Continuations given together run as one batch and share the pages. Whatever becomes of the pages (the cache was too
    small, the engine had to start afresh), a continuation gives what it gives after the whole prompt; it then takes
    longer, that is all. After `release` or for a released parent that still holds.

    A continuation is tokenised by itself: text goes on without a space or BOS put before it, and a token never spans
    both sides.

    Attributes:
        token_ids: the prompt.
    """

    def __init__(
        self,
        llm: ExL2LLM,
        token_ids: tuple[int, ...],
        pin: Pin | None = None,
        *,
        cache_salt: str | None = None,
        lora: Lora | None = None,
    ) -> None:
        self.token_ids = token_ids
        self._llm = llm
        self._pin = pin
        self._cache_salt = cache_salt
        self._lora = lora

    @property
    def n_tokens(self) -> int:
        """Length of the prompt."""
        return len(self.token_ids)

    @overload
    def generate(
        self,
        continuation: Prompt,
        sampling: SamplingParams | None = None,
        *,
        constraints: Constraints | None = None,
        **options: Unpack[RequestOptions],
    ) -> GenerationResult: ...

    @overload
    def generate(
        self,
        continuation: Prompts,
        sampling: SamplingParams | None = None,
        *,
        constraints: Constraints | None = None,
        **options: Unpack[RequestOptions],
    ) -> list[GenerationResult]: ...

    def generate(
        self,
        continuation: Prompt | Prompts,
        sampling: SamplingParams | None = None,
        *,
        constraints: Constraints | None = None,
        **options: Unpack[RequestOptions],
    ) -> GenerationResult | list[GenerationResult]:
        """Go on from here with a continuation of the prompt, or with several as one batch.

        Args:
            continuation: a text, token ids, or a list of such. An empty text goes on from the prompt itself.
            constraints: one for each continuation, where they differ; in place of `constraint`.

        Raises:
            RequestError, EngineError: as for `ExL2LLM.generate`.
        """
        requests, is_batch = self._requests(continuation, sampling, constraints, options)
        results = self._llm.generate_requests(requests)
        return results if is_batch else results[0]

    async def agenerate(
        self,
        continuation: Prompt | Prompts,
        sampling: SamplingParams | None = None,
        *,
        constraints: Constraints | None = None,
        **options: Unpack[RequestOptions],
    ) -> GenerationResult | list[GenerationResult]:
        """`generate` for a coroutine. Cancelling the task cancels the requests."""
        requests, is_batch = self._requests(continuation, sampling, constraints, options)
        results = await self._llm.agenerate_requests(requests)
        return results if is_batch else results[0]

    def stream(
        self, continuation: Prompt, sampling: SamplingParams | None = None, **options: Unpack[RequestOptions]
    ) -> Generator[StreamPiece, None, None]:
        """`generate` piece by piece, for one continuation. Closing the generator cancels the request."""
        return self._llm.stream(self._prompt(continuation), sampling, **self._with(options))

    def astream(
        self, continuation: Prompt, sampling: SamplingParams | None = None, **options: Unpack[RequestOptions]
    ) -> AsyncGenerator[StreamPiece, None]:
        """`stream` for a coroutine."""
        return self._llm.astream(self._prompt(continuation), sampling, **self._with(options))

    def fork(self, continuation: Prompt) -> ForkPoint:
        """A fork point further on; only the continuation is computed, and it outlives this one."""
        return self._llm.fork_point(self._prompt(continuation), cache_salt=self._cache_salt, lora=self._lora)

    def release(self) -> None:
        """Let the pages go; they stay cached as long as there is room. Harmless when done before."""
        if self._pin is not None:
            self._pin.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def _requests(
        self,
        continuation: Prompt | Prompts,
        sampling: SamplingParams | None,
        constraints: Constraints | None,
        options: RequestOptions,
    ) -> tuple[list[GenerationRequest], bool]:
        parts, is_batch = ([continuation], False) if continuation == "" else as_batch(continuation)
        fields = self._with(options)
        if constraints is not None:
            if options.get("constraint") is not None:
                raise RequestError("give constraint (for all continuations) or constraints (one for each), not both")
            if len(constraints) != len(parts):
                raise RequestError(
                    f"expected one constraint for each of the {len(parts)} continuations, got {len(constraints)}"
                )
        requests: list[GenerationRequest] = []
        for place, part in enumerate(parts):
            own = fields if constraints is None else fields | RequestFields(constraint=constraints[place])
            requests.append(GenerationRequest(tuple(self._prompt(part)), sampling or SamplingParams(), **own))
        return requests, is_batch

    def _prompt(self, continuation: Prompt) -> list[int]:
        if isinstance(continuation, str):
            return [*self.token_ids, *self._llm.tokenizer.encode_continuation(continuation)]
        return [*self.token_ids, *as_token_ids(continuation)]

    def _with(self, options: RequestOptions) -> RequestFields:
        """The options of a continuation; what names the cache's tree is that of the prompt."""
        for name in ("cache_salt", "lora"):
            if name in options:
                raise RequestError(f"{name} is a matter of the whole prompt; give it to fork_point")
        if options.get("overflow", "error") != "error":
            raise RequestError("overflow would shorten the shared prompt, which is computed already; leave it out")
        fields = cast(RequestFields, {name: value for name, value in options.items() if name != "overflow"})
        return fields | RequestFields(cache_salt=self._cache_salt, lora=self._lora)
