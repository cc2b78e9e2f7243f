"""Folders that PEFT itself writes give the logits that PEFT itself computes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from exl2_rag import ExL2LLM
from tests.llm.models import parity
from tests.support.byte_tokenizer import write_byte_tokenizer

peft: Any = pytest.importorskip("peft")
# What the two libraries have to say to each other.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")

EVERYTHING = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CASES: dict[str, dict[str, Any]] = {
    "plain": {"r": 8, "lora_alpha": 16, "target_modules": "all-linear"},
    "rank-stabilised, patterns": {
        "r": 4,
        "lora_alpha": 6,
        "use_rslora": True,
        "target_modules": EVERYTHING,
        "rank_pattern": {"q_proj": 2, r".*layers\.1\.mlp\.up_proj": 7},
        "alpha_pattern": {"down_proj": 11, "self_attn.v_proj": 3},
    },
    "embedding and head": {"r": 4, "lora_alpha": 4, "target_modules": ["embed_tokens", "lm_head", "q_proj"]},
    "bias of the second matrix": {"r": 4, "lora_bias": True, "target_modules": ["q_proj", "down_proj"]},
    "one layer": {"r": 3, "target_modules": EVERYTHING, "layers_to_transform": [1], "init_lora_weights": "gaussian"},
}


def test_adapters_that_peft_saved_give_its_logits(tmp_path: Path) -> None:
    oracle = parity.make_oracle("LlamaForCausalLM", vocab_size=320)
    parity.save_oracle(oracle, tmp_path / "model")
    write_byte_tokenizer(tmp_path / "model")
    tokens = parity.random_tokens(41, 11)
    plain = parity.oracle_logits(oracle, tokens)
    with ExL2LLM(tmp_path / "model", cache_tokens=256, cache_dtype="fp32") as llm:
        for number, (name, options) in enumerate(CASES.items()):
            adapted = peft.get_peft_model(oracle, peft.LoraConfig(task_type="CAUSAL_LM", **options))
            generator = torch.Generator().manual_seed(number)
            with torch.no_grad():
                for key, parameter in adapted.named_parameters():
                    if "lora_" in key:
                        parameter.copy_(0.15 * torch.randn(parameter.shape, generator=generator))
            adapted.save_pretrained(tmp_path / str(number))
            theirs = parity.oracle_logits(adapted.eval(), tokens)
            oracle = adapted.unload()
            llm.load_lora(tmp_path / str(number), name)
            assert (theirs - plain).abs().max() > 0.3, name
            assert parity.max_error(llm.logits(tokens, lora=name), theirs) <= parity.TOLERANCE, name
