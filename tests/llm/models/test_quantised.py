"""Quantised models against transformers holding the same, dequantised weights: kernel and layout, not rounding."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from exl2_rag.llm.config import ModelConfig
from exl2_rag.llm.layers.linear import QuantisedLinear
from exl2_rag.llm.quantize.convert_rtn import convert_rtn
from tests.llm.models import parity
from tests.support.synthetic import make_model_dir

TOKENS = 37

CASES: dict[str, dict[str, Any]] = {
    "llama": {"architecture": "LlamaForCausalLM"},
    "llama, biases": {"architecture": "LlamaForCausalLM", "attention_bias": True, "mlp_bias": True},
    "llama, padded columns": {"architecture": "LlamaForCausalLM", "head_dim": 80, "kv_heads": 1, "vocab": 250},
    "mistral, window": {"architecture": "MistralForCausalLM", "sliding_window": 16},
    "qwen2": {"architecture": "Qwen2ForCausalLM"},
    "qwen2, padded columns": {"architecture": "Qwen2ForCausalLM", "hidden": 192, "kv_heads": 1, "vocab": 250},
}


@pytest.mark.parametrize("case", CASES)
def test_exl2_logits_equal_those_of_the_dequantised_model(case: str, tmp_path: Path) -> None:
    model_dir = make_model_dir(tmp_path, quantised=True, **CASES[case])
    decoder = parity.load(model_dir)
    assert isinstance(decoder.layers[1].mlp.up_proj.base, QuantisedLinear)
    tokens = parity.random_tokens(TOKENS, 5, decoder.config.vocab_size)
    theirs = parity.oracle_logits(parity.twin_of_quantised(model_dir), tokens)
    assert theirs.std() > 0.5
    for lengths in ([TOKENS], [7, 30], [31, *[1] * 6]):
        assert parity.max_error(parity.in_slices(decoder, tokens, lengths), theirs) <= parity.TOLERANCE


@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_a_converted_model_gives_the_logits_of_its_dequantised_weights(
    architecture: str, tied: bool, tmp_path: Path
) -> None:
    oracle = parity.make_oracle(architecture, tie_word_embeddings=tied)
    parity.save_oracle(oracle, tmp_path / "source", dtype=torch.float16)
    convert_rtn(tmp_path / "source", tmp_path / "exl2", bits=4.5)
    decoder = parity.load(tmp_path / "exl2")
    assert isinstance(decoder.head.base, QuantisedLinear), "a tied EXL2 model has a quantised head of its own"
    tokens = parity.random_tokens(TOKENS, 5)
    theirs = parity.oracle_logits(parity.twin_of_quantised(tmp_path / "exl2"), tokens)
    ours = parity.in_slices(decoder, tokens, [20, 17])
    assert parity.max_error(ours, theirs) <= parity.TOLERANCE
    assert parity.max_error(ours, parity.oracle_logits(oracle, tokens)) > parity.TOLERANCE


def _gptq_tensors(rows: int, columns: int, act_order: bool, generator: torch.Generator) -> dict[str, Tensor]:
    n_groups = rows // 32
    words = (2**31, generator)
    tensors = {
        "qweight": torch.randint(-words[0], words[0], (rows // 8, columns), generator=generator).to(torch.int32),
        "qzeros": torch.full((n_groups, columns // 8), 0x77777777, dtype=torch.int32),
        "scales": (torch.rand((n_groups, columns), generator=generator) * 0.02 + 0.02).half(),
        "bias": torch.zeros(columns, dtype=torch.float16),
    }
    if act_order:
        tensors["g_idx"] = (torch.randperm(rows, generator=generator) // 32).to(torch.int32)
    return tensors


def _to_gptq(model_dir: Path, *, act_order: bool, checkpoint_format: str) -> None:
    """Replace the matrices of the decoder's layers by random GPTQ ones, with the zero biases its writers leave."""
    path = model_dir / "model.safetensors"
    generator = torch.Generator().manual_seed(2)
    tensors: dict[str, Tensor] = {}
    for name, tensor in load_file(path).items():
        key = name.removesuffix(".weight")
        if name.endswith("_proj.weight"):
            parts = _gptq_tensors(tensor.shape[1], tensor.shape[0], act_order, generator)
            tensors |= {f"{key}.{part}": value for part, value in parts.items()}
        elif not name.endswith(".bias"):
            tensors[name] = tensor
    path.unlink()
    save_file(tensors, path)
    config_path = model_dir / "config.json"
    config = json.loads(config_path.read_text())
    config["quantization_config"] = {
        "quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": act_order, "sym": True,
        "checkpoint_format": checkpoint_format,
    }  # fmt: skip
    config_path.write_text(json.dumps(config))


@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "Qwen2ForCausalLM"])
@pytest.mark.parametrize("act_order", [False, True], ids=["plain", "act-order"])
@pytest.mark.parametrize("checkpoint_format", ["gptq", "gptq_v2"])
def test_gptq_logits_equal_those_of_the_dequantised_model(
    architecture: str, act_order: bool, checkpoint_format: str, tmp_path: Path
) -> None:
    model_dir = make_model_dir(tmp_path, architecture=architecture)
    _to_gptq(model_dir, act_order=act_order, checkpoint_format=checkpoint_format)
    decoder = parity.load(model_dir)
    tokens = parity.random_tokens(TOKENS, 5)
    theirs = parity.oracle_logits(parity.twin_of_quantised(model_dir, checkpoint_format), tokens)
    ours = parity.in_slices(decoder, tokens, [30, *[1] * 7])
    assert ModelConfig.from_dir(model_dir).gptq_format == checkpoint_format
    assert parity.max_error(ours, theirs) <= parity.TOLERANCE
