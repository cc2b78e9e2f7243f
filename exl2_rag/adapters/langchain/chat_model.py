"""`ChatExL2`: the engine as a LangChain chat model, with native streaming and native async.

One request per call: LangChain gets its parallelism from threads (`batch`) and tasks (`abatch`), and the engine batches
whatever runs at the same time.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import aclosing, closing
from typing import Any

from langchain_core.callbacks import AsyncCallbackManagerForLLMRun, CallbackManagerForLLMRun
from langchain_core.language_models import BaseChatModel, LangSmithParams, ModelProfile
from langchain_core.messages import BaseMessage
from langchain_core.outputs import ChatGenerationChunk, ChatResult
from pydantic import ConfigDict, Field, SecretStr

from exl2_rag.adapters.langchain.errors import langchain_errors
from exl2_rag.adapters.langchain.messages import to_chat_chunk, to_chat_messages, to_chat_result
from exl2_rag.adapters.shared import CallOptions, EngineAdapter, not_yet


class ChatExL2(EngineAdapter, BaseChatModel):
    """A LangChain chat model over an `ExL2LLM`.

        chain = prompt | ChatExL2(model_dir="models/…", temperature=0) | StrOutputParser()

    Cached prompt tokens are in `usage_metadata["input_token_details"]["cache_read"]`. An over-long prompt raises an
    error that is both LangChain's and this package's `ContextOverflowError`.

    Attributes:
        timeout, max_retries, api_key: accepted because much code passes them to every model; there is no remote
            service here that could be timed out, retried or paid.
        streaming: whether `invoke` streams internally, which sends tokens to callbacks; True, False or left out.
    """

    model_config = ConfigDict(extra="forbid", arbitrary_types_allowed=True)

    timeout: float | None = None
    max_retries: int | None = None
    streaming: bool = False
    api_key: SecretStr | None = Field(default=None, exclude=True, repr=False)

    @property
    def _llm_type(self) -> str:
        return "exl2-chat"

    @property
    def _identifying_params(self) -> dict[str, Any]:
        return self.identity()

    def _generate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        call = self._call(stop, kwargs)
        with langchain_errors():
            result = self.engine.chat(to_chat_messages(messages), call.sampling, constraint=call.constraint)
        return to_chat_result(result, self.engine.model_name)

    async def _agenerate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        call = self._call(stop, kwargs)
        with langchain_errors():
            result = await self.engine.achat(to_chat_messages(messages), call.sampling, constraint=call.constraint)
        return to_chat_result(result, self.engine.model_name)

    def _stream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> Iterator[ChatGenerationChunk]:
        call = self._call(stop, kwargs)
        with langchain_errors():
            stream = self.engine.stream_chat(to_chat_messages(messages), call.sampling, constraint=call.constraint)
            with closing(stream) as pieces:
                for piece in pieces:
                    if (chunk := to_chat_chunk(piece, self.engine.model_name)) is not None:
                        yield chunk

    async def _astream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> AsyncIterator[ChatGenerationChunk]:
        call = self._call(stop, kwargs)
        with langchain_errors():
            stream = self.engine.astream_chat(to_chat_messages(messages), call.sampling, constraint=call.constraint)
            async with aclosing(stream) as pieces:
                async for piece in pieces:
                    if (chunk := to_chat_chunk(piece, self.engine.model_name)) is not None:
                        yield chunk

    def _call(self, stop: list[str] | None, options: dict[str, Any]) -> CallOptions:
        # `stream=` was for LangChain, which has already chosen the method by it.
        return self.call_options(stop, {name: value for name, value in options.items() if name != "stream"})

    def bind_tools(
        self,
        tools: Sequence[dict[str, Any] | type | Callable[..., Any] | Any],
        *,
        tool_choice: Any = None,
        **kwargs: Any,
    ) -> Any:
        """Not supported yet.

        Raises:
            SettingsError: always.
        """
        raise not_yet("tool calling")

    def with_structured_output(self, schema: Any, **kwargs: Any) -> Any:
        """Not supported yet.

        Raises:
            SettingsError: always.
        """
        raise not_yet("structured output")

    def get_token_ids(self, text: str) -> list[int]:
        """Token ids of `text` by the model's own tokenizer."""
        return self.engine.tokenizer.encode(text)

    def get_num_tokens_from_messages(
        self,
        messages: Sequence[BaseMessage],
        tools: Sequence[Any] | None = None,
    ) -> int:
        """Tokens of the whole prompt, chat template included: what `usage_metadata["input_tokens"]` will say.

        Raises:
            SettingsError: tools are given, which are not supported yet.
        """
        if tools:
            raise not_yet("tool calling")
        return len(self.engine.encode_chat(to_chat_messages(messages)))

    def _get_ls_params(self, stop: list[str] | None = None, **kwargs: Any) -> LangSmithParams:
        params = super()._get_ls_params(stop=stop or self.stop, **kwargs)
        params["ls_provider"] = "exl2-rag"
        params.setdefault("ls_model_name", self.engine.model_name)
        return params

    def _resolve_model_profile(self) -> ModelProfile | None:
        return ModelProfile(
            name=self.engine.model_name,
            open_weights=True,
            max_input_tokens=self.engine.max_seq_len,
            text_inputs=True,
            text_outputs=True,
            tool_calling=False,
            tool_choice=False,
            tool_call_streaming=False,
            structured_output=False,
        )
