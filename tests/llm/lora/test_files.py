"""What is read of a PEFT folder, and what is refused by name."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from exl2_rag.errors import CheckpointError, LoraError
from exl2_rag.llm.config import ModelConfig
from exl2_rag.llm.lora.adapter import LoraAdapter, load_adapter
from exl2_rag.llm.lora.config import LoraConfig
from exl2_rag.llm.lora.shelf import LoraShelf
from tests.support.lora import write_adapter
from tests.support.synthetic import make_model_dir

CPU = torch.device("cpu")
Q0 = "model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    return ModelConfig.from_dir(make_model_dir(tmp_path_factory.mktemp("model")))


def read(path: Path, config: ModelConfig) -> LoraAdapter:
    return load_adapter(path, config, CPU)


def change_fields(path: Path, **fields: Any) -> None:
    file = path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def test_scales_follow_rank_alpha_patterns_and_rslora(config: ModelConfig, tmp_path: Path) -> None:
    fields = {"ranks": {"q_proj": 2}, "alphas": {"k_proj": 10.0}}
    plain = read(write_adapter(tmp_path / "plain", config, **fields).path, config)
    rs = read(write_adapter(tmp_path / "rs", config, **fields, use_rslora=True).path, config)
    for name, rank, alpha in (("q", 2, 8), ("k", 4, 10), ("v", 4, 8)):
        key = f"model.layers.1.self_attn.{name}_proj"
        assert plain.modules[key].scale == alpha / rank
        assert rs.modules[key].scale == alpha / math.sqrt(rank)
        assert plain.modules[key].a.shape[0] == rank


def test_a_pattern_matches_the_end_of_a_path_as_in_peft() -> None:
    config = LoraConfig(8, 16, rank_pattern={r"layers\.1\.self_attn\..*": 3, "q_proj": 4, "proj": 5})
    assert config.rank_of("model.layers.1.self_attn.q_proj") == 3
    assert config.rank_of("model.layers.11.self_attn.q_proj") == 4
    assert config.rank_of("model.layers.0.mlp.up_proj") == 8


def test_the_digest_tells_contents_and_scales_apart_and_nothing_else(config: ModelConfig, tmp_path: Path) -> None:
    first = read(write_adapter(tmp_path / "1", config).path, config)
    assert read(write_adapter(tmp_path / "2", config, lora_dropout=0.1).path, config).digest == first.digest
    assert read(write_adapter(tmp_path / "3", config, seed=1).path, config).digest != first.digest
    other_scale = write_adapter(tmp_path / "4", config).path
    change_fields(other_scale, lora_alpha=9)
    assert read(other_scale, config).digest != first.digest


def test_a_bias_of_the_second_matrix_is_added_before_the_scale(config: ModelConfig, tmp_path: Path) -> None:
    written = write_adapter(tmp_path, config, ["q_proj"], lora_bias=True)
    biases = {
        name.replace("lora_B.weight", "lora_B.bias"): torch.full((tensor.shape[0],), 0.5)
        for name, tensor in written.tensors.items()
        if "lora_B" in name
    }
    save_file(written.tensors | biases, tmp_path / "adapter_model.safetensors")
    bias = read(tmp_path, config).modules[Q0].bias
    assert bias is not None
    assert bias.tolist() == [0.5] * 128


def test_saved_copies_of_embedding_and_head_are_taken_for_what_they_are(config: ModelConfig, tmp_path: Path) -> None:
    written = write_adapter(tmp_path, config, ["embed_tokens", "lm_head"])
    table = torch.zeros(config.vocab_size, config.hidden_size)
    copies = {f"base_model.model.{key}.base_layer.weight": table.clone() for key in ("model.embed_tokens", "lm_head")}
    save_file(written.tensors | copies, tmp_path / "adapter_model.safetensors")
    assert set(read(tmp_path, config).modules) == {"model.embed_tokens", "lm_head"}
    copies["base_model.model.lm_head.base_layer.weight"] = table[1:].clone()
    save_file(written.tensors | copies, tmp_path / "adapter_model.safetensors")
    with pytest.raises(LoraError, match=r"lm_head.base_layer.weight' must have shape"):
        read(tmp_path, config)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"peft_type": "IA3"}, 'peft_type must be "LORA"'),
        ({"use_dora": True}, "use_dora is True.*DoRA"),
        ({"bias": "lora_only"}, "bias is 'lora_only'"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
        ({"layer_replication": [[0, 1]]}, "layer_replication"),
        ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens"),
        ({"target_parameters": ["x"]}, "target_parameters"),
        ({"use_qalora": True}, "use_qalora"),
        ({"a_field_of_tomorrow": {"x": 1}}, "a_field_of_tomorrow.*does not know"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa'"),
        ({"init_lora_weights": "olora"}, "init_lora_weights"),
        ({"r": 0}, "r must be a whole number"),
        ({"r": 2.5}, "r must be a whole number"),
        ({"lora_alpha": "8"}, "lora_alpha must be a number"),
        ({"rank_pattern": {"q_proj": 0}}, "rank_pattern must be"),
        ({"rank_pattern": {"(": 4}}, "no regular expression"),
        ({"alpha_pattern": ["q_proj"]}, "alpha_pattern must be"),
        ({"use_rslora": 1}, "use_rslora must be true or false"),
        ({"r": 5}, r"must have shape \[5, 128\].*it has \[4, 128\]"),
        ({"lora_bias": True}, "has no tensor for bias"),
    ],
)
def test_a_config_that_changes_what_is_computed_is_refused_by_name(
    fields: dict[str, Any], message: str, config: ModelConfig, tmp_path: Path
) -> None:
    write_adapter(tmp_path, config)
    change_fields(tmp_path, **fields)
    with pytest.raises(LoraError, match=message):
        read(tmp_path, config)


@pytest.mark.parametrize("fields", [{"a_field_of_tomorrow": None}, {"init_lora_weights": "gaussian"}, {"bias": "none"}])
def test_a_field_that_is_off_or_of_training_alone_is_no_obstacle(
    fields: dict[str, Any], config: ModelConfig, tmp_path: Path
) -> None:
    write_adapter(tmp_path, config)
    change_fields(tmp_path, **fields)
    assert len(read(tmp_path, config).modules) == 8


PREFIX = f"base_model.model.{Q0}"


def _rename(old: str, new: str) -> Callable[[dict[str, Tensor]], None]:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors[f"base_model.model.{new}"] = tensors.pop(f"base_model.model.{old}")

    return change


def _set(part: str, value: Tensor) -> Callable[[dict[str, Tensor]], None]:
    return lambda tensors: tensors.update({f"{PREFIX}.{part}": value})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_rename(f"{Q0}.lora_A.weight", f"{Q0}.lora_magnitude_vector"), "is not supported"),
        (_rename(f"{Q0}.lora_A.weight", f"{Q0}.base_layer.weight"), "replaces base weights"),
        (_rename(f"{Q0}.lora_A.weight", f"{Q0}.lora_embedding_A"), "no tensor for a"),
        (_set("lora_embedding_A", torch.zeros(4, 128)), "has no place"),
        (lambda tensors: tensors.pop(f"{PREFIX}.lora_B.weight"), "no tensor for b; the file is incomplete"),
        (_set("lora_A.default.weight", torch.zeros(4, 128)), "two tensors for a"),
        (_set("lora_B.bias", torch.zeros(128)), "has no place"),
        (_set("lora_A.weight", torch.zeros(4, 64)), "another model"),
        (_set("lora_A.weight", torch.zeros(4, 128, dtype=torch.int32)), "must be float"),
        (lambda tensors: tensors.clear(), "no LoRA matrices"),
    ],
)
def test_tensors_that_do_not_fit_the_model_are_refused_by_name(
    change: Callable[[dict[str, Tensor]], Any], message: str, config: ModelConfig, tmp_path: Path
) -> None:
    written = write_adapter(tmp_path, config)
    tensors = dict(written.tensors)
    change(tensors)
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(LoraError, match=message):
        read(tmp_path, config)


def test_a_layer_that_the_model_does_not_have_is_named(config: ModelConfig, tmp_path: Path) -> None:
    written = write_adapter(tmp_path, config)
    moved = {name.replace("layers.1.", "layers.7."): tensor for name, tensor in written.tensors.items()}
    save_file(moved, tmp_path / "adapter_model.safetensors")
    with pytest.raises(LoraError, match=r"no linear layer 'model\.layers\.7\.self_attn\.k_proj'"):
        read(tmp_path, config)


def test_a_pickle_is_not_opened(config: ModelConfig, tmp_path: Path) -> None:
    write_adapter(tmp_path, config)
    (tmp_path / "adapter_model.safetensors").rename(tmp_path / "adapter_model.bin")
    with pytest.raises(LoraError, match=r"pickle.*adapter_model\.safetensors"):
        read(tmp_path, config)
    (tmp_path / "adapter_model.bin").unlink()
    with pytest.raises(LoraError, match=r"has no adapter_model\.safetensors"):
        read(tmp_path, config)


def test_missing_and_broken_files_are_named(config: ModelConfig, tmp_path: Path) -> None:
    with pytest.raises(LoraError, match="no folder at"):
        read(tmp_path / "nowhere", config)
    with pytest.raises(LoraError, match=r"has no adapter_config\.json"):
        read(tmp_path, config)
    write_adapter(tmp_path, config)
    file = tmp_path / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(CheckpointError, match="truncated"):
        read(tmp_path, config)
    for text, message in (("{", "no readable JSON"), ("[]", "must hold a JSON object")):
        (tmp_path / "adapter_config.json").write_text(text)
        with pytest.raises(LoraError, match=message):
            read(tmp_path, config)


def test_a_card_is_refused_in_so_many_words(config: ModelConfig, tmp_path: Path) -> None:
    with pytest.raises(LoraError, match='device="cpu"'):
        LoraShelf(config, torch.device("cuda:0")).load(tmp_path)
