"""Drafts leave the distribution of sampled tokens as it is, on real kernels the very tokens."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from exl2_rag import ExL2LLM, JsonSchema, SamplingParams
from exl2_rag.llm.constraint import Constraint
from exl2_rag.llm.sequence import Sequence
from exl2_rag.llm.speculation.speculator import Speculator
from tests.llm.speculation.drafts import FreeRows, Guesses
from tests.llm.test_engine import ask
from tests.support.synthetic import make_model_dir
from tests.support.toy_model import ToyModel, toy_engine, toy_logits

N_DRAWS = 2400


def test_sampled_tokens_have_the_distribution_of_the_model() -> None:
    how = {"max_tokens": 3, "temperature": 1.0, "ignore_eos": True}
    drafts = Guesses(lambda sequence, length: [(sequence.token_ids[-1] * 7 + n) % 97 for n in range(length)], wrong=0.1)
    # A draft that is taken on chance alone would be seen: it proposes the likeliest token half of the time.
    likeliest = Guesses(
        lambda sequence, length: [int(toy_logits(sequence.token_ids[-1:]).argmax())][:length], wrong=0.0
    )
    for proposer in (drafts, likeliest):
        engine = toy_engine(ToyModel(context=1), speculator=Speculator(proposer, costs=FreeRows()), n_pages=200)
        seen: Counter[int] = Counter()
        for first_seed in range(0, N_DRAWS, 8):
            sequences = [ask(engine, [5, 9], SamplingParams(seed=first_seed + n, **how)) for n in range(8)]
            while engine.has_work:
                engine.step()
            seen.update(sequence.token_ids[3] for sequence in sequences)
        assert engine.report().draft_tokens > N_DRAWS / 4
        first = toy_logits([9]).double().softmax(-1)
        second = sum(float(share) * toy_logits([n]).double().softmax(-1) for n, share in enumerate(first))
        assert isinstance(second, torch.Tensor)
        assert abs(excess(seen, second)) < 4
        # The check can tell: the distribution of the first token is another one.
        assert excess(seen, first) > 10


def excess(seen: Counter[int], shares: torch.Tensor) -> float:
    """By how many standard deviations the chi-square statistic is above what chance gives."""
    n_seen = seen.total()
    rare_seen = rare_expected = statistic = 0.0
    n_classes = 0
    for token_id, share in enumerate(shares.tolist()):
        expected = share * n_seen
        if expected < 8:
            rare_seen, rare_expected = rare_seen + seen[token_id], rare_expected + expected
            continue
        statistic += (seen[token_id] - expected) ** 2 / expected
        n_classes += 1
    if rare_expected > 0:
        statistic += (rare_seen - rare_expected) ** 2 / rare_expected
        n_classes += 1
    return (statistic - (n_classes - 1)) / (2 * (n_classes - 1)) ** 0.5


class Recital:
    """Guesses what was said before, with mistakes."""

    def __init__(self) -> None:
        self.texts: list[list[int]] = []

    def __call__(self, sequence: Sequence, length: int) -> list[int]:
        tokens = sequence.token_ids
        found = next((one for one in self.texts if one[: len(tokens)] == tokens), [])
        return found[len(tokens) : len(tokens) + length]


class Engines:
    """An engine without and one with drafts of the same model."""

    def __init__(self, plain: ExL2LLM, drafting: ExL2LLM) -> None:
        self.plain, self.drafting = plain, drafting
        self.recital = Recital()
        speculator = drafting._engine._speculator
        assert speculator is not None
        speculator._costs = FreeRows()
        speculator._proposer = Guesses(self.recital, wrong=0.1)

    def compare(self, prompts: list[str], how: SamplingParams, constraint: Constraint | None = None) -> int:
        """Run both, see that they say the same; return how many draft tokens were right."""
        expected = self.plain.generate(prompts, how, constraint=constraint)
        for prompt, one in zip(prompts, expected, strict=True):
            self.recital.texts.append([*self.plain.tokenizer.encode(prompt, add_bos=True), *one.token_ids])
        results = self.drafting.generate(prompts, how, constraint=constraint)
        assert [one.token_ids for one in results] == [one.token_ids for one in expected]
        assert [(one.text, one.finish_reason) for one in results] == [(one.text, one.finish_reason) for one in expected]
        return sum(one.speculation.accepted_tokens for one in results if one.speculation is not None)


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engines]:
    model_dir: Path = make_model_dir(tmp_path_factory.mktemp("model"), quantised=True)
    with ExL2LLM(model_dir) as plain, ExL2LLM(model_dir, draft_model="prompt-lookup") as drafting:
        yield Engines(plain, drafting)


PROMPTS = ["abcabcabcabcab", "one two one two one", "xyzxyzx", "the cat sat on the mat, the cat sat"]


@pytest.mark.parametrize("prompts", [PROMPTS[:1], PROMPTS])
def test_greedy_text_is_the_same_to_the_bit(engines: Engines, prompts: list[str]) -> None:
    how = SamplingParams(max_tokens=120, temperature=0, ignore_eos=True)
    assert engines.compare(prompts, how) > 20
    # What was computed as a part of drafts is what a fresh computation gives.
    text = engines.recital.texts[-1]
    again = engines.drafting.generate(text, how)
    assert again.usage.cached_tokens > 100
    assert again.token_ids == engines.plain.generate(text, how).token_ids


@pytest.mark.parametrize("temperature", [0.3, 1.0])
def test_sampled_text_is_the_same_with_a_seed(engines: Engines, temperature: float) -> None:
    for seed in range(3):
        how = SamplingParams(max_tokens=60, temperature=temperature, top_k=4, seed=seed, ignore_eos=True)
        assert engines.compare(PROMPTS, how) > 20


def test_constrained_text_is_the_same_and_obeys(engines: Engines) -> None:
    schema = JsonSchema({"type": "array", "items": {"enum": ["abcabc", "abcabd", "xyz"]}, "minItems": 3, "maxItems": 6})
    for seed in range(4):
        engines.compare(PROMPTS, SamplingParams(max_tokens=150, temperature=0.8, seed=seed), schema)
    schema = JsonSchema({"type": "array", "items": {"type": "string"}, "minItems": 3})
    assert engines.compare(PROMPTS, SamplingParams(max_tokens=60, temperature=0.8, seed=1), schema) > 20
