"""Which steps are recorded, and that replays compute what the step would have. Recording itself needs a card."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
import torch

from exl2_rag.llm import model_runner
from exl2_rag.llm.checkpoint import Checkpoint
from exl2_rag.llm.config import ModelConfig
from exl2_rag.llm.cuda_graphs import BATCH_BUCKETS, DecodeGraphs
from exl2_rag.llm.engine import Engine
from exl2_rag.llm.engine_config import EngineConfig, EngineOptions, ModelShape, resolve
from exl2_rag.llm.engine_loader import TokenizerText, make_cache
from exl2_rag.llm.model_runner import ModelRunner
from exl2_rag.llm.models.cuda_decoder import load_cuda_model
from exl2_rag.llm.request import GenerationRequest, SamplingParams
from exl2_rag.llm.tokenizer import Tokenizer
from tests.cuda_emulation import EmulatedBackend
from tests.llm.test_step_arrays import arrays
from tests.support.synthetic import make_model_dir

CPU = torch.device("cpu")


class Replayer:
    """Replays by running the step again into the same tensor, as a graph does."""

    def __init__(self) -> None:
        self.n_replays = 0

    def record(self, step):
        result = step().clone()

        def replay() -> None:
            self.n_replays += 1
            result.copy_(step())

        return replay, result


class Refuser:
    def record(self, step):
        raise RuntimeError("operation not permitted when stream is capturing\nand more")


def echo(inputs) -> torch.Tensor:
    """Logits that show every input of the row."""
    return torch.stack(
        [
            inputs.token_ids.double(),
            inputs.positions.double(),
            inputs.slot_mapping.double(),
            inputs.context_lens.double(),
            inputs.page_table[:, 0].double(),
        ],
        dim=1,
    )


def decode_step(batch: int, n_pages: int, seed: int):
    rng = np.random.default_rng(seed)
    return arrays([(1, int(rng.integers(1, 99))) for _ in range(batch)], n_pages=n_pages, n_rows=None)


def test_replays_see_the_inputs_of_their_own_step():
    recorder = Replayer()
    graphs = DecodeGraphs(echo, CPU, max_pages=64, recorder=recorder)
    for seed, (batch, n_pages) in enumerate([(3, 2), (4, 9), (1, 2), (3, 16), (2, 40)]):
        step = decode_step(batch, n_pages, seed)
        logits = graphs.run(step)
        expected = np.stack(
            [step.token_ids, step.positions, step.slot_mapping, step.context_lens, step.page_table[:, 0]], axis=1
        )
        assert np.array_equal(logits.numpy(), expected)
    # (4, 16), (1, 16) and (2, 64): the buckets of the five.
    assert graphs.n_recorded == 3
    assert recorder.n_replays == 5


def test_steps_that_no_graph_fits_are_left_to_the_caller():
    graphs = DecodeGraphs(echo, CPU, max_pages=64, recorder=Replayer())
    assert graphs.run(arrays([(2, 5)], n_pages=1, n_rows=1)) is None
    assert graphs.run(decode_step(BATCH_BUCKETS[-1] + 1, 1, 0)) is None
    assert graphs.run(decode_step(BATCH_BUCKETS[-1], 1, 0)) is not None


def test_the_page_table_is_no_wider_than_the_longest_sequence_needs():
    widths = []
    graphs = DecodeGraphs(
        lambda inputs: widths.append(inputs.page_table.shape[1]) or echo(inputs), CPU, max_pages=40, recorder=Replayer()
    )
    for n_pages in (1, 16, 17, 40):
        graphs.run(decode_step(1, n_pages, n_pages))
    assert set(widths) == {16, 32, 40}


def test_where_recording_fails_steps_go_on_without_and_it_is_said_once(caplog):
    graphs = DecodeGraphs(echo, CPU, max_pages=64, recorder=Refuser())
    with caplog.at_level(logging.WARNING):
        assert graphs.run(decode_step(1, 1, 0)) is None
        assert graphs.run(decode_step(1, 1, 1)) is None
    assert graphs.failure == "operation not permitted when stream is capturing"
    assert [record.message.count("operation not permitted") for record in caplog.records] == [1]


def engine_of(model_dir: Path, cache_dtype: str, recorder: Replayer | None, *, shares_prefixes: bool = True) -> Engine:
    """An engine as the loader makes it for a card, on the emulation."""
    config = ModelConfig.from_dir(model_dir)
    shape = ModelShape(config.max_seq_len, 2 * config.n_layers * config.n_kv_heads * config.head_dim, False)
    options = EngineOptions(device="cuda", cache_tokens=512, cache_dtype=cache_dtype, page_size=16)
    on_card = resolve(options, shape)
    settings = EngineConfig(
        max_seq_len=on_card.max_seq_len,
        n_pages=on_card.n_pages,
        page_size=on_card.page_size,
        max_batch_size=on_card.max_batch_size,
        cache_dtype=on_card.cache_dtype,
        max_batched_tokens=64,
        prefill_beside_decode=24,
    )
    model = load_cuda_model(
        model_dir, config, Checkpoint.open(model_dir), EmulatedBackend(80), device=CPU, max_seq_len=512
    )
    cache = make_cache(config, settings)
    graphs = None
    if recorder is not None:
        graphs = DecodeGraphs(lambda inputs: model.forward(inputs, cache), CPU, max_pages=32, recorder=recorder)
    tokenizer = Tokenizer.from_dir(model_dir)
    runner = ModelRunner(model, cache, CPU, graphs, shares_prefixes=shares_prefixes)
    return Engine(runner, settings, TokenizerText(tokenizer, config.vocab_size), vocab_size=config.vocab_size)


def generate(engine: Engine, prompts: list[tuple[int, ...]]) -> list[list[int]]:
    sampling = SamplingParams(max_tokens=6, temperature=0.7, seed=3, ignore_eos=True)
    sequences = [engine.prepare(GenerationRequest(prompt, sampling=sampling)) for prompt in prompts]
    for sequence in sequences:
        engine.add(sequence)
    while engine.has_work:
        for update in engine.step():
            assert update.error is None, update.error
    engine.check_integrity()
    return [sequence.token_ids[sequence.n_prompt :] for sequence in sequences]


@pytest.mark.parametrize("cache_dtype", ["fp16", "q8", "q4"])
def test_an_engine_gives_the_same_tokens_with_graphs_and_without_alone_and_in_a_batch(cache_dtype, tmp_path):
    model_dir = make_model_dir(tmp_path, quantised=True)
    prompts = [tuple(range(5, 45)), tuple(range(5, 45)), (7, 8, 9), tuple(range(5, 30))]
    recorder = Replayer()
    with_graphs = generate(engine_of(model_dir, cache_dtype, recorder), prompts)
    assert recorder.n_replays >= 5
    assert with_graphs == generate(engine_of(model_dir, cache_dtype, None), prompts)
    assert with_graphs[2:3] == generate(engine_of(model_dir, cache_dtype, None), prompts[2:3])


def test_reading_shared_pages_once_changes_no_token(tmp_path, monkeypatch):
    monkeypatch.setattr(model_runner, "MIN_SHARED_TOKENS", 16)
    model_dir = make_model_dir(tmp_path, quantised=True)
    document, other = tuple(range(5, 45)), tuple(range(60, 95))
    prompts = [(*document, 1), (*other, 2), (*document, 3), (7, 8), (*other, 4)]
    recorder, groups = Replayer(), []
    grouped = model_runner.group_by_prefix
    monkeypatch.setattr(
        model_runner, "group_by_prefix", lambda *args, **options: groups.append(grouped(*args, **options)) or groups[-1]
    )
    shared = generate(engine_of(model_dir, "fp16", recorder), prompts)
    assert max(sum(pages > 0 for pages in one.prefix_pages) for one in groups) == 2
    assert shared == generate(engine_of(model_dir, "fp16", None, shares_prefixes=False), prompts)
