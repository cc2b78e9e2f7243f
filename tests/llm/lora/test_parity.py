"""Logits with adapters equal those of transformers with the adapters merged into its weights."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from exl2_rag import ExL2LLM
from exl2_rag.llm.config import ModelConfig
from tests.llm.models import parity
from tests.support.lora import ATTENTION, EVERYTHING, Written, write_adapter
from tests.support.synthetic import make_model_dir

TOKENS = parity.random_tokens(41, 11)
MODELS = ("LlamaForCausalLM", "Qwen2ForCausalLM", "MistralForCausalLM")


def merged(oracle: Any, *adapters: tuple[Written, float]) -> Any:
    """The oracle with scale * B A added to its weights; embedding and head are made two matrices first."""
    model = copy.deepcopy(oracle)
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    with torch.no_grad():
        for adapter, scale in adapters:
            for key, delta in adapter.deltas.items():
                model.get_submodule(key).weight += scale * delta
    return model


@pytest.mark.parametrize("architecture", MODELS)
def test_an_adapter_gives_the_logits_of_the_merged_model(architecture: str, tmp_path: Path) -> None:
    oracle = parity.make_oracle(architecture, vocab_size=320, tie_word_embeddings=architecture == MODELS[0])
    parity.save_oracle(oracle, tmp_path / "model")
    with_tokenizer(tmp_path / "model")
    config = ModelConfig.from_dir(tmp_path / "model")
    full = write_adapter(
        tmp_path / "full",
        config,
        (*EVERYTHING, "embed_tokens", "lm_head"),
        ranks={"q_proj": 2, "down_proj": 7},
        alphas={"up_proj": 3.0},
    )
    rs = write_adapter(tmp_path / "rs", config, ATTENTION, rank=16, seed=1, use_rslora=True, dtype=torch.float16)
    plain = parity.oracle_logits(oracle, TOKENS)
    with ExL2LLM(tmp_path / "model", cache_tokens=512, cache_dtype="fp32") as llm:
        assert llm.load_lora(full.path).name == "full"
        llm.load_lora(rs.path, "other")
        for lora, adapters in (
            ("full", [(full, 1.0)]),
            (("full", -0.4), [(full, -0.4)]),
            (["full", ("other", 0.7)], [(full, 1.0), (rs, 0.7)]),
        ):
            theirs = parity.oracle_logits(merged(oracle, *adapters), TOKENS)
            assert (theirs - plain).abs().max() > 0.3, "too weak an adapter would hide mistakes"
            assert parity.max_error(llm.logits(TOKENS, lora=lora), theirs) <= parity.TOLERANCE
        assert parity.max_error(llm.logits(TOKENS), plain) <= parity.TOLERANCE
        assert torch.equal(llm.logits(TOKENS, lora=("full", 0)), llm.logits(TOKENS))


def with_tokenizer(model_dir: Path) -> None:
    from tests.support.byte_tokenizer import write_byte_tokenizer

    write_byte_tokenizer(model_dir)


@pytest.mark.parametrize("precision", ["exact", "fast"])
def test_an_adapter_of_an_exl2_model_gives_the_logits_of_the_dequantised_merged_model(
    precision: str, tmp_path: Path
) -> None:
    model_dir = make_model_dir(tmp_path / "model", quantised=True, head_dim=80, kv_heads=1)
    adapter = write_adapter(tmp_path / "a", ModelConfig.from_dir(model_dir), (*EVERYTHING, "lm_head"))
    theirs = parity.oracle_logits(merged(parity.twin_of_quantised(model_dir), (adapter, 0.5)), TOKENS)
    with ExL2LLM(model_dir, cache_tokens=512, cache_dtype="fp32", precision=precision) as llm:
        llm.load_lora(adapter.path)
        error = parity.max_error(llm.logits(TOKENS, lora=("a", 0.5)), theirs)
    # "fast" rounds activations to 15 bits: that is its own distance from the exact product, not the adapter's.
    assert error <= (parity.TOLERANCE if precision == "exact" else 2e-2)
