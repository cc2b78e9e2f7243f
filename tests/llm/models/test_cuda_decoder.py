"""The CUDA decoder, its kernels emulated, against transformers and against the decoder of the CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from exl2_rag.llm.checkpoint import Checkpoint
from exl2_rag.llm.config import ModelConfig
from exl2_rag.llm.layers.cuda_linear import PackedLinear, SeparateLinears
from exl2_rag.llm.models.cuda_decoder import CudaDecoder, load_cuda_model
from tests.cuda_emulation import EmulatedBackend
from tests.llm.models import parity
from tests.support.synthetic import make_model_dir

TOKENS = 37
# Of logits that spread over about ten: float16 keeps eleven bits of each activation.
FAST_TOLERANCE = 0.05

CASES: dict[str, dict[str, Any]] = {
    "llama": {"architecture": "LlamaForCausalLM"},
    "llama, biases": {"architecture": "LlamaForCausalLM", "attention_bias": True, "mlp_bias": True},
    "llama, padded columns": {"architecture": "LlamaForCausalLM", "head_dim": 80, "kv_heads": 1, "vocab": 250},
    "mistral, window": {"architecture": "MistralForCausalLM", "sliding_window": 16},
    "qwen2, padded columns": {"architecture": "Qwen2ForCausalLM", "hidden": 192, "kv_heads": 1, "vocab": 250},
}


def load(model_dir: Path, *, precision: str, arch: int = 80) -> CudaDecoder:
    config = ModelConfig.from_dir(model_dir)
    return load_cuda_model(
        model_dir,
        config,
        Checkpoint.open(model_dir),
        EmulatedBackend(arch),
        device=parity.CPU,
        max_seq_len=128,
        precision=precision,
    )


@pytest.mark.parametrize("arch", [75, 90])
@pytest.mark.parametrize("case", CASES)
def test_exact_logits_are_those_of_the_dequantised_model(case: str, arch: int, tmp_path: Path) -> None:
    model_dir = make_model_dir(tmp_path, quantised=True, **CASES[case])
    decoder = load(model_dir, precision="exact", arch=arch)
    tokens = parity.random_tokens(TOKENS, 5, decoder.config.vocab_size)
    theirs = parity.oracle_logits(parity.twin_of_quantised(model_dir), tokens)
    assert theirs.std() > 0.5
    for lengths in ([TOKENS], [31, *[1] * 6]):
        assert parity.max_error(parity.in_slices(decoder, tokens, lengths), theirs) <= parity.TOLERANCE


@pytest.mark.parametrize("case", CASES)
def test_fast_logits_are_close_to_those_of_the_dequantised_model(case: str, tmp_path: Path) -> None:
    model_dir = make_model_dir(tmp_path, quantised=True, **CASES[case])
    decoder = load(model_dir, precision="fast")
    tokens = parity.random_tokens(TOKENS, 5, decoder.config.vocab_size)
    theirs = parity.oracle_logits(parity.twin_of_quantised(model_dir), tokens)
    for lengths in ([TOKENS], [31, *[1] * 6]):
        assert parity.max_error(parity.in_slices(decoder, tokens, lengths), theirs) <= FAST_TOLERANCE


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_plain_models_run_too(dtype: torch.dtype, tied: bool, tmp_path: Path) -> None:
    make_model_dir(tmp_path, dtype=dtype, tie_word_embeddings=tied)
    tokens = parity.random_tokens(TOKENS, 5)
    theirs = parity.in_slices(parity.load(tmp_path), tokens, [TOKENS])
    for precision, limit in (("exact", parity.TOLERANCE), ("fast", FAST_TOLERANCE)):
        decoder = load(tmp_path, precision=precision)
        assert parity.max_error(parity.in_slices(decoder, tokens, [30, *[1] * 7]), theirs) <= limit


def test_a_tied_table_is_in_memory_once(tmp_path: Path) -> None:
    make_model_dir(tmp_path, dtype=torch.bfloat16, tie_word_embeddings=True)
    tied = load(tmp_path, precision="fast").weight_bytes
    make_model_dir(tmp_path / "untied", dtype=torch.bfloat16)
    untied = load(tmp_path / "untied", precision="fast")
    assert untied.weight_bytes - tied == untied.config.vocab_size * untied.config.hidden_size * 2


def test_matrices_of_one_input_are_multiplied_in_one_launch(tmp_path: Path) -> None:
    decoder = load(make_model_dir(tmp_path, quantised=True, layers=1), precision="fast")
    assert isinstance(decoder.layers[0].qkv, PackedLinear | SeparateLinears)
    assert isinstance(decoder.layers[0].gate_up, PackedLinear | SeparateLinears)
