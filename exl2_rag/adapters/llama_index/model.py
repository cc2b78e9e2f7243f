"""`ExL2`: the engine as a LlamaIndex model, with native streaming and native async."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from llama_index.core.base.llms.types import (
    ChatMessage,
    ChatResponse,
    ChatResponseAsyncGen,
    ChatResponseGen,
    CompletionResponse,
    CompletionResponseAsyncGen,
    CompletionResponseGen,
    LLMMetadata,
)
from llama_index.core.constants import DEFAULT_NUM_OUTPUTS
from llama_index.core.llms.callbacks import llm_chat_callback, llm_completion_callback
from llama_index.core.llms.llm import default_completion_to_prompt
from pydantic import ConfigDict

from exl2_rag.adapters.llama_index.messages import raw_of, to_chat_messages, to_chat_response, to_completion_response
from exl2_rag.adapters.llama_index.refusals import WithoutTools
from exl2_rag.adapters.llama_index.streams import aparts, closes_async_streams, closes_streams, parts
from exl2_rag.adapters.shared import CallOptions, EngineAdapter
from exl2_rag.errors import ChatTemplateError
from exl2_rag.llm.request import GenerationResult


class ExL2(EngineAdapter, WithoutTools):
    """A LlamaIndex model over an `ExL2LLM`.

        index.as_query_engine(llm=ExL2(model_dir="models/…", temperature=0))

    Token counts are in `response.raw["usage"]`, cached ones under `prompt_tokens_details`. `complete` puts its prompt
    through the model's chat template as a user message, as LlamaIndex asks of chat models; `complete(…,
    formatted=True)`, a `completion_to_prompt` of your own, or a model without a chat template continue the text as is.
    """

    model_config = ConfigDict(extra="forbid", arbitrary_types_allowed=True)

    @classmethod
    def class_name(cls) -> str:
        """Name LlamaIndex stores objects under."""
        return "ExL2"

    @property
    def metadata(self) -> LLMMetadata:
        """What LlamaIndex packs prompts by."""
        return LLMMetadata(
            context_window=self.engine.max_seq_len,
            num_output=self.max_tokens or DEFAULT_NUM_OUTPUTS,
            is_chat_model=True,
            is_function_calling_model=False,  # with tool calling, which is not in yet
            model_name=self.engine.model_name,
        )

    @property
    def tokenizer(self) -> Callable[[str], list[int]]:
        """Text to token ids, for LlamaIndex's counters and splitters, which else take a GPT tokenizer."""
        return self.engine.tokenizer.encode

    @llm_chat_callback()
    def chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponse:
        """Answer a conversation. Keywords: any sampling option, `stop`, `constraint`."""
        call = self._call(kwargs)
        result = self.engine.chat(to_chat_messages(messages), call.sampling, constraint=call.constraint)
        return to_chat_response(result.text, delta=None, raw=raw_of(result, self.engine.model_name))

    @closes_streams
    @llm_chat_callback()
    def stream_chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponseGen:
        """Answer a conversation piece by piece."""
        call = self._call(kwargs)
        pieces = self.engine.stream_chat(to_chat_messages(messages), call.sampling, constraint=call.constraint)
        return parts(pieces, to_chat_response, self.engine.model_name)

    @llm_chat_callback()
    async def achat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponse:
        """Answer a conversation."""
        call = self._call(kwargs)
        result = await self.engine.achat(to_chat_messages(messages), call.sampling, constraint=call.constraint)
        return to_chat_response(result.text, delta=None, raw=raw_of(result, self.engine.model_name))

    @closes_async_streams
    @llm_chat_callback()
    async def astream_chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponseAsyncGen:
        """Answer a conversation piece by piece."""
        call = self._call(kwargs)
        pieces = self.engine.astream_chat(to_chat_messages(messages), call.sampling, constraint=call.constraint)
        return aparts(pieces, to_chat_response, self.engine.model_name)

    @llm_completion_callback()
    def complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponse:
        """Answer a prompt; see the class for what `formatted` does."""
        call = self._call(kwargs)
        result: GenerationResult
        if (text := self._text_prompt(prompt, formatted)) is None:
            result = self.engine.chat(_user(prompt), call.sampling, constraint=call.constraint)
        else:
            result = self.engine.generate(text, call.sampling, constraint=call.constraint)
        return to_completion_response(result.text, delta=None, raw=raw_of(result, self.engine.model_name))

    @closes_streams
    @llm_completion_callback()
    def stream_complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponseGen:
        """Answer a prompt piece by piece."""
        call = self._call(kwargs)
        if (text := self._text_prompt(prompt, formatted)) is None:
            pieces = self.engine.stream_chat(_user(prompt), call.sampling, constraint=call.constraint)
        else:
            pieces = self.engine.stream(text, call.sampling, constraint=call.constraint)
        return parts(pieces, to_completion_response, self.engine.model_name)

    @llm_completion_callback()
    async def acomplete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponse:
        """Answer a prompt."""
        call = self._call(kwargs)
        result: GenerationResult
        if (text := self._text_prompt(prompt, formatted)) is None:
            result = await self.engine.achat(_user(prompt), call.sampling, constraint=call.constraint)
        else:
            result = await self.engine.agenerate(text, call.sampling, constraint=call.constraint)
        return to_completion_response(result.text, delta=None, raw=raw_of(result, self.engine.model_name))

    @closes_async_streams
    @llm_completion_callback()
    async def astream_complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponseAsyncGen:
        """Answer a prompt piece by piece."""
        call = self._call(kwargs)
        if (text := self._text_prompt(prompt, formatted)) is None:
            pieces = self.engine.astream_chat(_user(prompt), call.sampling, constraint=call.constraint)
        else:
            pieces = self.engine.astream(text, call.sampling, constraint=call.constraint)
        return aparts(pieces, to_completion_response, self.engine.model_name)

    def _call(self, options: dict[str, Any]) -> CallOptions:
        return self.call_options(options.get("stop"), {k: v for k, v in options.items() if k != "stop"})

    def _text_prompt(self, prompt: str, formatted: bool) -> str | None:
        """The text to continue, or None if the prompt shall go through the chat template."""
        if formatted:
            return prompt
        to_prompt = self.completion_to_prompt
        if to_prompt is not None and to_prompt is not default_completion_to_prompt:
            return to_prompt(prompt)
        return None if self._takes_chat() else prompt

    def _takes_chat(self) -> bool:
        try:
            self.engine.encode_chat(_user("x"))
        except ChatTemplateError:
            return False
        return True


def _user(prompt: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": prompt}]
