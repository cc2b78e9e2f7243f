"""Greedy text is the same alone, in a batch, after a prefix hit and after a preemption, on real models of each kind."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from exl2_rag import ExL2LLM, SamplingParams
from exl2_rag.llm import model_runner
from exl2_rag.llm.cache_report import CacheReport
from exl2_rag.llm.prefix_groups import PrefixGroups, group_by_prefix
from exl2_rag.llm.request import GenerationResult
from tests.support.byte_tokenizer import BOS_ID
from tests.support.synthetic import make_model_dir

GREEDY = SamplingParams(max_tokens=16, temperature=0, ignore_eos=True)
PREFIX_TOKENS = 2000
# (model, cache dtype, precision)
KINDS = [
    ("fp16", "fp16", "exact"),
    ("exl2", "fp32", "exact"),
    ("exl2", "fp16", "fast"),
    ("qwen2-exl2", "fp32", "fast"),
    ("mistral-window", "fp16", "exact"),
    ("exl2", "q8", "fast"),
    ("fp16", "q4", "exact"),
]


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest) -> tuple[str, str, str]:
    name, cache_dtype, precision = request.param
    return name, cache_dtype, precision


@pytest.fixture(scope="module")
def options(kind: tuple[str, str, str]) -> dict[str, str]:
    return {"cache_dtype": kind[1], "precision": kind[2]}


@pytest.fixture(scope="module")
def model_dir(kind: tuple[str, str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / kind[0]
    if kind[0] == "fp16":
        return make_model_dir(path, max_position=4096, dtype=torch.float16)
    if kind[0] == "exl2":
        return make_model_dir(path, max_position=4096, quantised=True)
    if kind[0] == "qwen2-exl2":
        return make_model_dir(path, max_position=4096, quantised=True, architecture="Qwen2ForCausalLM", seed=1)
    return make_model_dir(
        path, max_position=4096, dtype=torch.float16, architecture="MistralForCausalLM", sliding_window=50
    )


@pytest.fixture
def llm(model_dir: Path, options: dict[str, str]) -> Iterator[ExL2LLM]:
    with ExL2LLM(model_dir, cache_tokens=8192, **options, max_batch_size=16) as one:
        yield one


def words(n_tokens: int, seed: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(97, 123) for _ in range(n_tokens)]


def cold(model_dir: Path, options: dict[str, str], prompts: list[list[int]]) -> list[tuple[int, ...]]:
    """What each prompt gives alone, in an engine that has never seen another."""
    results = []
    for prompt in prompts:
        with ExL2LLM(model_dir, cache_tokens=2500, **options) as llm:
            result = llm.generate(prompt, GREEDY)
        assert result.usage.cached_tokens == 0
        results.append(result.token_ids)
    return results


def test_a_batch_gives_each_prompt_what_it_gets_alone(llm: ExL2LLM, model_dir: Path, options: dict[str, str]) -> None:
    prompts = [[BOS_ID, *words(length, seed=length)] for length in (1, 15, 31, 32, 33, 64, 150, 300)]
    expected = cold(model_dir, options, prompts)
    assert [one.token_ids for one in llm.generate(prompts, GREEDY)] == expected
    assert len(set(expected)) == len(prompts)


def test_a_prefix_hit_changes_nothing(llm: ExL2LLM, model_dir: Path, options: dict[str, str]) -> None:
    shared = [BOS_ID, *words(200, seed=1)]
    llm.generate([*shared, *words(20, seed=2)], GREEDY)
    lengths = (1, 31, 32, 33, 100, 201)
    prompts = [[*shared[:length], 1, *words(10, seed=length)] for length in lengths]
    expected = cold(model_dir, options, prompts)
    for prompt, length, tokens in zip(prompts, lengths, expected, strict=True):
        result = llm.generate(prompt, GREEDY)
        assert result.token_ids == tokens
        assert result.usage.cached_tokens == length


def test_a_tiny_cache_preempts_and_gives_the_same_text(model_dir: Path, options: dict[str, str]) -> None:
    prompts = [[BOS_ID, *words(20 + 3 * n, seed=n)] for n in range(5)]
    sampling = SamplingParams(max_tokens=30, temperature=0, ignore_eos=True)
    with ExL2LLM(model_dir, cache_tokens=4096, **options) as roomy:
        expected = [roomy.generate(one, sampling).token_ids for one in prompts]
    with ExL2LLM(model_dir, cache_tokens=112, page_size=16, **options, max_batch_size=6) as tiny:
        found = tiny.generate(prompts, sampling)
        assert tiny.cache_report().preemptions > 0
    assert [one.token_ids for one in found] == expected
    assert all(one.usage.completion_tokens == 30 for one in found)


@pytest.mark.parametrize("page_size", [16, 64, 256])
def test_a_second_request_has_its_whole_shared_prefix_cached(model_dir: Path, page_size: int) -> None:
    shared = [BOS_ID, *words(PREFIX_TOKENS - 1, seed=5)]
    with ExL2LLM(model_dir, cache_tokens=8192, page_size=page_size) as llm:
        first = llm.generate([*shared, 1, 2, 3], GREEDY)
        second = llm.generate([*shared, 4, 5], GREEDY)
        assert first.usage.cached_tokens == 0
        assert second.usage.cached_tokens == PREFIX_TOKENS
        assert second.timings.first_token_s < first.timings.first_token_s / 2


def watch_most_pages(llm: ExL2LLM, reports: list[CacheReport], done: threading.Event) -> None:
    while not done.is_set():
        reports.append(llm.cache_report())


@pytest.mark.parametrize("is_warm", [True, False])
def test_sixteen_sequences_share_one_copy_of_the_full_pages(llm: ExL2LLM, is_warm: bool) -> None:
    shared = [BOS_ID, *words(PREFIX_TOKENS - 1, seed=7 + is_warm)]
    if is_warm:
        llm.warm(shared)
    reports: list[CacheReport] = []
    done = threading.Event()
    watcher = threading.Thread(target=watch_most_pages, args=(llm, reports, done))
    watcher.start()
    results: list[GenerationResult] = llm.generate([[*shared, n, n + 1] for n in range(16)], GREEDY)
    done.set()
    watcher.join()
    together = [report for report in reports if report.running_requests == 16]
    assert together
    full_pages = PREFIX_TOKENS // llm.engine_config.page_size
    own_pages = -(-(PREFIX_TOKENS % llm.engine_config.page_size + 2 + 16) // llm.engine_config.page_size)
    assert max(report.running_pages for report in together) <= full_pages + 16 * own_pages
    n_cold = 0 if is_warm else 1
    assert sorted(one.usage.cached_tokens for one in results) == [0] * n_cold + [PREFIX_TOKENS] * (16 - n_cold)


@pytest.mark.parametrize("n_questions", [5, 12])
def test_questions_about_one_document_get_what_each_gets_alone(
    llm: ExL2LLM, model_dir: Path, options: dict[str, str], n_questions: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    groups: list[PrefixGroups] = []

    def record(*arguments: Any, **options: Any) -> PrefixGroups:
        groups.append(group_by_prefix(*arguments, **options))
        return groups[-1]

    monkeypatch.setattr(model_runner, "group_by_prefix", record)
    document = [BOS_ID, *words(400, seed=3)]
    prompts = [[*document, n, *words(2 * n, seed=n)] for n in range(n_questions)]
    llm.warm(document)
    together = [one.token_ids for one in llm.generate(prompts, GREEDY)]
    assert any(one.shares and len(one.order) == n_questions for one in groups)
    assert together[::4] == cold(model_dir, options, prompts[::4])
    assert [one.token_ids for one in llm.generate(prompts[:3], GREEDY)] == together[:3]  # fewer rows, another tape
