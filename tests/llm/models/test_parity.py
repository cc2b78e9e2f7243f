"""Logits equal those of transformers, for every architecture and switch, in every way an engine runs a model."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from exl2_rag.llm.config import ModelConfig, RopeConfig
from exl2_rag.llm.models.decoder import Decoder
from tests.llm.models import parity
from tests.llm.models.parity import Runner, Slice

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", {}),
    "llama, one key head": ("LlamaForCausalLM", {"num_key_value_heads": 1}),
    "llama, a key head each": ("LlamaForCausalLM", {"num_key_value_heads": 4}),
    "llama, heads of 80": ("LlamaForCausalLM", {"head_dim": 80}),
    "llama, tied": ("LlamaForCausalLM", {"tie_word_embeddings": True}),
    "llama, biases": ("LlamaForCausalLM", {"attention_bias": True, "mlp_bias": True}),
    "llama, llama3 rope": ("LlamaForCausalLM", {"rope_parameters": LLAMA3_ROPE}),
    "llama, linear rope": (
        "LlamaForCausalLM",
        {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 500.0}},
    ),
    "llama, odd vocabulary": ("LlamaForCausalLM", {"vocab_size": 253}),
    "mistral, no window": ("MistralForCausalLM", {"sliding_window": None}),
    "mistral, window": ("MistralForCausalLM", {"sliding_window": 16, "head_dim": 48}),
    "mistral, tied": ("MistralForCausalLM", {"sliding_window": None, "tie_word_embeddings": True, "head_dim": 80}),
    "qwen2": ("Qwen2ForCausalLM", {}),
    "qwen2, tied": ("Qwen2ForCausalLM", {"tie_word_embeddings": True}),
    "qwen2, heads of 80": ("Qwen2ForCausalLM", {"hidden_size": 320, "num_key_value_heads": 1}),
    "qwen2, window in the upper layer": (
        "Qwen2ForCausalLM",
        {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1},
    ),
    "qwen2, window by layer types": (
        "Qwen2ForCausalLM",
        {
            "use_sliding_window": True,
            "sliding_window": 16,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "num_hidden_layers": 3,
        },
    ),
}
TOKENS = 37


class Built:
    """One case, built once for all tests of this module."""

    def __init__(self, path: Path, architecture: str, config: dict[str, Any]) -> None:
        self.path = path
        self.oracle = parity.make_oracle(architecture, **config)
        parity.save_oracle(self.oracle, path)
        self.decoder: Decoder = parity.load(path)
        self.vocab_size: int = self.decoder.config.vocab_size
        self.tokens = parity.random_tokens(TOKENS, 11, self.vocab_size)
        self.logits = parity.oracle_logits(self.oracle, self.tokens)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Built]:
    return {}


@pytest.fixture(params=CASES)
def built(request: pytest.FixtureRequest, cache: dict[str, Built], tmp_path_factory: pytest.TempPathFactory) -> Built:
    name = request.param
    if name not in cache:
        cache[name] = Built(tmp_path_factory.mktemp("model"), *CASES[name])
    return cache[name]


def test_a_whole_prefill_gives_the_logits_of_transformers(built: Built) -> None:
    ours = parity.in_slices(built.decoder, built.tokens, [TOKENS])
    assert built.logits.std() > 0.5, "nearly flat logits would hide mistakes"
    assert parity.max_error(ours, built.logits) <= parity.TOLERANCE


def test_slices_of_a_prefill_give_the_logits_of_transformers(built: Built) -> None:
    ours = parity.in_slices(built.decoder, built.tokens, [7, 30])
    assert parity.max_error(ours, built.logits) <= parity.TOLERANCE


def test_token_by_token_gives_the_logits_of_transformers(built: Built) -> None:
    ours = parity.in_slices(built.decoder, built.tokens, [1] * TOKENS)
    assert parity.max_error(ours, built.logits) <= parity.TOLERANCE


def test_a_batch_of_unequal_lengths_gives_the_logits_of_transformers(built: Built) -> None:
    """A prefill, a later slice and a decode step together, as in continuous batching."""
    others = [parity.random_tokens(n, seed, built.vocab_size) for n, seed in ((23, 12), (5, 13), (41, 14))]
    runner = Runner(built.decoder, n_sequences=4)
    runner.step([Slice(1, 0, others[0][:6]), Slice(3, 0, others[2][:40])])
    ours = runner.step(
        [Slice(0, 0, built.tokens), Slice(1, 6, others[0][6:]), Slice(2, 0, others[1]), Slice(3, 40, others[2][40:])]
    )
    theirs = [
        built.logits,
        parity.oracle_logits(built.oracle, others[0])[6:],
        parity.oracle_logits(built.oracle, others[1]),
        parity.oracle_logits(built.oracle, others[2])[40:],
    ]
    assert parity.max_error(ours, torch.cat(theirs)) <= parity.TOLERANCE


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM"])
def test_files_in_half_precision_are_computed_in_float32(architecture: str, dtype: torch.dtype, tmp_path: Path) -> None:
    oracle = parity.make_oracle(architecture)
    parity.save_oracle(oracle, tmp_path, dtype=dtype)
    decoder = parity.load(tmp_path)
    tokens = parity.random_tokens(TOKENS, 11)
    assert decoder.config.dtype == str(dtype).removeprefix("torch.")
    ours = parity.in_slices(decoder, tokens, [30, *[1] * 7])
    assert parity.max_error(ours, parity.oracle_logits(oracle, tokens)) <= parity.TOLERANCE


def test_a_sharded_model_with_its_index_is_read_whole(tmp_path: Path) -> None:
    oracle = parity.make_oracle("LlamaForCausalLM", num_hidden_layers=4)
    parity.save_oracle(oracle, tmp_path, max_shard_size="500KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    tokens = parity.random_tokens(TOKENS, 11)
    ours = parity.in_slices(parity.load(tmp_path), tokens, [TOKENS])
    assert parity.max_error(ours, parity.oracle_logits(oracle, tokens)) <= parity.TOLERANCE


def _to_old_form(model_dir: Path) -> None:
    """Rewrite config.json the way transformers 4 wrote it."""
    path = model_dir / "config.json"
    config = json.loads(path.read_text())
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope.pop("rope_theta")
    config["rope_scaling"] = None if rope == {"rope_type": "default"} else rope | {"type": rope["rope_type"]}
    config["torch_dtype"] = config.pop("dtype")
    config.pop("layer_types", None)
    path.write_text(json.dumps(config))


@pytest.mark.parametrize(
    "case", ["llama, llama3 rope", "llama, linear rope", "mistral, window", "qwen2, window in the upper layer"]
)
def test_a_config_in_the_old_form_gives_the_same_logits(case: str, tmp_path: Path) -> None:
    built = Built(tmp_path, *CASES[case])
    _to_old_form(tmp_path)
    decoder = parity.load(tmp_path)
    assert decoder.config == built.decoder.config
    assert parity.max_error(parity.in_slices(decoder, built.tokens, [TOKENS]), built.logits) <= parity.TOLERANCE


def _without_window(config: ModelConfig) -> ModelConfig:
    return dataclasses.replace(config, sliding_windows=(0,) * config.n_layers)


def _wider_window(config: ModelConfig) -> ModelConfig:
    return dataclasses.replace(config, sliding_windows=tuple(width and width + 1 for width in config.sliding_windows))


def _plain_rope(config: ModelConfig) -> ModelConfig:
    return dataclasses.replace(config, rope=RopeConfig(theta=config.rope.theta))


def _default_theta(config: ModelConfig) -> ModelConfig:
    return dataclasses.replace(config, rope=dataclasses.replace(config.rope, theta=10000.0))


@pytest.mark.parametrize(
    ("case", "change"),
    [
        ("mistral, window", _without_window),
        ("mistral, window", _wider_window),
        ("qwen2, window in the upper layer", _without_window),
        ("qwen2, window by layer types", _wider_window),
        ("llama, llama3 rope", _plain_rope),
        ("llama, linear rope", _plain_rope),
        ("llama, linear rope", _default_theta),
    ],
)
def test_these_prompts_are_long_enough_to_show_a_wrong_switch(case: str, change: Any, tmp_path: Path) -> None:
    built = Built(tmp_path, *CASES[case])
    wrong = parity.load(tmp_path, change(built.decoder.config))
    ours = parity.in_slices(wrong, built.tokens, [TOKENS])
    assert parity.max_error(ours, built.logits) > 100 * parity.TOLERANCE


def test_a_row_does_not_depend_on_its_slice_or_batch(tmp_path: Path) -> None:
    parity.save_oracle(parity.make_oracle("LlamaForCausalLM"), tmp_path)
    decoder = parity.load(tmp_path)
    tokens = parity.random_tokens(TOKENS, 11)
    whole = parity.in_slices(decoder, tokens, [TOKENS])
    assert torch.equal(parity.in_slices(decoder, tokens, [1] * TOKENS), whole)
    batch = Runner(decoder, n_sequences=2).step([Slice(0, 0, parity.random_tokens(9, 1)), Slice(1, 0, tokens)])
    assert torch.equal(batch[9:], whole)
