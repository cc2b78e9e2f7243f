from __future__ import annotations

import json

import pytest

from exl2_rag.errors import CheckpointError, ModelNotFoundError
from exl2_rag.llm.checkpoint.inspect import GIB, inspect_model
from exl2_rag.llm.quantize import convert_rtn
from tests.support.synthetic import make_model_dir


@pytest.fixture
def converted(tmp_path):
    source = make_model_dir(tmp_path / "source", architecture="Qwen2ForCausalLM", layers=3)
    convert_rtn(source, tmp_path / "exl2", bits=4.5, head_bits=6)
    return tmp_path / "exl2"


def test_bits_and_sizes_are_reported_by_role(converted):
    report = inspect_model(converted)
    roles = {role.role: role for role in report.roles}
    assert next(iter(roles)) == "embedding"
    assert list(roles)[-2:] == ["lm_head", "other"]
    assert roles["mlp.down_proj"].n_matrices == 3
    assert roles["mlp.down_proj"].kinds == ("exl2",)
    assert roles["mlp.down_proj"].n_parameters == 3 * 256 * 128
    assert 4.0 < roles["mlp.down_proj"].bits_per_weight < 5.0
    assert sum(share for _, share in roles["mlp.down_proj"].widths) == pytest.approx(1.0)
    assert roles["lm_head"].widths[0][0] == 8
    assert roles["embedding"].bits_per_weight == 16
    assert (report.requested_bits, report.requested_head_bits) == (4.5, 6)
    assert 4.0 < report.bits_per_weight < 4.7  # the biases come on top of what was asked for
    assert report.problem is None


def test_every_byte_of_the_files_is_counted_once(converted):
    report = inspect_model(converted)
    assert sum(role.n_bytes for role in report.roles) == report.weight_bytes
    header = sum(8 + int.from_bytes(path.read_bytes()[:8], "little") for path in converted.glob("*.safetensors"))
    assert report.weight_bytes + header == sum(path.stat().st_size for path in converted.glob("*.safetensors"))


def test_the_cache_takes_what_layers_and_heads_say(converted):
    report = inspect_model(converted)
    assert report.kv_bytes_per_token == {"fp16": 2 * 3 * 2 * 32 * 2, "bf16": 768, "fp32": 1536}
    card = next(fit for fit in report.fits if fit.device == "24 GiB card")
    assert card.cache_tokens == (24 * GIB - report.weight_bytes - GIB // 2) // 768
    assert card.sequences == pytest.approx(card.cache_tokens / 512)


def test_a_plain_model_has_no_widths(tmp_path):
    report = inspect_model(make_model_dir(tmp_path / "plain"))
    assert {kind for role in report.roles for kind in role.kinds} == {"dense"}
    assert all(role.widths == () for role in report.roles)
    assert report.bits_per_weight == 32
    assert report.requested_bits is None


def test_a_model_the_engine_refuses_is_described_with_the_reason(tmp_path):
    model = make_model_dir(tmp_path / "model")
    config = json.loads((model / "config.json").read_text()) | {"architectures": ["GPT2LMHeadModel"]}
    (model / "config.json").write_text(json.dumps(config))
    report = inspect_model(model)
    assert report.architecture == "GPT2LMHeadModel"
    assert "GPT2LMHeadModel" in report.problem
    assert report.config is None
    assert report.fits == ()
    assert report.weight_bytes > 0


def test_a_directory_without_config_is_no_model(tmp_path):
    with pytest.raises(ModelNotFoundError, match=r"config\.json"):
        inspect_model(tmp_path)


def test_a_damaged_file_is_an_error_and_no_report(converted):
    path = converted / "output.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(CheckpointError):
        inspect_model(converted)
