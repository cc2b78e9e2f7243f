from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from exl2_rag.errors import CheckpointError, ModelNotFoundError, SettingsError, UnsupportedModelError
from exl2_rag.llm.checkpoint import Checkpoint, reconstruct
from exl2_rag.llm.quantize import convert_rtn
from tests.support.synthetic import make_model_dir


@pytest.fixture
def source(tmp_path):
    return make_model_dir(tmp_path / "source", architecture="Qwen2ForCausalLM", vocab=330)


def test_every_linear_layer_becomes_exl2_and_the_rest_float16(source, tmp_path):
    report = convert_rtn(source, tmp_path / "exl2", bits=4.5)
    plain, quantised = Checkpoint.open(source), Checkpoint.open(tmp_path / "exl2")
    for key in ("model.layers.1.self_attn.q_proj", "model.layers.0.mlp.down_proj", "lm_head"):
        assert quantised.kind(key) == "exl2"
        weight = plain.tensor(f"{key}.weight").float()
        parts = quantised.linear(key)
        decoded = reconstruct({f"{key}.{name}": part for name, part in parts.items()}, key).T.float()
        assert (decoded[: len(weight)] - weight).norm() / weight.norm() < 0.12
    for name in ("model.embed_tokens.weight", "model.norm.weight", "model.layers.0.input_layernorm.weight"):
        assert torch.equal(quantised.tensor(name), plain.tensor(name).half())
    key = "model.layers.0.self_attn.k_proj"
    assert torch.equal(quantised.linear(key)["bias"], plain.tensor(f"{key}.bias").half())
    assert report.n_linears == 15
    assert report.n_bytes == sum(path.stat().st_size for path in (tmp_path / "exl2").glob("*.safetensors"))


def test_the_average_keeps_to_the_bits_asked_for(source, tmp_path):
    report = convert_rtn(source, tmp_path / "exl2", bits=4.0)
    sizes = Checkpoint.open(tmp_path / "exl2").layer_sizes()
    layers = [size for key, size in sizes.items() if key.endswith("_proj")]
    bits = sum(sum(b * rows for b, rows in size.widths) * size.out_features for size in layers)
    elements = sum(size.in_features * size.out_features for size in layers)
    assert bits / elements < report.bits_per_weight <= 4.0
    assert report.bits_per_weight > 3.8


def test_config_and_tokenizer_come_along(source, tmp_path):
    (source / "model.safetensors.index.json").write_text("{}")
    (source / "old.bin").write_bytes(b"x")
    convert_rtn(source, tmp_path / "exl2", bits=5, head_bits=8)
    config = json.loads((tmp_path / "exl2" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "exl2"
    assert (config["quantization_config"]["bits"], config["quantization_config"]["head_bits"]) == (5, 8)
    assert config.items() > json.loads((source / "config.json").read_text()).items()
    names = {path.name for path in (tmp_path / "exl2").iterdir()}
    assert "tokenizer.json" in names
    assert not names & {"model.safetensors.index.json", "old.bin", "model.safetensors"}


def test_a_tied_head_is_quantised_by_itself(tmp_path):
    source = make_model_dir(tmp_path / "tied", tie_word_embeddings=True)
    assert not Checkpoint.open(source).has("lm_head.weight")
    convert_rtn(source, tmp_path / "exl2")
    quantised = Checkpoint.open(tmp_path / "exl2")
    assert quantised.kind("lm_head") == "exl2"
    assert quantised.has("model.embed_tokens.weight")


def test_large_models_are_written_in_shards(source, tmp_path):
    convert_rtn(source, tmp_path / "exl2", shard_bytes=100_000)
    shards = sorted(path.name for path in (tmp_path / "exl2").glob("*.safetensors"))
    assert len(shards) > 1
    assert shards[0] == f"output-00001-of-{len(shards):05}.safetensors"
    assert Checkpoint.open(tmp_path / "exl2").kind("lm_head") == "exl2"


def test_progress_counts_the_matrices(source, tmp_path):
    seen: list[tuple[int, int]] = []
    convert_rtn(source, tmp_path / "exl2", progress=lambda done, total: seen.append((done, total)))
    assert seen == [(index, 15) for index in range(1, 16)]


def test_an_unknown_architecture_is_refused(tmp_path):
    source = make_model_dir(tmp_path / "source")
    config = json.loads((source / "config.json").read_text()) | {"architectures": ["GPT2LMHeadModel"]}
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedModelError, match="GPT2LMHeadModel"):
        convert_rtn(source, tmp_path / "exl2")


def test_a_quantised_source_is_refused(tmp_path):
    source = make_model_dir(tmp_path / "source", quantised=True)
    with pytest.raises(UnsupportedModelError, match="quantised already"):
        convert_rtn(source, tmp_path / "exl2")


def test_a_tensor_that_would_be_lost_is_refused(tmp_path):
    source = make_model_dir(tmp_path / "source")
    tensors = load_file(source / "model.safetensors") | {"model.layers.0.extra.weight": torch.ones(2)}
    save_file(tensors, source / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"model\.layers\.0\.extra\.weight"):
        convert_rtn(source, tmp_path / "exl2")


def test_a_source_without_config_is_refused(tmp_path):
    with pytest.raises(ModelNotFoundError, match=r"config\.json"):
        convert_rtn(tmp_path, tmp_path / "exl2")


@pytest.mark.parametrize(("options", "message"), [({"head_bits": 7}, "head_bits"), ({"bits": 1.5}, "too few")])
def test_bits_that_cannot_be_had_are_refused(source, tmp_path, options, message):
    with pytest.raises(SettingsError, match=message):
        convert_rtn(source, tmp_path / "exl2", **options)
    assert not list(tmp_path.glob("exl2/config.json"))
