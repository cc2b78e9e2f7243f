"""LangChain's own standard unit tests for chat models, embeddings and the shape of the classes."""

from __future__ import annotations

from typing import Any

from langchain_core.language_models import BaseChatModel
from langchain_tests.unit_tests import ChatModelUnitTests

from exl2_rag.adapters.langchain import ChatExL2
from tests.adapters.fake_engine import FakeEngine


class TestChatExL2Unit(ChatModelUnitTests):
    @property
    def chat_model_class(self) -> type[BaseChatModel]:
        return ChatExL2

    @property
    def chat_model_params(self) -> dict[str, Any]:
        return {"llm": FakeEngine(), "api_key": "unused"}

    @property
    def has_tool_calling(self) -> bool:
        return False  # comes with its own issue

    @property
    def has_structured_output(self) -> bool:
        return False  # comes with its own issue

    @property
    def supports_model_override(self) -> bool:
        return False  # one engine, one model
