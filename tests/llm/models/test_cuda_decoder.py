"""The CUDA decoder, its kernels emulated, against transformers and against the decoder of the CPU."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from exl2_rag.llm.checkpoint import Checkpoint
from exl2_rag.llm.config import ModelConfig
from exl2_rag.llm.forward_inputs import ForwardInputs, HostLengths
from exl2_rag.llm.kernels import cuda_prefill
from exl2_rag.llm.kv_cache import KVCache
from exl2_rag.llm.layers.cuda_linear import PackedLinear, SeparateLinears
from exl2_rag.llm.models.cuda_decoder import CudaDecoder, load_cuda_model
from tests.cuda_emulation import EmulatedBackend
from tests.llm.models import parity
from tests.llm.models.parity import Slice
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


def load(model_dir: Path, *, precision: str, arch: int = 80, deterministic: bool = False) -> CudaDecoder:
    config = ModelConfig.from_dir(model_dir)
    return load_cuda_model(
        model_dir,
        config,
        Checkpoint.open(model_dir),
        EmulatedBackend(arch),
        device=parity.CPU,
        max_seq_len=128,
        precision=precision,
        deterministic=deterministic,
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


def test_long_slices_go_through_library_attention_and_give_the_same(tmp_path: Path, monkeypatch) -> None:
    decoder = load(make_model_dir(tmp_path, quantised=True), precision="fast")
    monkeypatch.setattr(cuda_prefill, "MIN_ROWS", 32)
    tokens = torch.tensor(parity.random_tokens(TOKENS, 5, decoder.config.vocab_size))
    runners = [parity.Runner(decoder, dtype=torch.float16) for _ in range(2)]
    pages = runners[0].page_table[0]
    plain = ForwardInputs.single(tokens, start=0, pages=pages, page_size=parity.PAGE_SIZE)
    known = dataclasses.replace(plain, lengths=HostLengths((0, TOKENS), (TOKENS,)))
    logits = [decoder.forward(inputs, one.cache) for inputs, one in zip((plain, known), runners, strict=True)]
    assert 0 < parity.max_error(logits[0], logits[1]) <= FAST_TOLERANCE


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


class WithLengths:
    """A decoder that is told the lengths of its batch, as the engine tells it."""

    def __init__(self, decoder: CudaDecoder) -> None:
        self.config, self.max_seq_len, self._decoder = decoder.config, decoder.max_seq_len, decoder

    def forward(self, inputs: ForwardInputs, cache: KVCache) -> Tensor:
        lengths = HostLengths(tuple(inputs.query_starts.tolist()), tuple(inputs.context_lens.tolist()))
        return self._decoder.forward(dataclasses.replace(inputs, lengths=lengths), cache)


def rows_of(decoder: CudaDecoder, tokens: list[int], lengths: list[int]) -> Tensor:
    """Logits of a sequence in slices, each together with another sequence, on pages that the library could read."""
    runner = parity.Runner(WithLengths(decoder), n_sequences=2, dtype=decoder.dtype)
    parts, start = [], 0
    for length in lengths:
        other = Slice(1, 0, tokens[: 1 + start % 5])
        rows = runner.step([other, Slice(0, start, tokens[start : start + length])])
        parts.append(rows[len(other.token_ids) :])
        start += length
    return torch.cat(parts)


@pytest.mark.parametrize("quantised", [True, False], ids=["exl2", "plain"])
@pytest.mark.parametrize("precision", ["exact", "fast"])
def test_deterministic_rows_depend_neither_on_slices_nor_on_the_batch(
    precision: str, quantised: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda_prefill, "MIN_ROWS", 8)
    model_dir = make_model_dir(tmp_path, quantised=quantised, dtype=torch.float16, intermediate=128, layers=1, vocab=64)
    tokens = parity.random_tokens(70, 5, 64)  # more than any of our kernels takes at once
    lengths = [33, 5, 17, *[1] * 15]
    decoder = load(model_dir, precision=precision, deterministic=True)
    assert torch.equal(rows_of(decoder, tokens, lengths), rows_of(decoder, tokens, [70]))
    usual = load(model_dir, precision=precision)
    assert not torch.equal(rows_of(usual, tokens, lengths), rows_of(usual, tokens, [70])), "this test sees nothing"
