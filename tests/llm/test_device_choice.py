from __future__ import annotations

import logging

import pytest
import torch

from exl2_rag.errors import DeviceError, DeviceMemoryError
from exl2_rag.llm import engine_loader
from exl2_rag.llm.engine_config import EngineOptions
from exl2_rag.llm.engine_loader import choose_device, load_engine, memory_errors
from tests.support.synthetic import make_model_dir


@pytest.fixture
def card(monkeypatch):
    """Pretend that torch sees a card which kernels can run on, or cannot because of what is given."""

    def pretend(problem: str | None) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(engine_loader.cuda_runtime, "unusable_because", lambda index: problem)

    return pretend


def test_auto_takes_a_card_that_can_be_used(card):
    card(None)
    assert choose_device("auto") == "cuda:0"
    assert choose_device("cpu") == "cpu"
    assert choose_device("cuda:1") == "cuda:1"


def test_auto_takes_the_cpu_quietly_without_a_card(monkeypatch, caplog):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device("auto") == "cpu"
    assert caplog.text == ""


def test_auto_says_why_it_leaves_a_card_alone(card, caplog):
    card("GTX 1080 (sm_61) is too old")
    with caplog.at_level(logging.WARNING):
        assert choose_device("auto") == "cpu"
    assert "running on the CPU, though there is a GPU: GTX 1080 (sm_61) is too old" in caplog.text


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a card")
def test_a_card_that_was_asked_for_and_is_not_there_is_an_error(tmp_path):
    model_dir = make_model_dir(tmp_path)
    with pytest.raises(DeviceError, match=r"device .cuda. was asked for, but .*device=.cpu."):
        load_engine(model_dir, EngineOptions(device="cuda"))


def test_a_model_that_does_not_fit_the_card_says_what_to_do():
    with (
        pytest.raises(DeviceMemoryError, match=r"do not fit the memory of cuda:0 .*smaller cache_tokens"),
        memory_errors(torch.device("cuda", 0)),
    ):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB\nmore")
