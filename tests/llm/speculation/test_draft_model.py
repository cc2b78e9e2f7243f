from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch

from exl2_rag import Choice, ExL2LLM, JsonSchema, SamplingParams
from exl2_rag.errors import ModelError, SettingsError
from exl2_rag.llm.engine import Engine
from exl2_rag.llm.engine_config import EngineConfig
from exl2_rag.llm.kv_cache import KVCache
from exl2_rag.llm.model_runner import ModelRunner
from exl2_rag.llm.page_table_check import check_integrity
from exl2_rag.llm.speculation.draft_model import FIRST_RETRY_TOKENS, DraftModel
from exl2_rag.llm.speculation.speculator import Speculator
from tests.llm.speculation.drafts import FreeRows
from tests.llm.speculation.test_speculation import Checked
from tests.llm.test_engine import OneOf, ask, greedy, prompt, run
from tests.support.synthetic import make_model_dir
from tests.support.toy_model import VOCAB, ToyModel, expected_tokens, toy_engine


class Muddled(ToyModel):
    """Says what the toy model says, but every so often something else."""

    def __init__(self, every: int) -> None:
        super().__init__()
        self.every = every

    def _row(self, inputs, cache, row):  # type: ignore[no-untyped-def]
        logits = super()._row(inputs, cache, row)
        if self.every and int(logits.argmax()) % self.every == 0:
            return logits.flip(0)
        return logits


def draft_model(every: int = 4, **sizes: int) -> tuple[DraftModel, ToyModel]:
    config = EngineConfig(
        **{"max_seq_len": 256, "n_pages": 64, "page_size": 4, "max_batch_size": 8, "max_batched_tokens": 24, **sizes}
    )
    shape = {"n_layers": 1, "n_kv_heads": 1, "head_dim": 1, "dtype": torch.float32, "device": torch.device("cpu")}
    cache = KVCache(n_pages=config.n_pages, page_size=config.page_size, **shape)  # type: ignore[arg-type]
    model = Muddled(every)
    return DraftModel(ModelRunner(model, cache, torch.device("cpu")), config, VOCAB), model


def drafting(
    every: int = 4, draft_sizes: dict[str, int] | None = None, price: float = 0.0, **sizes: int
) -> tuple[Engine, DraftModel]:
    proposer, _ = draft_model(every, **(draft_sizes or {}))
    return toy_engine(speculator=Speculator(proposer, costs=FreeRows(price)), **sizes), proposer


@pytest.mark.parametrize("every", [0, 4, 1])
def test_text_is_that_of_the_large_model_however_good_the_small_one_is(every: int) -> None:
    engine, proposer = drafting(every, price=0.2)
    outcome = run(engine, ask(engine, prompt(3, 60), greedy(80)))[0]
    assert outcome.token_ids == expected_tokens(prompt(3, 60), 80)
    counts = outcome.last.speculation
    assert counts is not None
    if every == 0:
        assert counts.acceptance == 1.0
        assert counts.accepted_tokens > 60
    elif every == 4:
        assert 15 < counts.accepted_tokens < 70
    else:
        assert counts.accepted_tokens == 0
        assert counts.steps < 80 / 8  # soon left, and tried again now and then
        assert counts.steps >= 2
    check_integrity(proposer._table)


@pytest.mark.parametrize("seed", range(3))
def test_a_batch_with_preemption_and_shared_prefixes_says_the_same(seed: int) -> None:
    rng = random.Random(seed)
    engine, proposer = drafting(4, {"n_pages": 20}, n_pages=16, max_seq_len=56)
    prompts = [[rng.choice((1, 2)) for _ in range(rng.randrange(1, 25))] for _ in range(10)]
    lengths = [rng.randrange(3, 25) for _ in prompts]
    outcomes = run(engine, *[ask(engine, one, greedy(n)) for one, n in zip(prompts, lengths, strict=True)])
    assert engine.report().preemptions > 0
    assert engine.report().accepted_draft_tokens > 10
    for one, n, outcome in zip(prompts, lengths, outcomes, strict=True):
        assert outcome.token_ids == expected_tokens(one, n)
    check_integrity(proposer._table)
    proposer.chances([], [])
    assert proposer._table.counts().running == 0


def test_what_came_true_is_not_computed_twice() -> None:
    proposer, model = draft_model(0)
    engine = toy_engine(speculator=Speculator(proposer, costs=FreeRows()))
    run(engine, ask(engine, prompt(3, 20), greedy(50)))
    counts = engine.report()
    # A token drafted last is not computed by the small model until the next draft begins.
    assert model.n_computed <= 20 + 50
    assert counts.accepted_draft_tokens > 35


def test_sampled_tokens_are_those_without_drafts_and_the_same_draw_makes_drafts_right() -> None:
    for seed in range(3):
        how = SamplingParams(max_tokens=40, temperature=1.0, seed=seed, ignore_eos=True)
        plain = toy_engine()
        expected = run(plain, ask(plain, prompt(5, 9), how))[0].token_ids
        engine, _ = drafting(0)
        outcome = run(engine, ask(engine, prompt(5, 9), how))[0]
        assert outcome.token_ids == expected
        assert outcome.last.speculation is not None
        assert outcome.last.speculation.acceptance == 1.0


def test_a_sequence_that_goes_back_takes_the_small_model_with_it() -> None:
    plain = toy_engine()
    banned = ("c", "x", "k", "ab", "[")
    expected = run(plain, ask(plain, prompt(3, 20), greedy(60, banned_strings=banned)))[0]
    engine, proposer = drafting(0)
    sequence = ask(engine, prompt(3, 20), greedy(60, banned_strings=banned))
    outcome = run(engine, sequence)[0]
    assert outcome.token_ids == expected.token_ids
    assert sequence.n_bans > 0
    assert sequence.speculation.accepted_tokens > 20
    check_integrity(proposer._table)


def test_drafts_keep_to_the_constraint() -> None:
    options = [[5, 6, 7, 8, 9, 10, 11, 12], [5, 6, 9, 9, 9, 9, 1, 2], [5, 6, 7, 1, 9, 10, 3, 3], [5, 6, 7, 8, 2, 4]]
    plain = toy_engine()
    expected = run(plain, ask(plain, [1, 2], greedy(40), OneOf(*options)))[0]
    engine, _ = drafting(0)
    outcome = run(engine, ask(engine, [1, 2], greedy(40), Checked(*options)))[0]
    assert outcome.token_ids == expected.token_ids


def test_a_small_model_of_shorter_context_stops_drafting_in_time() -> None:
    engine, _ = drafting(0, {"max_seq_len": 40})
    outcome = run(engine, ask(engine, prompt(3, 20), greedy(60)))[0]
    assert outcome.token_ids == expected_tokens(prompt(3, 20), 60)
    assert outcome.last.speculation is not None
    assert 10 < outcome.last.speculation.accepted_tokens < 25


def test_a_cache_too_small_for_all_only_means_fewer_drafts() -> None:
    engine, proposer = drafting(0, {"n_pages": 9})
    outcomes = run(engine, *[ask(engine, prompt(first, 20), greedy(30)) for first in range(1, 5)])
    for first, outcome in enumerate(outcomes, start=1):
        assert outcome.token_ids == expected_tokens(prompt(first, 20), 30)
    check_integrity(proposer._table)


def test_a_failing_small_model_is_tried_again_less_and_less_often() -> None:
    engine, _ = drafting(1, price=0.2)
    sequence = ask(engine, prompt(3, 4), greedy(200))
    run(engine, sequence)
    assert 3 <= sequence.speculation.steps <= 4 + 200 / FIRST_RETRY_TOKENS


# --- from model directories ------------------------------------------------------------------------------------------


def test_a_model_drafts_for_another_of_the_same_vocabulary(tmp_path: Path) -> None:
    large = make_model_dir(tmp_path / "large", quantised=True)
    small = make_model_dir(tmp_path / "small", quantised=True, layers=1, seed=3)
    how = SamplingParams(max_tokens=30, temperature=0.5, seed=1, ignore_eos=True)
    schema = JsonSchema({"type": "array", "items": {"type": "integer"}, "minItems": 2, "maxItems": 9})
    with (
        ExL2LLM(large) as plain,
        ExL2LLM(large, draft_model=small) as other,
        ExL2LLM(large, draft_model=large) as itself,
    ):
        expected = plain.generate(["one", "two two"], how)
        for llm in (other, itself):
            results = llm.generate(["one", "two two"], how)
            assert [one.token_ids for one in results] == [one.token_ids for one in expected]
        speculation = results[0].speculation
        assert speculation is not None
        assert (
            speculation.acceptance > 0.9
        )  # the model itself guesses right; the first draft follows a few tokens later
        assert itself.cache_report().accepted_draft_tokens > 0
        constrained = [one.generate("x", how, constraint=schema).text for one in (plain, other, itself)]
        assert len(set(constrained)) == 1
        assert itself.generate("x", how, constraint=Choice(["abc", "abd"])).text in ("abc", "abd")


def test_another_tokenizer_is_refused_by_the_first_token_that_differs(tmp_path: Path) -> None:
    large, small = make_model_dir(tmp_path / "large"), make_model_dir(tmp_path / "small")
    path = small / "tokenizer.json"
    definition = json.loads(path.read_text())
    vocab = definition["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    path.write_text(json.dumps(definition))
    with pytest.raises(SettingsError, match=r"same tokenizer as the model: token 97 is b'a' there and b'b' in .*small"):
        ExL2LLM(large, draft_model=small)


def test_a_draft_model_that_is_none_is_refused(tmp_path: Path) -> None:
    large = make_model_dir(tmp_path / "large")
    with pytest.raises(SettingsError, match="'prompt-lookup' or the directory of a model"):
        ExL2LLM(large, draft_model=tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match=r"draft_model .*empty"):
        ExL2LLM(large, draft_model=tmp_path / "empty")
