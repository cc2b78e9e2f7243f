"""The engine on a card: graphs, batches and prefix hits change nothing. Skipped where there is no card."""

from __future__ import annotations

import pytest
import torch

from benchmarks.gpu_model import Shape, SpeedModel
from exl2_rag.llm.cuda_graphs import DecodeGraphs
from exl2_rag.llm.engine import Engine
from exl2_rag.llm.kernels import cuda_runtime
from exl2_rag.llm.request import GenerationRequest, SamplingParams

TINY = Shape(hidden=256, intermediate=512, layers=2, heads=4, kv_heads=2, vocab=1000)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no card that torch can use"),
]


@pytest.fixture(scope="module")
def model() -> SpeedModel:
    device = torch.device("cuda", 0)
    return SpeedModel(TINY, 4.0, cuda_runtime.backend(device), device)


def graphs_of(engine: Engine) -> DecodeGraphs:
    graphs = engine._runner._recorded
    assert graphs is not None
    return graphs


def generate(engine: Engine, prompts: list[tuple[int, ...]], temperature: float) -> list[list[int]]:
    sampling = SamplingParams(max_tokens=24, temperature=temperature, top_p=0.95, seed=5, ignore_eos=True)
    sequences = [engine.prepare(GenerationRequest(prompt, sampling=sampling)) for prompt in prompts]
    for sequence in sequences:
        engine.add(sequence)
    while engine.has_work:
        for update in engine.step():
            assert update.error is None, update.error
    return [sequence.token_ids[sequence.n_prompt :] for sequence in sequences]


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_graphs_give_the_tokens_of_plain_launches(model, temperature):
    prompts = [model.prompt(length, seed=length) for length in (3, 40, 65)]
    with_graphs = model.engine(batch_size=4, max_seq_len=128)
    plain = model.engine(batch_size=4, max_seq_len=128)
    plain._runner._recorded = None
    expected = generate(plain, prompts, temperature)
    assert generate(with_graphs, prompts, temperature) == expected
    assert graphs_of(with_graphs).failure is None
    assert graphs_of(with_graphs).n_recorded > 0


def test_a_request_gives_the_same_tokens_alone_in_a_batch_and_after_a_prefix_hit(model):
    prompts = [model.prompt(length, seed=length) for length in (40, 40, 65, 9)]
    together = generate(model.engine(batch_size=4, max_seq_len=128), prompts, 0.0)
    engine = model.engine(batch_size=1, max_seq_len=128)
    for prompt, tokens in zip(prompts, together, strict=True):
        assert generate(engine, [prompt], 0.0) == [tokens]
