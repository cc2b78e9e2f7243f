"""What is wrong with a model's tensors is said by name, before anything large is read."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from exl2_rag.errors import CheckpointError, SettingsError
from exl2_rag.llm.checkpoint import Checkpoint
from exl2_rag.llm.config import ModelConfig
from exl2_rag.llm.layers.activations import Activations
from exl2_rag.llm.layers.linear import DenseLinear, QuantisedLinear
from exl2_rag.llm.models.registry import load_model
from tests.llm.models import parity
from tests.support.synthetic import make_model_dir

Q_PROJ = "model.layers.1.self_attn.q_proj"


def change_tensors(model_dir: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    path = next(model_dir.glob("*.safetensors"))
    tensors = load_file(path)
    path.unlink()
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)


def change_config(model_dir: Path, **keys: Any) -> None:
    path = model_dir / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | keys))


@pytest.mark.parametrize("quantised", [False, True], ids=["plain", "exl2"])
@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM"])
def test_a_synthetic_model_loads_and_speaks(architecture: str, quantised: bool, tmp_path: Path) -> None:
    decoder = parity.load(make_model_dir(tmp_path, architecture=architecture, quantised=quantised))
    logits = parity.in_slices(decoder, list(b"hello"), [5])
    assert logits.shape == (5, 320)
    assert logits.isfinite().all()
    assert isinstance(decoder.head.base, QuantisedLinear if quantised else DenseLinear)


@pytest.mark.parametrize(
    "name",
    [
        "model.embed_tokens.weight",
        "model.norm.weight",
        "lm_head.weight",
        "model.layers.0.input_layernorm.weight",
        "model.layers.1.post_attention_layernorm.weight",
        "model.layers.1.self_attn.k_proj.weight",
        "model.layers.0.self_attn.v_proj.bias",
        "model.layers.1.mlp.down_proj.weight",
    ],
)
def test_a_missing_tensor_is_named(name: str, tmp_path: Path) -> None:
    model_dir = make_model_dir(tmp_path, architecture="Qwen2ForCausalLM")
    change_tensors(model_dir, lambda tensors: tensors.pop(name))
    with pytest.raises(CheckpointError, match=name.removesuffix(".weight")):
        parity.load(model_dir)


@pytest.mark.parametrize("part", ["q_groups", "q_scale", "q_scale_max", "q_invperm"])
def test_a_missing_part_of_an_exl2_layer_is_named(part: str, tmp_path: Path) -> None:
    model_dir = make_model_dir(tmp_path, quantised=True)
    change_tensors(model_dir, lambda tensors: tensors.pop(f"{Q_PROJ}.{part}"))
    with pytest.raises(CheckpointError, match=f"{Q_PROJ}.{part}"):
        parity.load(model_dir)


@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        ("model.embed_tokens.weight", (319, 128), r"\[320, 128\].*\[319, 128\]"),
        ("model.norm.weight", (1, 128), r"\[128\].*\[1, 128\]"),
        ("model.layers.0.mlp.up_proj.weight", (128, 256), r"\[256, 128\].*\[128, 256\]"),
        ("model.layers.0.self_attn.k_proj.weight", (128, 128), r"\[64, 128\].*\[128, 128\]"),
        ("model.layers.0.self_attn.k_proj.bias", (128,), r"\[64\].*\[128\]"),
        ("lm_head.weight", (352, 128), r"\[320, 128\].*\[352, 128\]"),
    ],
)
def test_a_wrong_shape_is_named_with_the_expected_one(
    name: str, shape: tuple[int, ...], expected: str, tmp_path: Path
) -> None:
    model_dir = make_model_dir(tmp_path, architecture="Qwen2ForCausalLM")
    change_tensors(model_dir, lambda tensors: tensors.update({name: torch.ones(shape)}))
    with pytest.raises(CheckpointError, match=f"{name}.*{expected}"):
        parity.load(model_dir)


@pytest.mark.parametrize(
    ("keys", "named"),
    [
        ({"vocab_size": 300}, "model.embed_tokens"),
        ({"intermediate_size": 288}, "gate_proj.q_weight"),
        ({"head_dim": 64}, "q_proj.q_weight"),
        ({"num_hidden_layers": 3}, "model.layers.2"),
        ({"num_hidden_layers": 1}, "model.layers.1"),
        ({"attention_bias": True}, "q_proj.bias"),
    ],
)
def test_a_config_of_another_model_is_found_out(keys: dict[str, Any], named: str, tmp_path: Path) -> None:
    model_dir = make_model_dir(tmp_path, quantised=True)
    change_config(model_dir, **keys)
    with pytest.raises(CheckpointError, match=named):
        parity.load(model_dir)


@pytest.mark.parametrize("quantised", [False, True], ids=["plain", "exl2"])
@pytest.mark.parametrize("name", [f"{Q_PROJ}.bias", "model.layers.1.self_attn.q_norm.weight", "model.layers.7.x"])
def test_a_tensor_without_a_use_is_refused(name: str, quantised: bool, tmp_path: Path) -> None:
    model_dir = make_model_dir(tmp_path, quantised=quantised)
    change_tensors(model_dir, lambda tensors: tensors.update({name: torch.zeros(128)}))
    with pytest.raises(CheckpointError, match=name):
        parity.load(model_dir)


def test_tables_of_old_files_are_left_alone(tmp_path: Path) -> None:
    model_dir = make_model_dir(tmp_path)
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    change_tensors(model_dir, lambda tensors: tensors.update({name: torch.zeros(16)}))
    parity.load(model_dir)


@pytest.mark.parametrize(
    "name", ["model.embed_tokens.weight", "model.norm.weight", "model.layers.0.mlp.up_proj.weight"]
)
def test_whole_numbers_in_place_of_weights_are_refused(name: str, tmp_path: Path) -> None:
    model_dir = make_model_dir(tmp_path)
    change_tensors(model_dir, lambda tensors: tensors.update({name: tensors[name].to(torch.int32)}))
    with pytest.raises(CheckpointError, match=f"{name}.*int32"):
        parity.load(model_dir)


def test_damaged_codes_are_refused(tmp_path: Path) -> None:
    model_dir = make_model_dir(tmp_path, quantised=True)
    change_tensors(model_dir, lambda tensors: tensors[f"{Q_PROJ}.q_invperm"].fill_(3))
    with pytest.raises(CheckpointError, match=f"{Q_PROJ}.q_invperm"):
        parity.load(model_dir)


def test_an_error_says_which_directory_it_is_about(tmp_path: Path) -> None:
    model_dir = make_model_dir(tmp_path / "some-model")
    change_tensors(model_dir, lambda tensors: tensors.pop("model.norm.weight"))
    with pytest.raises(CheckpointError, match="some-model"):
        parity.load(model_dir)


def test_max_seq_len_must_be_positive_and_is_what_the_tables_reach(tmp_path: Path) -> None:
    model_dir = make_model_dir(tmp_path)
    config, checkpoint = ModelConfig.from_dir(model_dir), Checkpoint.open(model_dir)
    with pytest.raises(SettingsError, match="max_seq_len"):
        load_model(model_dir, config, checkpoint, device=parity.CPU, max_seq_len=0)
    assert load_model(model_dir, config, checkpoint, device=parity.CPU, max_seq_len=77).max_seq_len == 77


# The head.


def test_a_tied_head_is_the_embedding_and_counts_once(tmp_path: Path) -> None:
    tied = parity.load(make_model_dir(tmp_path / "tied", tie_word_embeddings=True))
    untied = parity.load(make_model_dir(tmp_path / "untied"))
    assert isinstance(tied.head.base, DenseLinear)
    assert tied.head.base.weight is tied.embedding.weight
    assert untied.weight_bytes - tied.weight_bytes == 320 * 128 * 4
    assert untied.weight_bytes == Checkpoint.open(tmp_path / "untied").total_bytes()


def test_a_tied_model_uses_the_quantised_head_of_its_own(tmp_path: Path) -> None:
    decoder = parity.load(make_model_dir(tmp_path, quantised=True, tie_word_embeddings=True))
    assert isinstance(decoder.head.base, QuantisedLinear)


def test_a_tied_head_that_the_file_repeats_is_kept_once_and_one_that_differs_is_used(tmp_path: Path) -> None:
    model_dir = make_model_dir(tmp_path)
    change_config(model_dir, tie_word_embeddings=True)
    different = parity.load(model_dir)
    assert isinstance(different.head.base, DenseLinear)
    assert different.head.base.weight is not different.embedding.weight
    change_tensors(model_dir, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    same = parity.load(model_dir)
    assert isinstance(same.head.base, DenseLinear)
    assert same.head.base.weight is same.embedding.weight


def test_a_tied_head_of_another_dtype_is_used_as_it_is(tmp_path: Path) -> None:
    model_dir = make_model_dir(tmp_path)
    change_config(model_dir, tie_word_embeddings=True)
    change_tensors(model_dir, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].half()}))
    head = parity.load(model_dir).head.base
    assert isinstance(head, DenseLinear)
    assert head.weight.dtype == torch.float16


# Forward.


def test_logits_are_computed_for_the_wanted_rows_only(tmp_path: Path) -> None:
    decoder = parity.load(make_model_dir(tmp_path, quantised=True))
    rows_seen = []
    head = decoder.head

    def watched(inputs: Activations) -> Tensor:
        rows_seen.append(inputs.x.shape[0])
        return head(inputs)

    decoder.head = watched  # type: ignore[assignment]
    tokens = parity.random_tokens(20, 1)
    everything = parity.Runner(decoder).step([parity.Slice(0, 0, tokens)])
    some = parity.Runner(decoder).step([parity.Slice(0, 0, tokens)], [19, 3])
    none = parity.Runner(decoder).step([parity.Slice(0, 0, tokens)], [])
    assert rows_seen == [20, 2]
    assert torch.equal(some, everything[[19, 3]])
    assert none.shape == (0, 320)


def test_a_float16_cache_changes_little(tmp_path: Path) -> None:
    decoder = parity.load(make_model_dir(tmp_path))
    tokens = parity.random_tokens(20, 1)
    exact = parity.Runner(decoder).step([parity.Slice(0, 0, tokens)])
    half = parity.Runner(decoder, dtype=torch.float16).step([parity.Slice(0, 0, tokens)])
    assert 0 < parity.max_error(half, exact) < 0.05


def test_the_config_of_a_loaded_model_is_at_hand(tmp_path: Path) -> None:
    model_dir = make_model_dir(tmp_path)
    config = dataclasses.replace(ModelConfig.from_dir(model_dir), norm_eps=1e-3)
    assert parity.load(model_dir, config).config is config
