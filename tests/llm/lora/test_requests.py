"""Adapters of requests: which rows they change, which cached pages they may use, and when they come and go."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from exl2_rag import ExL2LLM, SamplingParams
from exl2_rag.errors import LoraError, RequestError
from exl2_rag.llm.config import ModelConfig
from exl2_rag.llm.lora.choice import lora_choices
from exl2_rag.llm.sequence import Evaluation, Sequence
from tests.llm.models import parity
from tests.support.lora import EVERYTHING, write_adapter
from tests.support.synthetic import make_model_dir

GREEDY = SamplingParams(max_tokens=8, temperature=0, ignore_eos=True)
PROMPT = parity.random_tokens(70, 5)


@pytest.fixture(scope="module", params=["plain", "exl2"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp(request.param)
    make_model_dir(path / "model", quantised=request.param == "exl2")
    config = ModelConfig.from_dir(path / "model")
    write_adapter(path / "a", config, (*EVERYTHING, "embed_tokens", "lm_head"), seed=1)
    write_adapter(path / "b", config, ("q_proj", "v_proj"), rank=8, seed=2, strength=0.3)
    return path


@pytest.fixture
def llm(folder: Path) -> Iterator[ExL2LLM]:
    with ExL2LLM(folder / "model", cache_tokens=2048, page_size=16, max_batch_size=8) as one:
        one.load_lora(folder / "a")
        one.load_lora(folder / "b")
        yield one


def texts(llm: ExL2LLM, asked: list[tuple[list[int], Any]]) -> list[tuple[int, ...]]:
    """Greedy tokens of requests that run together."""
    sequences = [llm._sequence(tuple(prompt), GREEDY, lora=lora) for prompt, lora in asked]
    pieces = llm._thread.run_together(sequences)
    return [tuple(token for piece in one for token in piece.token_ids) for one in pieces]


def test_each_request_of_a_batch_gets_the_bits_it_gets_alone(llm: ExL2LLM, folder: Path) -> None:
    """Logits of prompts of unequal lengths, five adapter sets in one step, against each alone in a fresh engine."""
    choices: list[Any] = [None, "a", ("b", 0.5), ["a", "b"], [("b", -1.5), ("a", 0.25)], "a", None]
    prompts = [parity.random_tokens(9 + 13 * n, n) for n in range(len(choices))]
    found: list[list[torch.Tensor]] = [[] for _ in choices]

    def receiver(n: int) -> Evaluation:
        return Evaluation(0, lambda _start, rows: found[n].append(rows.clone()))

    sequences: list[Sequence] = [
        llm._engine.prepare_prompt(tuple(prompt), evaluation=receiver(n), lora=choices[n])
        for n, prompt in enumerate(prompts)
    ]
    llm._thread.run_together(sequences)
    for n, (prompt, choice) in enumerate(zip(prompts, choices, strict=True)):
        with ExL2LLM(
            folder / "model", cache_tokens=512, page_size=16, max_batch_size=4, max_batched_tokens=32
        ) as alone:
            alone.load_lora(folder / "b")
            alone.load_lora(folder / "a")
            expected = alone.logits(prompt, lora=choice)
        assert torch.equal(torch.cat(found[n]), expected)
    assert not torch.equal(torch.cat(found[1])[:9], torch.cat(found[0])[:9])


def test_the_same_prompt_with_other_adapters_finds_nothing_of_theirs_in_the_cache(llm: ExL2LLM) -> None:
    choices: list[Any] = [None, "a", ("a", 0.5), "b", ["a", "b"]]
    first = {}
    for choice in choices:
        result = llm.generate(PROMPT, GREEDY, lora=choice)
        assert result.usage.cached_tokens == 0, choice
        first[str(choice)] = result.token_ids
    assert len(set(first.values())) == len(choices)
    for choice in choices:
        again = llm.generate(PROMPT, GREEDY, lora=choice)
        assert again.usage.cached_tokens == len(PROMPT) - 1
        assert again.token_ids == first[str(choice)]
    reordered = llm.generate(PROMPT, GREEDY, lora=["b", "a"])
    assert reordered.usage.cached_tokens == len(PROMPT) - 1
    assert reordered.token_ids == first["['a', 'b']"]
    assert llm.generate(PROMPT, GREEDY, lora=("a", 0)).token_ids == first["None"]


def test_requests_that_run_together_do_not_wait_for_a_prefix_with_other_adapters(llm: ExL2LLM) -> None:
    alone = [llm.generate(PROMPT, GREEDY, lora=choice).token_ids for choice in (None, "a", "b")]
    fresh = [7, *PROMPT]
    expected = [texts(llm, [(fresh, choice)])[0] for choice in (None, "a", "b")]
    assert texts(llm, [(PROMPT, None), (PROMPT, "a"), (PROMPT, "b")]) == alone
    assert texts(llm, [(fresh, "b"), (fresh, "a"), (fresh, None)]) == expected[::-1]


def test_an_adapter_that_is_unloaded_while_in_use_serves_its_request_to_the_end(llm: ExL2LLM, folder: Path) -> None:
    expected = llm.generate(PROMPT, GREEDY, lora="a").token_ids
    stream = llm.stream(PROMPT[:40], SamplingParams(max_tokens=50, temperature=0, ignore_eos=True), lora="a")
    next(stream)
    llm.unload_lora("a")
    with pytest.raises(RequestError, match="no LoRA adapter 'a'; loaded are: 'b'"):
        llm.generate(PROMPT, GREEDY, lora="a")
    rest = [token for piece in stream for token in piece.token_ids]
    assert len(rest) >= 40
    llm.load_lora(folder / "a", "again")
    result = llm.generate(PROMPT, GREEDY, lora="again")
    assert result.token_ids == expected
    assert result.usage.cached_tokens == len(PROMPT) - 1, "the same contents under another name are the same adapter"


def test_loading_under_a_taken_name_is_refused_unless_it_is_the_same_adapter(llm: ExL2LLM, folder: Path) -> None:
    assert llm.load_lora(folder / "a", "a") == llm.loras[0]
    with pytest.raises(LoraError, match=r"'a' already.*unload it"):
        llm.load_lora(folder / "b", "a")
    with pytest.raises(RequestError, match="no LoRA adapter 'c'"):
        llm.unload_lora("c")
    assert [one.name for one in llm.loras] == ["a", "b"]
    assert llm.loras[1].size_bytes == sum(p.size_bytes for p in llm.loras) - llm.loras[0].size_bytes


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (None, ()),
        ("a", (("a", 1.0),)),
        (("a", 2), (("a", 2.0),)),
        (["a"], (("a", 1.0),)),
        (("a", "b"), (("a", 1.0), ("b", 1.0))),
        ([("a", 0.5), "b", ["c", -1]], (("a", 0.5), ("b", 1.0), ("c", -1.0))),
        ([], ()),
    ],
)
def test_a_choice_is_a_name_a_pair_or_several(given: Any, expected: Any) -> None:
    assert lora_choices(given) == expected


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (3, "must be a name"),
        ({"a": 1.0}, "must be a name"),
        ([("a", "b", "c")], "must be a name"),
        ([("a", True)], "must be a name"),
        (("a", float("nan")), "finite"),
        (["a", ("a", 0.5)], "'a' twice"),
    ],
)
def test_any_other_choice_is_refused(given: Any, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        lora_choices(given)


def test_an_unknown_keyword_of_a_request_is_an_error(llm: ExL2LLM) -> None:
    with pytest.raises(TypeError, match="adapter"):
        llm.generate(PROMPT, GREEDY, adapter="a")  # type: ignore[call-overload]
