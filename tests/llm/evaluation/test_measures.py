"""Perplexity and divergence equal those computed plainly from transformers' logits."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from exl2_rag import ExL2LLM
from exl2_rag.errors import EngineError, RequestError, SettingsError
from exl2_rag.llm.evaluation import divergence
from exl2_rag.llm.evaluation.corpus import EvaluationText
from exl2_rag.llm.evaluation.divergence import compare_rows, mean_standard_error, measure_divergence
from exl2_rag.llm.evaluation.perplexity import measure_perplexity
from tests.llm.models import parity
from tests.support.byte_tokenizer import write_byte_tokenizer
from tests.support.synthetic import make_model_dir

TEXT = [EvaluationText("a", "It was a bright cold day in April, and the clocks were striking thirteen. " * 2),
        EvaluationText("b", "Call me Ishmael. Some years ago, never mind how long precisely.")]  # fmt: skip


@dataclass
class Model:
    llm: ExL2LLM
    oracle: Any

    def logprobs(self, token_ids: tuple[int, ...]) -> torch.Tensor:
        return parity.oracle_logits(self.oracle, token_ids).double().log_softmax(dim=-1)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Model]]:
    found = []
    for noise in (0.0, 0.01):
        path = tmp_path_factory.mktemp("model")
        oracle = parity.make_oracle("LlamaForCausalLM", vocab_size=320)
        with torch.no_grad():
            for parameter in oracle.parameters():
                parameter.add_(noise * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
        parity.save_oracle(oracle, path)
        write_byte_tokenizer(path)
        llm = ExL2LLM(path, cache_tokens=256, page_size=16, cache_dtype="fp32", max_batched_tokens=48, max_batch_size=4)
        found.append(Model(llm, oracle))
    yield found
    for one in found:
        one.llm.close()


def windows(llm: ExL2LLM, length: int, stride: int) -> list[tuple[tuple[int, ...], int]]:
    """Written anew: windows with BOS in front, and where scoring begins."""
    found = []
    assert llm.tokenizer.adds_bos
    for text in TEXT:
        ids, end = llm.tokenizer.encode(text.text), 0
        for begin in range(0, len(ids), stride):
            part = ids[begin : begin + length - 1]
            found.append(((llm.tokenizer.bos_token_id, *part), 1 + end - begin))
            end = begin + len(part)
            if end == len(ids):
                break
    return found


@pytest.mark.parametrize(("length", "stride"), [(64, 64), (64, 20), (200, 200)])
def test_perplexity_is_that_of_transformers(models: list[Model], length: int, stride: int) -> None:
    model = models[0]
    nlls = []
    for token_ids, first in windows(model.llm, length, min(stride, length - 1)):
        rows = model.logprobs(token_ids)
        nlls += [-float(rows[place - 1, token_ids[place]]) for place in range(first, len(token_ids))]
    told: list[tuple[int, int]] = []
    found = measure_perplexity(
        model.llm, TEXT, length=length, stride=stride, progress=lambda done, total: told.append((done, total))
    )
    values = torch.tensor(nlls, dtype=torch.float64)
    assert found.n_tokens == len(nlls) == sum(len(model.llm.tokenizer.encode(text.text)) for text in TEXT)
    assert found.mean_nll == pytest.approx(float(values.mean()), abs=1e-5)
    assert found.perplexity == pytest.approx(math.exp(float(values.mean())), rel=1e-5)
    error = math.exp(float(values.mean())) * float(values.std(correction=0)) / math.sqrt(len(nlls) - 1)
    assert found.standard_error == pytest.approx(error, rel=1e-3)
    assert told[-1] == (found.n_tokens, found.n_tokens)
    assert sum(count for _, count in found.window_nlls) == found.n_tokens


def test_a_limit_scores_the_first_tokens_alone(models: list[Model]) -> None:
    found = measure_perplexity(models[0].llm, TEXT, length=64, limit=70)
    whole = measure_perplexity(models[0].llm, TEXT, length=64)
    assert found.n_tokens == 70
    assert found.window_nlls[0] == whole.window_nlls[0]


@pytest.mark.parametrize("slice_rows", [256, 7])
def test_divergence_is_that_of_transformers(
    models: list[Model], slice_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(divergence, "SLICE_ROWS", slice_rows)
    kls, same, shared = [], [], []
    for token_ids, first in windows(models[0].llm, 64, 63):
        p, q = (model.logprobs(token_ids)[first - 1 : -1] for model in models)
        kls += (p.exp() * (p - q)).sum(dim=-1).tolist()
        same += (p.argmax(dim=-1) == q.argmax(dim=-1)).tolist()
        best, other = p.topk(5).indices.tolist(), q.topk(5).indices.tolist()
        shared += [len({*a} & {*b}) / 5 for a, b in zip(best, other, strict=True)]
    found = measure_divergence(models[0].llm, models[1].llm, TEXT, length=64)
    ordered = sorted(kls)
    assert found.n_tokens == len(kls)
    assert found.mean_kl == pytest.approx(sum(kls) / len(kls), abs=1e-5)
    assert found.mean_kl > 1e-3
    for share, value in ((0.5, found.kl_p50), (0.95, found.kl_p95), (0.99, found.kl_p99)):
        assert value == pytest.approx(ordered[int(len(ordered) * share)], abs=1e-5)
    assert found.kl_max == pytest.approx(ordered[-1], abs=1e-5)
    assert found.top1_agreement == pytest.approx(sum(same) / len(same))
    assert found.top5_agreement == pytest.approx(sum(shared) / len(shared))
    for value, model in ((found.perplexity, models[0]), (found.other_perplexity, models[1])):
        assert value == pytest.approx(measure_perplexity(model.llm, TEXT, length=64).perplexity, rel=1e-9)
    assert sum(one.n_tokens * one.mean_kl for one in found.segments) == pytest.approx(sum(kls), abs=1e-4)


def test_a_model_does_not_diverge_from_itself(models: list[Model]) -> None:
    found = measure_divergence(models[0].llm, models[0].llm, TEXT, length=64)
    assert found.mean_kl == found.kl_max == 0
    assert found.top1_agreement == found.top5_agreement == 1


def test_logits_of_minus_infinity_do_not_count() -> None:
    rows = torch.tensor([[0.0, 1.0, -math.inf]])
    found = compare_rows(rows, torch.tensor([[0.0, 1.0, 0.5]]), torch.tensor([1]))
    weight = 1 + math.e + math.exp(0.5)
    assert float(found.kl) == pytest.approx(math.log(weight / (1 + math.e)), abs=1e-6)


def test_the_error_of_a_mean_is_that_of_its_segments() -> None:
    values = [0.2, 0.5, 0.1, 0.4]
    expected = float(torch.tensor(values).std()) / 2
    assert mean_standard_error([(value, 10) for value in values]) == pytest.approx(expected, rel=1e-6)
    assert mean_standard_error([(0.2, 10)]) is None


def test_models_of_other_tokenizers_are_not_compared(models: list[Model], tmp_path: Path) -> None:
    make_model_dir(tmp_path / "other", vocab=330)
    with ExL2LLM(tmp_path / "other", cache_tokens=64) as other, pytest.raises(SettingsError, match="330"):
        measure_divergence(models[0].llm, other, TEXT)


def test_windows_longer_than_the_engine_takes_and_texts_without_tokens_are_refused(models: list[Model]) -> None:
    with pytest.raises(SettingsError, match="more than the 256"):
        measure_perplexity(models[0].llm, TEXT, length=300)
    with pytest.raises(SettingsError, match="no token to score"):
        measure_perplexity(models[0].llm, TEXT, limit=0)


# --- scoring single prompts ------------------------------------------------------------------------------------------


def test_prompt_logprobs_and_scores_are_those_of_transformers_cold_and_warm(models: list[Model]) -> None:
    model = models[0]
    ids = (model.llm.tokenizer.bos_token_id, *model.llm.tokenizer.encode(TEXT[1].text))
    rows = model.logprobs(ids)
    for _ in range(2):  # the second time everything is in the cache
        found = model.llm.prompt_logprobs(TEXT[1].text, top=3)
        assert [one.token_id for one in found] == list(ids)
        assert found[0].logprob is None
        assert found[0].top == ()
        for place in range(1, len(ids)):
            assert found[place].logprob == pytest.approx(float(rows[place - 1, ids[place]]), abs=1e-4)
            best = rows[place - 1].topk(3)
            assert [one.token_id for one in found[place].top] == best.indices.tolist()
            assert [one.logprob for one in found[place].top] == pytest.approx(best.values.tolist(), abs=1e-4)
        assert "".join(one.text for one in found[1:]) == TEXT[1].text
        for head in (1, 17, len(ids) - 1):
            scores = model.llm.score(ids[:head], ids[head:])
            assert scores == [one.logprob for one in found[head:]]
    model.llm.generate(list(ids[:40]))


def test_logits_are_handed_on_in_order_and_no_more_than_a_step_at_a_time(models: list[Model]) -> None:
    ids = parity.random_tokens(100, 3, 320)
    found: list[tuple[int, torch.Tensor]] = []
    models[0].llm.each_logits(ids, lambda first, rows: found.append((first, rows.clone())), first_row=30)
    assert [first for first, _ in found] == [
        30,
        *(30 + sum(len(r) for _, r in found[: n + 1]) for n in range(len(found) - 1)),
    ]
    assert max(len(rows) for _, rows in found) <= 48
    assert torch.equal(torch.cat([rows for _, rows in found]), models[0].llm.logits(ids)[30:])


def test_what_cannot_be_scored_is_refused_and_what_a_receiver_raises_comes_back(models: list[Model]) -> None:
    llm = models[0].llm
    with pytest.raises(RequestError, match="at least one token each"):
        llm.score([5], "")
    with pytest.raises(RequestError, match="from 0 to 100"):
        llm.prompt_logprobs("x", top=101)
    with pytest.raises(RequestError, match="first_row must be from 0 to 1"):
        llm.each_logits([5, 6], lambda *_: None, first_row=2)

    def fail(_first: int, _rows: torch.Tensor) -> None:
        raise ValueError("no more")

    with pytest.raises(EngineError, match="no more"):
        llm.each_logits([5, 6], fail)
    assert llm.active_requests == 0
