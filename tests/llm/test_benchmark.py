"""The benchmark counts what the engine really did, and what a token really reads."""

from __future__ import annotations

import pytest

from exl2_rag import ExL2LLM
from exl2_rag.errors import SettingsError
from exl2_rag.llm import benchmark as benchmark_module
from exl2_rag.llm.benchmark import EngineBenchmark, cache_tokens_for, model_bytes
from exl2_rag.llm.checkpoint import Checkpoint
from exl2_rag.llm.checkpoint.inspect import inspect_model
from tests.support.synthetic import make_model_dir


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return make_model_dir(tmp_path_factory.mktemp("model") / "tiny", quantised=True, max_position=256)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_a_run_accounts_for_every_token(model_dir, batch_size):
    with ExL2LLM(model_dir, cache_tokens=cache_tokens_for(33, 80, batch_size, 32), max_batch_size=batch_size) as llm:
        benchmark = EngineBenchmark(llm, prompt_tokens=33, new_tokens=80, batch_size=batch_size)
        runs = [benchmark.run() for _ in range(3)]
        report = llm.cache_report()
    assert report.prompt_tokens == 3 * batch_size * 33
    assert report.cached_tokens < 3 * batch_size * 3, "random prompts share next to nothing"
    for run in runs:
        assert run.prefill_tokens == batch_size * 33
        assert 0 < run.decode_tokens <= batch_size * 79
        assert run.prefill_tok_s == run.prefill_tokens / run.prefill_s
        assert run.decode_tok_s == run.decode_tokens / run.decode_s
        assert len(run.token_s) <= run.decode_tokens
        if batch_size == 1:
            assert sum(run.token_s) == pytest.approx(run.decode_s)


def test_only_the_time_when_all_sequences_decode_counts(model_dir, monkeypatch):
    arrivals = {1: [(1.0, 1), (2.0, 1), (3.0, 1), (4.0, 1)], 2: [(2.5, 2), (3.5, 1), (4.5, 1)]}
    order = iter(arrivals.values())
    monkeypatch.setattr(EngineBenchmark, "_arrivals", lambda *_: next(order))
    monkeypatch.setattr(benchmark_module.time, "perf_counter", lambda: 0.5)
    with ExL2LLM(model_dir, cache_tokens=256) as llm:
        run = EngineBenchmark(llm, prompt_tokens=4, new_tokens=4, batch_size=2).run()
    # All decode from 2.5 to 4.0; in it come two tokens of the first (3.0, 4.0) and one of the second (3.5).
    assert (run.prefill_s, run.decode_tokens, run.decode_s) == (2.0, 3, 1.5)
    assert sorted(run.token_s) == [1.0, 1.0]


def test_the_cache_for_a_batch_holds_it_and_a_page_more():
    assert cache_tokens_for(512, 64, 1, 32) == 576 + 32
    assert cache_tokens_for(33, 9, 3, 32) == 3 * 64 + 32


def test_a_token_reads_all_matrices_the_head_and_one_row(model_dir):
    checkpoint = Checkpoint.open(model_dir)
    embedding = checkpoint.total_bytes(["model.embed_tokens.weight"])
    norms = checkpoint.total_bytes([name for name in checkpoint.names() if "norm" in name])
    found = model_bytes(model_dir)
    assert found.file_bytes == checkpoint.total_bytes()
    assert found.weight_bytes_per_token == checkpoint.total_bytes() - embedding - norms + 128 * 2
    assert found.bits_per_weight == pytest.approx(inspect_model(model_dir).bits_per_weight)


def test_a_tied_dense_head_is_read_whole(tmp_path):
    model_dir = make_model_dir(tmp_path / "dense", tie_word_embeddings=True)
    checkpoint = Checkpoint.open(model_dir)
    norms = checkpoint.total_bytes([name for name in checkpoint.names() if "norm" in name])
    found = model_bytes(model_dir)
    assert found.weight_bytes_per_token == checkpoint.total_bytes() - norms + 128 * 4
    assert found.bits_per_weight == 32


@pytest.mark.parametrize(
    ("numbers", "message"),
    [({"prompt_tokens": 0}, "prompt_tokens"), ({"new_tokens": 1}, "new_tokens"), ({"batch_size": 0}, "batch_size")],
)
def test_numbers_out_of_range_are_refused(model_dir, numbers, message):
    with ExL2LLM(model_dir, cache_tokens=256) as llm, pytest.raises(SettingsError, match=message):
        EngineBenchmark(llm, **({"prompt_tokens": 4, "new_tokens": 4} | numbers))
