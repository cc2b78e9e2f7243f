import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from exl2_rag.errors import ModelError, ModelNotFoundError, UnsupportedModelError
from exl2_rag.llm.config import ModelConfig, RopeConfig
from exl2_rag.llm.models.architecture import ARCHITECTURES

BASE: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 320,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def read(architecture: str = "LlamaForCausalLM", generation: dict[str, Any] | None = None, **keys: Any) -> ModelConfig:
    """BASE with keys replaced; a key given as `...` is left out."""
    config = BASE | {"architectures": [architecture], "model_type": ARCHITECTURES[architecture].model_type} | keys
    return ModelConfig.from_dict({key: value for key, value in config.items() if value is not ...}, generation)


def test_sizes_are_read() -> None:
    config = read()
    assert (config.hidden_size, config.intermediate_size, config.n_layers) == (128, 256, 4)
    assert (config.n_heads, config.n_kv_heads, config.head_dim) == (4, 2, 32)
    assert (config.vocab_size, config.max_seq_len, config.norm_eps) == (320, 512, 1e-5)
    assert config.softmax_scale == 32**-0.5


def test_a_config_can_be_a_dictionary_key_and_does_not_change() -> None:
    assert len({read(), read(), read(head_dim=64)}) == 2
    with pytest.raises(AttributeError):
        read().n_heads = 8  # type: ignore[misc]


def test_head_dim_need_not_be_hidden_size_over_heads() -> None:
    assert read(head_dim=80).head_dim == 80
    assert read(head_dim=None).head_dim == 32


def test_whole_numbers_written_as_floats_are_numbers() -> None:
    assert read(hidden_size=128.0, rope_theta=10000).hidden_size == 128


def test_reading_a_config_does_not_import_torch() -> None:
    code = "import sys, exl2_rag.llm.config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# Rotary positions: the forms of transformers 4 and 5.


@pytest.mark.parametrize(
    "keys",
    [
        {"rope_theta": 5e5, "rope_scaling": LLAMA3},
        {"rope_theta": 500000, "rope_scaling": {**LLAMA3, "type": "llama3"}},
        {"rope_parameters": {**LLAMA3, "rope_theta": 5e5}},
        {"rope_theta": 5e5, "rope_parameters": {**LLAMA3, "rope_theta": 5e5}},
        {"rope_theta": 5e5, "rope_scaling": LLAMA3, "rope_parameters": LLAMA3},
    ],
)
def test_llama3_rope_is_read_in_old_and_new_form(keys: dict[str, Any]) -> None:
    assert read(**keys).rope == RopeConfig(5e5, "llama3", 32.0, 1.0, 4.0, 8192)


@pytest.mark.parametrize(
    "keys",
    [
        {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 4}},
        {"rope_theta": 5e5, "rope_scaling": {"rope_type": "linear", "factor": 4.0}},
        {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 5e5}},
    ],
)
def test_linear_rope_is_read_in_old_and_new_form(keys: dict[str, Any]) -> None:
    assert read(**keys).rope == RopeConfig(5e5, "linear", 4.0)


@pytest.mark.parametrize(
    "keys",
    [
        {"rope_theta": 5e5},
        {"rope_theta": 5e5, "rope_scaling": None},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
        {"rope_parameters": {"rope_theta": 5e5}},
        {"rope_theta": 5e5, "partial_rotary_factor": 1.0, "rope_scaling": {"type": "default", "factor": 1.0}},
    ],
)
def test_plain_rope_is_read_in_old_and_new_form(keys: dict[str, Any]) -> None:
    assert read(**keys).rope == RopeConfig(5e5)


def test_theta_is_10000_where_the_file_names_none() -> None:
    assert read().rope == RopeConfig(10000.0)


def test_llama3_without_an_original_length_takes_the_models_own() -> None:
    scaling = {key: value for key, value in LLAMA3.items() if key != "original_max_position_embeddings"}
    assert read(rope_scaling=scaling).rope.original_max_seq_len == 512


@pytest.mark.parametrize(
    ("keys", "named"),
    [
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "dynamic"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "yarn"),
        ({"rope_parameters": {"rope_type": "longrope"}}, "longrope"),
        ({"rope_scaling": {"rope_type": "llama3", "type": "linear", "factor": 8.0}}, "type"),
        ({"rope_scaling": {"type": "linear"}}, "factor"),
        ({"rope_scaling": {"type": "linear", "factor": -1}}, "factor"),
        ({"rope_scaling": {"factor": 2.0}}, "factor"),
        ({"rope_scaling": {**LLAMA3, "high_freq_factor": 1.0}}, "high_freq_factor"),
        ({"rope_scaling": {**LLAMA3, "low_freq_factor": None}}, "low_freq_factor"),
        ({"rope_scaling": {**LLAMA3, "attention_factor": 1.5}}, "attention_factor"),
        ({"rope_scaling": "llama3"}, "rope_scaling"),
        ({"rope_scaling": LLAMA3, "rope_parameters": {"rope_type": "default"}}, "differ"),
        ({"rope_theta": 1e4, "rope_parameters": {"rope_theta": 5e5}}, "rope_theta"),
        ({"rope_theta": 0}, "rope_theta"),
        ({"rope_theta": float("nan")}, "rope_theta"),
        ({"rope_theta": "10000"}, "rope_theta"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "full_attention"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.25}}, "partial_rotary_factor"),
    ],
)
def test_a_rope_that_is_not_honoured_is_refused_by_name(keys: dict[str, Any], named: str) -> None:
    with pytest.raises(UnsupportedModelError, match=named):
        read(**keys)


# Sliding windows.


def test_llama_has_no_sliding_window() -> None:
    assert read().sliding_windows == (0, 0, 0, 0)


@pytest.mark.parametrize(
    ("keys", "windows"),
    [
        ({"sliding_window": 16}, (16,) * 4),
        ({"sliding_window": None}, (0,) * 4),
        ({}, (4096,) * 4),  # as transformers: left out means the default of the class
        ({"sliding_window": 16, "layer_types": ["sliding_attention"] * 4}, (16,) * 4),
        ({"sliding_window": None, "layer_types": ["full_attention"] * 4}, (0,) * 4),
    ],
)
def test_a_mistral_window_holds_in_all_layers(keys: dict[str, Any], windows: tuple[int, ...]) -> None:
    assert read("MistralForCausalLM", **keys).sliding_windows == windows


@pytest.mark.parametrize(
    ("keys", "windows"),
    [
        ({}, (0,) * 4),
        ({"sliding_window": 16, "max_window_layers": 2}, (0,) * 4),
        ({"use_sliding_window": False, "sliding_window": 0}, (0,) * 4),
        ({"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 2}, (0, 0, 16, 16)),
        ({"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 0}, (16,) * 4),
        ({"use_sliding_window": True, "sliding_window": 16}, (0,) * 4),  # max_window_layers is 28 by default
        ({"use_sliding_window": True, "sliding_window": None, "max_window_layers": 0}, (0,) * 4),
        (
            {
                "use_sliding_window": True,
                "sliding_window": 16,
                "layer_types": ["sliding_attention", "full_attention"] * 2,
            },
            (16, 0, 16, 0),
        ),
        ({"layer_types": ["full_attention"] * 4}, (0,) * 4),
    ],
)
def test_a_qwen2_window_holds_where_layer_types_or_max_window_layers_say(
    keys: dict[str, Any], windows: tuple[int, ...]
) -> None:
    assert read("Qwen2ForCausalLM", **keys).sliding_windows == windows


@pytest.mark.parametrize(
    ("architecture", "keys", "named"),
    [
        ("LlamaForCausalLM", {"sliding_window": 16}, "sliding_window"),
        ("MistralForCausalLM", {"sliding_window": 0}, "sliding_window"),
        ("MistralForCausalLM", {"sliding_window": 16, "layer_types": ["full_attention"] * 4}, "layer_types"),
        ("Qwen2ForCausalLM", {"layer_types": ["sliding_attention"] * 4}, "no sliding window"),
        ("Qwen2ForCausalLM", {"layer_types": ["full_attention"] * 3}, "layer_types"),
        ("Qwen2ForCausalLM", {"layer_types": ["linear_attention"] * 4}, "layer_types"),
        ("Qwen2ForCausalLM", {"layer_types": "full_attention"}, "layer_types"),
        ("Qwen2ForCausalLM", {"max_window_layers": -1}, "max_window_layers"),
        ("Qwen2ForCausalLM", {"use_sliding_window": "yes"}, "use_sliding_window"),
    ],
)
def test_a_window_that_makes_no_sense_is_refused_by_name(architecture: str, keys: dict[str, Any], named: str) -> None:
    with pytest.raises(UnsupportedModelError, match=named):
        read(architecture, **keys)


# Biases, heads, defaults.


def test_biases_follow_the_architecture_and_for_llama_the_config() -> None:
    def biases(config: ModelConfig) -> tuple[bool, bool, bool]:
        return config.qkv_bias, config.o_bias, config.mlp_bias

    assert biases(read()) == (False, False, False)
    assert biases(read(attention_bias=True)) == (True, True, False)
    assert biases(read(mlp_bias=True)) == (False, False, True)
    assert biases(read("MistralForCausalLM")) == (False, False, False)
    assert biases(read("Qwen2ForCausalLM")) == (True, False, False)


def test_absent_key_heads_mean_what_the_class_has_and_null_means_all_heads() -> None:
    assert read(num_key_value_heads=...).n_kv_heads == 4
    assert read("MistralForCausalLM", num_key_value_heads=..., num_attention_heads=32).n_kv_heads == 8
    assert read("MistralForCausalLM", num_key_value_heads=None).n_kv_heads == 4


def test_defaults_equal_those_of_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    for row in ARCHITECTURES.values():
        theirs = getattr(transformers, row.name.replace("ForCausalLM", "Config"))
        for key, value in row.config_defaults.items():
            assert theirs.__dataclass_fields__[key].default == value, (row.name, key)


# Token ids and dtype.


@pytest.mark.parametrize(
    ("in_config", "in_generation", "expected"),
    [
        (2, None, (2,)),
        ([5, 2], None, (5, 2)),
        (2, {"eos_token_id": [7, 2]}, (2, 7)),
        (None, {"eos_token_id": 7}, (7,)),
        (None, None, ()),
        (-1, None, ()),
    ],
)
def test_end_ids_come_from_both_files(in_config: Any, in_generation: Any, expected: tuple[int, ...]) -> None:
    assert read(generation=in_generation, eos_token_id=in_config).eos_token_ids == expected


def test_other_token_ids_come_from_either_file() -> None:
    config = read(generation={"bos_token_id": 9, "pad_token_id": 8}, bos_token_id=None)
    assert (config.bos_token_id, config.pad_token_id) == (9, 8)
    assert read(bos_token_id=1, generation={"bos_token_id": 9}).bos_token_id == 1


@pytest.mark.parametrize("value", ["2", 2.5, [None], True])
def test_a_token_id_that_is_none_is_refused(value: Any) -> None:
    with pytest.raises(UnsupportedModelError, match="eos_token_id"):
        read(eos_token_id=value)


def test_the_dtype_is_read_in_old_and_new_form() -> None:
    assert read(torch_dtype="bfloat16").dtype == "bfloat16"
    assert read(torch_dtype="torch.float16").dtype == "float16"
    assert read(dtype="float32").dtype == "float32"
    assert read().dtype is None


# What is refused.


def test_an_unknown_architecture_is_refused_with_a_list_of_the_supported_ones() -> None:
    with pytest.raises(
        UnsupportedModelError, match=r"GemmaForCausalLM.*LlamaForCausalLM, MistralForCausalLM, Qwen2For"
    ):
        ModelConfig.from_dict(BASE | {"architectures": ["GemmaForCausalLM"]})


@pytest.mark.parametrize("names", [..., None, [], ["LlamaForCausalLM", "LlamaForCausalLM"], "LlamaForCausalLM", [3]])
def test_a_file_without_one_architecture_is_refused(names: Any) -> None:
    config = {key: value for key, value in (BASE | {"architectures": names}).items() if value is not ...}
    with pytest.raises(UnsupportedModelError, match="architectures"):
        ModelConfig.from_dict(config)


@pytest.mark.parametrize(
    ("keys", "named"),
    [
        ({"hidden_act": "gelu"}, "hidden_act.*gelu"),
        ({"model_type": "mistral"}, "model_type.*mistral"),
        ({"hidden_size": 130}, "hidden_size"),
        ({"num_attention_heads": 4, "num_key_value_heads": 3}, "num_key_value_heads"),
        ({"head_dim": 33}, "head_dim"),
        ({"hidden_size": 0}, "hidden_size"),
        ({"hidden_size": "128"}, "hidden_size"),
        ({"hidden_size": True}, "hidden_size"),
        ({"hidden_size": 127.5}, "hidden_size"),
        ({"hidden_size": 10**400}, "hidden_size"),
        ({"hidden_size": ...}, "hidden_size is missing"),
        ({"vocab_size": None}, "vocab_size is missing"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers"),
        ({"rms_norm_eps": 0}, "rms_norm_eps"),
        ({"rms_norm_eps": float("inf")}, "rms_norm_eps"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings"),
        ({"quantization_config": {"quant_method": "awq", "bits": 4}}, "awq"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 8}}, "bits"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"}}, "marlin"),
    ],
)
def test_a_value_that_cannot_be_honoured_is_refused_by_name(keys: dict[str, Any], named: str) -> None:
    with pytest.raises(UnsupportedModelError, match=named):
        read(**keys)


@pytest.mark.parametrize(
    ("architecture", "keys"),
    [
        ("LlamaForCausalLM", {"attn_logit_softcapping": 30.0}),
        ("LlamaForCausalLM", {"embedding_multiplier": 12}),
        ("LlamaForCausalLM", {"logit_scale": 0.5}),
        ("LlamaForCausalLM", {"pruned_heads": {"0": [1]}}),
        ("LlamaForCausalLM", {"use_qk_norm": True}),
        ("LlamaForCausalLM", {"num_local_experts": 8}),
        ("MistralForCausalLM", {"attention_bias": True}),
        ("Qwen2ForCausalLM", {"mlp_bias": True}),
    ],
)
def test_an_unknown_key_with_a_value_is_refused_by_name(architecture: str, keys: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedModelError, match=next(iter(keys))):
        read(architecture, **keys)


def test_keys_that_change_nothing_are_accepted() -> None:
    unset = {"attn_logit_softcapping": None, "use_qk_norm": False, "pruned_heads": {}, "use_mrope": False}
    harmless = {
        "_name_or_path": "somewhere", "transformers_version": "4.40.0", "use_cache": True, "attention_dropout": 0.1,
        "initializer_range": 0.02, "pretraining_tp": 1, "auto_map": {"AutoModel": "x"}, "id2label": {"0": "a"},
        "temperature": 0.6, "unsloth_version": "2024.9",
    }  # fmt: skip
    exl2 = {"quantization_config": {"quant_method": "exl2", "bits": 4.0, "head_bits": 6, "calibration": {"rows": 115}}}
    assert read(**unset, **harmless, **exl2) == read()


@pytest.mark.parametrize("architecture", list(ARCHITECTURES))
def test_files_of_transformers_itself_are_accepted(architecture: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    settings = getattr(transformers, architecture.replace("ForCausalLM", "Config"))(architectures=[architecture])
    settings.save_pretrained(tmp_path)
    config = ModelConfig.from_dir(tmp_path)
    assert config.n_layers == settings.num_hidden_layers
    assert config.max_seq_len == settings.max_position_embeddings
    everything = json.loads(json.dumps(settings.to_dict()))
    assert ModelConfig.from_dict(everything) == config


# Files.


def _write(path: Path, text: str) -> Path:
    (path / "config.json").write_text(text, encoding="utf-8")
    return path


def test_both_files_of_a_directory_are_read(tmp_path: Path) -> None:
    _write(tmp_path, json.dumps(BASE))
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [2, 3]}')
    assert ModelConfig.from_dir(tmp_path).eos_token_ids == (2, 3)


def test_a_missing_directory_or_config_is_said_so(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match="no model directory"):
        ModelConfig.from_dir(tmp_path / "nowhere")
    with pytest.raises(ModelNotFoundError, match=r"no config\.json"):
        ModelConfig.from_dir(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "not json", "[1, 2]", "null", "[" * 100_000])
def test_a_config_that_is_no_json_object_is_refused(text: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"config\.json"):
        ModelConfig.from_dir(_write(tmp_path, text))


def test_a_config_that_is_no_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ModelError, match="fetch it again"):
        ModelConfig.from_dir(tmp_path)
