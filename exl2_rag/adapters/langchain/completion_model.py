"""`ExL2`: the engine as a LangChain completion model: the prompt is continued as it is, without a chat template.

All prompts of one `batch` go to the engine together and share their prefixes.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import aclosing, closing
from typing import Any

from langchain_core.callbacks import AsyncCallbackManagerForLLMRun, CallbackManagerForLLMRun
from langchain_core.language_models import BaseLLM, LangSmithParams
from langchain_core.outputs import Generation, GenerationChunk, LLMResult
from pydantic import ConfigDict

from exl2_rag.adapters.langchain.errors import langchain_errors
from exl2_rag.adapters.shared import EngineAdapter, usage_counts
from exl2_rag.llm.request import GenerationResult, StreamPiece, Usage


class ExL2(EngineAdapter, BaseLLM):
    """A LangChain completion model over an `ExL2LLM`.

    llm = ExL2(model_dir="models/…", max_tokens=32)
    llm.batch(["The capital of France is", "The capital of Spain is"])
    """

    model_config = ConfigDict(extra="forbid", arbitrary_types_allowed=True)

    @property
    def _llm_type(self) -> str:
        return "exl2"

    @property
    def _identifying_params(self) -> dict[str, Any]:
        return self.identity()

    def _generate(
        self,
        prompts: list[str],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> LLMResult:
        call = self.call_options(stop, kwargs)
        with langchain_errors():
            results = self.engine.generate(list(prompts), call.sampling, constraint=call.constraint)
        return self._to_result(results)

    async def _agenerate(
        self,
        prompts: list[str],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> LLMResult:
        call = self.call_options(stop, kwargs)
        with langchain_errors():
            results = await self.engine.agenerate(list(prompts), call.sampling, constraint=call.constraint)
        return self._to_result(results)

    def _stream(
        self,
        prompt: str,
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> Iterator[GenerationChunk]:
        call = self.call_options(stop, kwargs)
        with langchain_errors():
            stream = self.engine.stream(prompt, call.sampling, constraint=call.constraint)
            with closing(stream) as pieces:
                for piece in pieces:
                    if (chunk := _to_chunk(piece)) is not None:
                        if run_manager is not None:
                            run_manager.on_llm_new_token(chunk.text, chunk=chunk)
                        yield chunk

    async def _astream(
        self,
        prompt: str,
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> AsyncIterator[GenerationChunk]:
        call = self.call_options(stop, kwargs)
        with langchain_errors():
            stream = self.engine.astream(prompt, call.sampling, constraint=call.constraint)
            async with aclosing(stream) as pieces:
                async for piece in pieces:
                    if (chunk := _to_chunk(piece)) is not None:
                        if run_manager is not None:
                            await run_manager.on_llm_new_token(chunk.text, chunk=chunk)
                        yield chunk

    def get_token_ids(self, text: str) -> list[int]:
        """Token ids of `text` by the model's own tokenizer."""
        return self.engine.tokenizer.encode(text)

    def _get_ls_params(self, stop: list[str] | None = None, **kwargs: Any) -> LangSmithParams:
        params = super()._get_ls_params(stop=stop or self.stop, **kwargs)
        params["ls_provider"] = "exl2-rag"
        params.setdefault("ls_model_name", self.engine.model_name)
        return params

    def _to_result(self, results: Sequence[GenerationResult]) -> LLMResult:
        total = Usage(
            prompt_tokens=sum(result.usage.prompt_tokens for result in results),
            cached_tokens=sum(result.usage.cached_tokens for result in results),
            completion_tokens=sum(result.usage.completion_tokens for result in results),
        )
        return LLMResult(
            generations=[[Generation(text=r.text, generation_info=_info(r.finish_reason, r.usage))] for r in results],
            llm_output={"model_name": self.engine.model_name, "token_usage": usage_counts(total)},
        )


def _info(finish_reason: str, usage: Usage | None) -> dict[str, Any]:
    info: dict[str, Any] = {"finish_reason": finish_reason}
    if usage is not None:
        info["usage"] = usage_counts(usage)
    return info


def _to_chunk(piece: StreamPiece) -> GenerationChunk | None:
    if piece.finish_reason is not None:
        return GenerationChunk(text=piece.text, generation_info=_info(piece.finish_reason, piece.usage))
    return GenerationChunk(text=piece.text) if piece.text else None
