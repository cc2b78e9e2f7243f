"""`ExL2LLM`: the only place where text meets tokens. Everything below it speaks token ids."""

from __future__ import annotations

import asyncio
import dataclasses
import weakref
from collections.abc import AsyncGenerator, Generator, Iterable, Mapping
from collections.abc import Sequence as Seq
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, Unpack, cast, overload

from exl2_rag.errors import ModelNotFoundError
from exl2_rag.llm.cache_control import CacheControl
from exl2_rag.llm.chat_template import ChatTemplate, Message, encode_chat
from exl2_rag.llm.config import ModelConfig
from exl2_rag.llm.engine_config import (
    DEFAULT_MAX_INTER_TOKEN_GAP,
    DEFAULT_MAX_OVERTAKES,
    EngineConfig,
    EngineOptions,
)
from exl2_rag.llm.engine_loader import load_engine
from exl2_rag.llm.engine_thread import EngineThread
from exl2_rag.llm.forking import Forking
from exl2_rag.llm.health import DEFAULT_STUCK_AFTER_S, EngineHealth
from exl2_rag.llm.kv_store.open_tiers import TierOptions
from exl2_rag.llm.lora.loading import LoraLoading
from exl2_rag.llm.overflow import fit_chat, fit_prompt, reserved_tokens
from exl2_rag.llm.prompts import Prompt, Prompts, as_batch, as_token_ids
from exl2_rag.llm.request import GenerationRequest, GenerationResult, SamplingParams, StreamPiece, Usage
from exl2_rag.llm.request_options import RequestFields, RequestOptions
from exl2_rag.llm.results import joined_result
from exl2_rag.llm.scoring import Scoring
from exl2_rag.llm.sequence import Sequence
from exl2_rag.llm.tokenizer import Tokenizer

if TYPE_CHECKING:
    from exl2_rag.adapters.langchain import ChatExL2
    from exl2_rag.adapters.llama_index import ExL2 as LlamaIndexExL2

Tools = Seq[dict[str, Any]]


class ExL2LLM(CacheControl, LoraLoading, Scoring, Forking):
    """A language model and the engine that runs it. Safe to share between threads and event loops.

    A prompt is a text or a list of token ids. Text is ordinary text: what looks like a special token in it is not read
    as one (encode it with `llm.tokenizer.encode(text, special_tokens=True)` to have that); BOS is put in front where
    the tokenizer says so. Chat messages go through the model's chat template.

    Args:
        model_dir: a directory with an EXL2, GPTQ 4-bit or plain safetensors model.
        device: "auto" (the first GPU that kernels can run on, else the CPU), "cpu", "cuda" or such as "cuda:1".
        max_seq_len: tokens of prompt and continuation together; default: the model's own.
        cache_tokens: tokens of KV cache for all requests together; default: what fits a share of the free memory.
        cache_dtype: "auto", "fp16", "bf16" or "fp32"; on a GPU also "q8", "q6" or "q4".
        precision: of matmuls by quantised weights: "exact" (float32) or "fast" (activations as 15-bit whole numbers, 32
            rows to a scale; on a GPU float16). "auto" is "fast" where the kernels are compiled, else "exact".
        max_batch_size: sequences computed together; default: 32, or what the cache allows.
        num_threads: threads of the CPU kernels, in the whole process; default: the processors it may use.
        page_size: tokens of a cache page; 16, 32, 64, 128 or 256.
        max_batched_tokens: new tokens computed in one step; more is faster for long prompts, and coarser to cancel.
        deterministic: refuse to run where a request's logits could depend, in their last bits, on what else is in the
            batch, on slices, on cache hits or on preemption. With the compiled CPU kernels they never do, and it is
            free of charge; on a GPU it keeps to kernels of which that is true, which take longer for long prompts.
        max_waiting: requests that may wait for a place in the batch; one more fails with QueueFullError. Default: any
            number.
        max_overtakes: requests of higher priority that may be started ahead of one that has waited longer; then that
            one is raised to the highest priority. 0: any number, so that low priorities can wait for ever.
        max_inter_token_gap: the longest time from one token of a text to its next while prompts are computed, as a
            multiple of the usual one; prompts are cut so that it holds. Larger: longer gaps, quicker prompts. None: no
            promise, prompts are cut by a fixed number of tokens.
        kv_store: a directory in which pages of the KV cache survive a restart; see docs/kv-store.md. The first start
            with it reads all weights, to know them again.
        kv_store_bytes: what it may take on the disk; default: 8 GiB.
        kv_ram_bytes: host memory for pages that the cache has no more room for; default: none. On the CPU a larger
            `cache_tokens` does the same without copying.
        draft_model: guesses tokens ahead, which makes decoding faster and changes no text: "prompt-lookup" takes them
            from where the last words occurred before, which pays where answers copy from the prompt; a directory: a
            smaller model with the same tokenizer guesses them.

    Raises:
        ModelError: there is no usable model; the message names the directory.
        KVStoreError: `kv_store` cannot be written to.
        SettingsError: an option out of range, or one that this version does not have.
    """

    def __init__(
        self,
        model_dir: str | Path,
        *,
        device: str = "auto",
        max_seq_len: int | None = None,
        cache_tokens: int | None = None,
        cache_dtype: str = "auto",
        precision: str = "auto",
        max_batch_size: int | None = None,
        num_threads: int | None = None,
        page_size: int | None = None,
        max_batched_tokens: int | None = None,
        deterministic: bool = False,
        max_waiting: int | None = None,
        max_overtakes: int = DEFAULT_MAX_OVERTAKES,
        max_inter_token_gap: float | None = DEFAULT_MAX_INTER_TOKEN_GAP,
        draft_model: str | Path | None = None,
        kv_store: str | Path | None = None,
        kv_store_bytes: int | None = None,
        kv_ram_bytes: int | None = None,
    ) -> None:
        store_dir = None if kv_store is None else Path(kv_store).expanduser()
        tiers = TierOptions(store_dir, kv_store_bytes, kv_ram_bytes)
        options = EngineOptions(
            device=device,
            max_seq_len=max_seq_len,
            cache_tokens=cache_tokens,
            cache_dtype=cache_dtype,
            precision=precision,
            max_batch_size=max_batch_size,
            num_threads=num_threads,
            page_size=page_size,
            max_batched_tokens=max_batched_tokens,
            deterministic=deterministic,
            max_waiting=max_waiting,
            max_overtakes=max_overtakes,
            max_inter_token_gap=max_inter_token_gap,
            draft_model=draft_model,
        )
        self.model_dir = Path(model_dir).expanduser()
        if not self.model_dir.is_dir():
            raise ModelNotFoundError(
                f"expected a model directory, found none at {self.model_dir}; download the model first, and give the "
                "directory that holds its config.json"
            )
        loaded = load_engine(self.model_dir, options, tiers)
        self.tokenizer: Tokenizer = loaded.tokenizer
        self.config: ModelConfig = loaded.config
        self._template = ChatTemplate.from_dir(self.model_dir)
        self._engine = loaded.engine
        self._loras = loaded.loras
        self._thread = EngineThread(loaded.engine)
        self._finalizer = weakref.finalize(self, self._thread.close)

    # --- about the model -------------------------------------------------------------------------------------------

    @property
    def model_name(self) -> str:
        """The name of the model's directory."""
        return self.model_dir.resolve().name

    @property
    def engine_config(self) -> EngineConfig:
        """The options with all defaults filled in."""
        return self._engine.config

    @property
    def max_seq_len(self) -> int:
        """Tokens of prompt and continuation together, at most."""
        return self._engine.config.sequence_limit

    @property
    def active_requests(self) -> int:
        """Requests that run now. One that has finished, failed or been cancelled holds nothing."""
        return self._thread.active_requests

    def health(self, stuck_after_s: float = DEFAULT_STUCK_AFTER_S) -> EngineHealth:
        """How the engine is: idle, busy, stuck, closed or dead; queue lengths, step times and tokens a second.

        Answers at once from any thread, also while a step never ends.

        Args:
            stuck_after_s: the engine counts as stuck when it has work and no step has ended for so long. A step that
                computes a long prompt on a slow machine may take seconds.
        """
        return self._thread.health(stuck_after_s)

    # --- text ------------------------------------------------------------------------------------------------------

    @overload
    def generate(
        self, prompt: Prompt, sampling: SamplingParams | None = None, **options: Unpack[RequestOptions]
    ) -> GenerationResult: ...

    @overload
    def generate(
        self,
        prompt: Prompts,
        sampling: SamplingParams | None = None,
        **options: Unpack[RequestOptions],
    ) -> list[GenerationResult]: ...

    def generate(
        self,
        prompt: Prompt | Prompts,
        sampling: SamplingParams | None = None,
        **options: Unpack[RequestOptions],
    ) -> GenerationResult | list[GenerationResult]:
        """Continue a prompt, or several as one batch in which shared prefixes are computed once.

        Args:
            options: see `RequestOptions`; one that is not there is a TypeError.

        Raises:
            RequestError: a prompt or parameter that can never run (ContextOverflowError, ConstraintError).
            EngineError: the engine could not finish it.
        """
        prompts, is_batch = as_batch(prompt)
        sequences = [self._sequence(self._encode(one), sampling, **options) for one in prompts]
        results = [joined_result(pieces) for pieces in self._thread.run_together(sequences)]
        return results if is_batch else results[0]

    def stream(
        self, prompt: Prompt, sampling: SamplingParams | None = None, **options: Unpack[RequestOptions]
    ) -> Generator[StreamPiece, None, None]:
        """Continue a prompt piece by piece. Closing the generator cancels the request.

        Raises:
            RequestError: at once, before the first piece is asked for.
            EngineError: from the generator.
        """
        return self._stream(self._sequence(self._encode(prompt), sampling, **options))

    @overload
    async def agenerate(
        self, prompt: Prompt, sampling: SamplingParams | None = None, **options: Unpack[RequestOptions]
    ) -> GenerationResult: ...

    @overload
    async def agenerate(
        self,
        prompt: Prompts,
        sampling: SamplingParams | None = None,
        **options: Unpack[RequestOptions],
    ) -> list[GenerationResult]: ...

    async def agenerate(
        self,
        prompt: Prompt | Prompts,
        sampling: SamplingParams | None = None,
        **options: Unpack[RequestOptions],
    ) -> GenerationResult | list[GenerationResult]:
        """`generate` for a coroutine. Cancelling the task cancels the requests."""
        prompts, is_batch = as_batch(prompt)
        # In a thread: encoding and compiling take long enough to hold up the loop.
        sequences = await asyncio.to_thread(
            lambda: [self._sequence(self._encode(one), sampling, **options) for one in prompts]
        )
        results = await self._gather(sequences)
        return results if is_batch else results[0]

    async def astream(
        self, prompt: Prompt, sampling: SamplingParams | None = None, **options: Unpack[RequestOptions]
    ) -> AsyncGenerator[StreamPiece, None]:
        """`stream` for a coroutine: `async for piece in llm.astream(prompt)`. Errors come from the generator."""
        sequence = await asyncio.to_thread(lambda: self._sequence(self._encode(prompt), sampling, **options))
        pieces = self._thread.astream(sequence)
        try:
            async for piece in pieces:
                yield piece
        finally:
            await pieces.aclose()

    # --- chat ------------------------------------------------------------------------------------------------------

    def chat(
        self,
        messages: Seq[Message],
        sampling: SamplingParams | None = None,
        *,
        tools: Tools | None = None,
        **options: Unpack[RequestOptions],
    ) -> GenerationResult:
        """The assistant's next message.

        Args:
            messages: mappings with "role" and "content"; a content may also be a sequence of `TextBlock`.
            tools: function descriptions, handed to the chat template.

        Raises:
            ChatTemplateError: the model has no chat template, or it refuses the messages.
            RequestError, EngineError: as for `generate`.
        """
        prompt, options = self._fit_chat(messages, sampling, tools, options)
        return self.generate(prompt, sampling, **options)

    def stream_chat(
        self,
        messages: Seq[Message],
        sampling: SamplingParams | None = None,
        *,
        tools: Tools | None = None,
        **options: Unpack[RequestOptions],
    ) -> Generator[StreamPiece, None, None]:
        """`chat` piece by piece. Closing the generator cancels the request."""
        prompt, options = self._fit_chat(messages, sampling, tools, options)
        return self.stream(prompt, sampling, **options)

    async def achat(
        self,
        messages: Seq[Message],
        sampling: SamplingParams | None = None,
        *,
        tools: Tools | None = None,
        **options: Unpack[RequestOptions],
    ) -> GenerationResult:
        """`chat` for a coroutine. Cancelling the task cancels the request."""
        prompt, options = await asyncio.to_thread(self._fit_chat, messages, sampling, tools, options)
        return await self.agenerate(prompt, sampling, **options)

    async def astream_chat(
        self,
        messages: Seq[Message],
        sampling: SamplingParams | None = None,
        *,
        tools: Tools | None = None,
        **options: Unpack[RequestOptions],
    ) -> AsyncGenerator[StreamPiece, None]:
        """`stream_chat` for a coroutine: `async for piece in llm.astream_chat(messages)`."""
        prompt, options = await asyncio.to_thread(self._fit_chat, messages, sampling, tools, options)
        pieces = self.astream(prompt, sampling, **options)
        try:
            async for piece in pieces:
                yield piece
        finally:
            await pieces.aclose()

    def encode_chat(
        self,
        messages: Seq[Message],
        *,
        tools: Tools | None = None,
        add_generation_prompt: bool = True,
        **variables: Any,
    ) -> list[int]:
        """The prompt of a chat as token ids.

        Args:
            add_generation_prompt: end with the head of the assistant's turn.
            variables: further variables of the model's chat template, such as `enable_thinking`.

        Raises:
            ChatTemplateError, RequestError: as for `chat`.
        """
        return encode_chat(self.tokenizer, self._template, messages, tools, add_generation_prompt, **variables)

    # --- end of life -----------------------------------------------------------------------------------------------

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._thread.is_closed

    def close(self) -> None:
        """Stop the engine. Requests in progress fail with EngineClosedError. May be called again."""
        self._thread.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"ExL2LLM({str(self.model_dir)!r})"

    # --- frameworks ------------------------------------------------------------------------------------------------

    def as_langchain(self, **options: Any) -> ChatExL2:
        """A LangChain chat model that shares this engine; `options` are keywords of `ChatExL2`."""
        from exl2_rag.adapters import as_langchain

        return as_langchain(self, **options)

    def as_llama_index(self, **options: Any) -> LlamaIndexExL2:
        """A LlamaIndex model that shares this engine; `options` are keywords of its `ExL2`."""
        from exl2_rag.adapters import as_llama_index

        return as_llama_index(self, **options)

    def __call__(self, model_input: Any) -> ChatExL2:
        """For LangChain pipes: `prompt | llm | parser` calls this and runs the chat model it gets."""
        from exl2_rag.adapters import langchain_runnable

        return langchain_runnable(self, model_input)

    # --- inside ----------------------------------------------------------------------------------------------------

    def _sequence(
        self, token_ids: tuple[int, ...], sampling: SamplingParams | None, **options: Unpack[RequestOptions]
    ) -> Sequence:
        sampling = self._with_negative_ids(sampling or SamplingParams())
        fields = cast(RequestFields, {name: value for name, value in options.items() if name != "overflow"})
        limit = self.max_seq_len
        token_ids, n_dropped = fit_prompt(
            token_ids,
            policy=options.get("overflow", "error"),
            limit=limit,
            reserve=reserved_tokens(sampling.max_tokens, limit),
            bos=self.tokenizer.bos_token_id,
        )
        return self._engine.prepare(GenerationRequest(token_ids, sampling, dropped_tokens=n_dropped, **fields))

    def _with_negative_ids(self, sampling: SamplingParams) -> SamplingParams:
        """The same with its negative prompt, if it has one, as token ids."""
        negative = sampling.negative_prompt
        if negative is None:
            return sampling
        if not isinstance(negative, str) and isinstance(negative[0], Mapping):
            ids = tuple(self.encode_chat(cast(Seq[Message], negative)))
        else:
            ids = self._encode(cast(Prompt, negative))
        return dataclasses.replace(sampling, negative_prompt=ids)

    def _fit_chat(
        self, messages: Seq[Message], sampling: SamplingParams | None, tools: Tools | None, options: RequestOptions
    ) -> tuple[list[int], RequestOptions]:
        """The prompt of a chat, shortened if its policy says so, and the options for what remains to be done."""
        limit, policy = self.max_seq_len, options.get("overflow", "error")
        if policy == "error":
            return self.encode_chat(messages, tools=tools), options
        fitted = fit_chat(
            messages,
            lambda kept: self.encode_chat(kept, tools=tools),
            policy=policy,
            limit=limit,
            reserve=reserved_tokens((sampling or SamplingParams()).max_tokens, limit),
        )
        return list(fitted.token_ids), {**options, "overflow": "error", "dropped_messages": fitted.dropped}

    def _stream(self, sequence: Sequence) -> Generator[StreamPiece, None, None]:
        yield from self._thread.stream(sequence)  # a frame of our own, so that the engine outlives the stream

    def _encode_prefix(self, prompt: Prompt | Seq[Message]) -> tuple[int, ...]:
        if isinstance(prompt, str):
            return self._encode(prompt)
        if any(isinstance(one, Mapping) for one in prompt):
            return tuple(self.encode_chat(cast(Seq[Message], prompt), add_generation_prompt=False))
        return as_token_ids(prompt)

    def _compute(self, sequence: Sequence) -> Usage:
        return joined_result(self._thread.run_together([sequence])[0]).usage

    async def _gather(self, sequences: Iterable[Sequence]) -> list[GenerationResult]:
        async def one(sequence: Sequence) -> GenerationResult:
            return joined_result([piece async for piece in self._thread.astream(sequence)])

        tasks = [asyncio.ensure_future(one(sequence)) for sequence in sequences]
        try:
            return list(await asyncio.gather(*tasks))
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
