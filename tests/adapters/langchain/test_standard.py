"""LangChain's own standard tests for chat models; tools and structured output come with their own issue."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from langchain_core.language_models import BaseChatModel
from langchain_tests.integration_tests import ChatModelIntegrationTests
from langchain_tests.unit_tests import ChatModelUnitTests

from exl2_rag import ExL2LLM
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
        return False

    @property
    def has_structured_output(self) -> bool:
        return False

    @property
    def supports_model_override(self) -> bool:
        return False  # one engine, one model


@pytest.mark.slow
class TestChatExL2Integration(ChatModelIntegrationTests):
    model_dir: Path

    @pytest.fixture(autouse=True)
    def _model_dir(self, llm: ExL2LLM) -> None:
        self.model_dir = llm.model_dir

    @property
    def chat_model_class(self) -> type[BaseChatModel]:
        return ChatExL2

    @property
    def chat_model_params(self) -> dict[str, Any]:
        return {"model_dir": self.model_dir, "temperature": 0.0}  # a random model may end its text at once if it draws

    @property
    def has_tool_calling(self) -> bool:
        return False

    @property
    def has_structured_output(self) -> bool:
        return False

    @property
    def supports_model_override(self) -> bool:
        return False
