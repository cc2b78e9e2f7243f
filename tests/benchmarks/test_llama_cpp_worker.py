"""The peer's models have the types and sizes that llama.cpp's quantiser would give them."""

from __future__ import annotations

import importlib.util
from dataclasses import asdict
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from exl2_rag.llm.quantize.synthetic import SHAPES

PATH = Path(__file__).parents[2] / "benchmarks" / "peers" / "llama_cpp_worker.py"
SHAPE = asdict(SHAPES["llama-1.1b"])


@pytest.fixture(scope="module")
def worker() -> ModuleType:
    spec = importlib.util.spec_from_file_location("llama_cpp_worker", PATH)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_sensitive_matrices_of_some_layers_have_six_bits(worker):
    wide = [layer for layer in range(22) if worker.type_of("Q4_K_M", "ffn_down", layer, SHAPE) == "Q6_K"]
    assert wide == [0, 1, 4, 7, 10, 13, 16, 19, 20, 21]
    assert wide == [layer for layer in range(22) if worker.type_of("Q4_K_M", "attn_v", layer, SHAPE) == "Q6_K"]
    assert worker.type_of("Q4_K_M", "ffn_up", 0, SHAPE) == "Q4_K"


def test_the_two_bit_mix_keeps_more_where_it_matters(worker):
    kinds = {role: worker.type_of("Q2_K", role, 5, SHAPE) for role in ("attn_q", "attn_v", "attn_output", "ffn_down")}
    assert kinds == {"attn_q": "Q2_K", "attn_v": "Q4_K", "attn_output": "Q3_K", "ffn_down": "Q3_K"}
    few_groups = {**SHAPE, "kv_heads": 32}
    assert worker.type_of("Q2_K", "attn_v", 5, few_groups) == "Q3_K"


# What `llama_model_size` says of these models: the layout on disk is what llama.cpp takes it for.
@pytest.mark.parametrize(("quant", "n_bytes"), [("Q4_K_M", 667_078_656), ("Q2_K", 431_394_816), ("Q4_0", 635_990_016)])
def test_a_model_is_as_large_as_llama_cpp_says(worker, quant, n_bytes):
    found = 4 * SHAPE["hidden"] * (2 * SHAPE["layers"] + 1)
    for _, role, layer, rows, columns in worker.matrices(SHAPE):
        per_block, block_bytes = worker.BLOCK[worker.type_of(quant, role, layer, SHAPE)]
        found += rows * columns // per_block * block_bytes
    assert found == n_bytes


@pytest.mark.parametrize("kind", ["Q4_0", "Q2_K", "Q3_K", "Q4_K", "Q6_K"])
def test_blocks_are_random_bits_under_finite_scales(worker, kind):
    per_block, block_bytes = worker.BLOCK[kind]
    blocks = worker.random_blocks(np.random.default_rng(0), kind, 8, 4 * per_block, std=0.02)
    assert blocks.shape == (8, 4 * block_bytes)
    for offset, value in worker.SCALES[kind]:
        scales = blocks.reshape(-1, block_bytes)[:, offset : offset + 2].copy().view(np.float16)
        assert np.abs(scales.astype(np.float64)) == pytest.approx(0.02 * value, rel=0.01)
