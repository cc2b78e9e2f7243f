"""What the LlamaIndex model cannot do yet: tools and structured output. Each way in says so instead of trying."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from llama_index.core.base.llms.types import ChatMessage, ChatResponse
from llama_index.core.llms.function_calling import FunctionCallingLLM

from exl2_rag.adapters.shared import not_yet

if TYPE_CHECKING:
    from llama_index.core.llms.llm import ToolSelection
    from llama_index.core.tools.types import BaseTool


class WithoutTools(FunctionCallingLLM):
    """A function-calling model whose tool and structured methods raise SettingsError.

    LlamaIndex's own fallbacks would ask for JSON in words and parse what comes, which a small model fails at.
    """

    def _prepare_chat_with_tools(
        self,
        tools: Sequence[BaseTool],
        user_msg: str | ChatMessage | None = None,
        chat_history: list[ChatMessage] | None = None,
        verbose: bool = False,
        allow_parallel_tool_calls: bool = False,
        tool_required: bool = False,
        **kwargs: Any,
    ) -> dict[str, Any]:
        raise not_yet("tool calling")

    def get_tool_calls_from_response(
        self, response: ChatResponse, error_on_no_tool_call: bool = True, **kwargs: Any
    ) -> list[ToolSelection]:
        """Not supported yet.

        Raises:
            SettingsError: always.
        """
        raise not_yet("tool calling")

    def structured_predict(self, *args: Any, **kwargs: Any) -> Any:
        """Not supported yet.

        Raises:
            SettingsError: always.
        """
        raise not_yet("structured output")

    async def astructured_predict(self, *args: Any, **kwargs: Any) -> Any:
        """Not supported yet.

        Raises:
            SettingsError: always.
        """
        raise not_yet("structured output")

    def stream_structured_predict(self, *args: Any, **kwargs: Any) -> Any:
        """Not supported yet.

        Raises:
            SettingsError: always.
        """
        raise not_yet("structured output")

    async def astream_structured_predict(self, *args: Any, **kwargs: Any) -> Any:
        """Not supported yet.

        Raises:
            SettingsError: always.
        """
        raise not_yet("structured output")

    def as_structured_llm(self, *args: Any, **kwargs: Any) -> Any:
        """Not supported yet.

        Raises:
            SettingsError: always.
        """
        raise not_yet("structured output")
