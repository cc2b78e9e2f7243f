"""Models of random weights: real EXL2, the bits asked for, sane activations."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from exl2_rag import ExL2LLM, SamplingParams
from exl2_rag.errors import CheckpointError, SettingsError
from exl2_rag.llm.checkpoint import Checkpoint, reconstruct
from exl2_rag.llm.checkpoint.inspect import inspect_model
from exl2_rag.llm.quantize import synthetic
from exl2_rag.llm.quantize.synthetic import (
    SHAPES,
    SyntheticShape,
    ensure_synthetic_model,
    shape_by_name,
    synthetic_model_dir,
    write_synthetic_model,
)

TINY = SyntheticShape(hidden=256, intermediate=704, layers=4, heads=8, kv_heads=2, vocab=331, max_position=256)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    target = tmp_path_factory.mktemp("synthetic") / "model"
    write_synthetic_model(target, TINY, bits=4.5)
    return target


def weights(checkpoint, key):
    """[K, N] float32 in the order of the inputs."""
    return reconstruct({f"{key}.{name}": part for name, part in checkpoint.linear(key).items()}, key).float()


@pytest.mark.parametrize("bits", [2.7, 3.5, 4.5, 6.5])
def test_the_bits_attained_are_those_asked_for(tmp_path, bits):
    report = write_synthetic_model(tmp_path / "model", TINY, bits=bits)
    found = inspect_model(tmp_path / "model")
    assert found.problem is None
    assert found.bits_per_weight == pytest.approx(report.bits_per_weight, rel=1e-6)
    assert 0.98 * bits <= report.bits_per_weight <= bits
    assert report.n_linears == 7 * TINY.layers + 1
    assert report.n_bytes == sum(path.stat().st_size for path in (tmp_path / "model").glob("*.safetensors"))


def test_matrices_mix_widths_and_the_head_has_its_own(model_dir):
    widths = {role.role: dict(role.widths) for role in inspect_model(model_dir).roles}
    assert len(widths["mlp.down_proj"]) >= 3
    assert widths["lm_head"].keys() == {8, 6}


def test_matrices_that_read_one_input_share_its_permutation(model_dir):
    checkpoint = Checkpoint.open(model_dir)

    def invperm(role, layer=1):
        return checkpoint.tensor(f"model.layers.{layer}.{role}.q_invperm")

    q = invperm("self_attn.q_proj")
    assert torch.equal(q.sort().values, torch.arange(TINY.hidden, dtype=torch.int32))
    assert not torch.equal(q, q.sort().values)
    for role in ("self_attn.k_proj", "self_attn.v_proj"):
        assert torch.equal(invperm(role), q)
    assert torch.equal(invperm("mlp.gate_proj"), invperm("mlp.up_proj"))
    for other in (invperm("self_attn.o_proj"), invperm("mlp.gate_proj"), invperm("self_attn.q_proj", layer=2)):
        assert not torch.equal(other, q)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_codes_have_mean_zero_at_every_width(bits):
    rng = np.random.Generator(np.random.SFC64(bits))
    packed = torch.from_numpy(synthetic._random_codes(rng, bits, n_chunks=64, width=256).view("int32"))
    codes = synthetic_codes(packed, bits)
    values = codes.double() - (1 << (bits - 1))
    assert (codes.min(), codes.max()) == (0, (1 << bits) - 1)
    assert abs(values.mean()) < 0.01 * values.std()
    assert values.std() == pytest.approx(synthetic._code_std(bits), rel=0.01)


def synthetic_codes(packed, bits):
    """Every code of packed rows, read bit by bit."""
    unsigned = packed.long() & 0xFFFFFFFF
    string = ((unsigned[:, None, :] >> torch.arange(32)[None, :, None]) & 1).reshape(-1, packed.shape[1])
    groups = string.reshape(-1, bits, packed.shape[1])
    return (groups << torch.arange(bits)[None, :, None]).sum(dim=1)


def test_matrices_keep_the_variance_of_their_input(model_dir):
    checkpoint = Checkpoint.open(model_dir)
    for key in ("model.layers.0.self_attn.v_proj", "model.layers.2.mlp.down_proj", "lm_head"):
        matrix = weights(checkpoint, key)
        assert matrix.var() * matrix.shape[0] == pytest.approx(1.0, rel=0.15)
        assert abs(matrix.mean()) < 0.05 * matrix.std()


def test_it_loads_runs_and_gives_every_token_a_text(model_dir):
    with ExL2LLM(model_dir) as llm:
        logits = llm.logits([256, *range(1, 331, 11)])
        assert torch.isfinite(logits).all()
        assert 0.5 < logits.std() < 2.0
        assert abs(logits.mean()) < 0.1
        assert llm.generate("abc", SamplingParams(max_tokens=3, ignore_eos=True)).usage.completion_tokens == 3
        texts = [llm.tokenizer.token_bytes(token_id) for token_id in range(TINY.vocab)]
        assert all(texts)
        assert [texts[byte] for byte in range(256)] == [bytes([byte]) for byte in range(256)]


def test_the_same_arguments_give_the_same_bytes(model_dir, tmp_path):
    write_synthetic_model(tmp_path / "again", TINY, bits=4.5)
    write_synthetic_model(tmp_path / "other", TINY, bits=4.5, seed=1)
    name = "output.safetensors"
    assert (tmp_path / "again" / name).read_bytes() == (model_dir / name).read_bytes()
    assert (tmp_path / "other" / name).read_bytes() != (model_dir / name).read_bytes()


def test_shards_hold_the_same_tensors(model_dir, tmp_path):
    write_synthetic_model(tmp_path / "shards", TINY, bits=4.5, shard_bytes=400_000)
    assert len(list((tmp_path / "shards").glob("output-*-of-*.safetensors"))) > 2
    whole, cut = Checkpoint.open(model_dir), Checkpoint.open(tmp_path / "shards")
    assert whole.names() == cut.names()
    assert all(torch.equal(whole.tensor(name), cut.tensor(name)) for name in whole.names())


def test_a_cached_model_is_written_once(tmp_path):
    target = synthetic_model_dir(tmp_path, "tiny", bits=4.5)
    ensure_synthetic_model(target, TINY, bits=4.5)
    written = (target / "output.safetensors").stat().st_mtime_ns
    ensure_synthetic_model(target, TINY, bits=4.5)
    assert (target / "output.safetensors").stat().st_mtime_ns == written
    assert [path.name for path in tmp_path.iterdir()] == [target.name]


def test_a_leftover_without_config_is_not_taken_for_a_model(tmp_path):
    target = synthetic_model_dir(tmp_path, "tiny", bits=4.5)
    target.mkdir()
    (target / "leftover").write_text("x")
    with pytest.raises(CheckpointError, match="remove it"):
        ensure_synthetic_model(target, TINY, bits=4.5)
    assert [path.name for path in tmp_path.iterdir()] == [target.name]


def test_the_named_shapes_are_those_of_the_published_models():
    llama = SHAPES["llama-8b"]
    assert (llama.hidden, llama.intermediate, llama.layers) == (4096, 14336, 32)
    assert (llama.heads, llama.kv_heads, llama.vocab, llama.rope_theta) == (32, 8, 128256, 500000.0)
    assert (shape_by_name("llama-1.1b").layers, shape_by_name("llama-1.1b").head_dim) == (22, 64)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"bits": 4.5, "head_bits": 7}, "head_bits must be one of"),
        ({"bits": 0}, "positive"),
        ({"bits": float("nan")}, "positive"),
        ({"bits": 1.5}, "smallest layouts"),
        ({"bits": 12}, "cannot be had"),
    ],
)
def test_bits_that_cannot_be_had_are_refused(tmp_path, arguments, message):
    with pytest.raises(SettingsError, match=message):
        write_synthetic_model(tmp_path / "model", TINY, **arguments)
    assert not (tmp_path / "model" / "config.json").exists()


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"heads": 7}, "heads must divide"),
        ({"kv_heads": 3}, "heads must divide"),
        ({"intermediate": 700}, "multiples of 32"),
        ({"vocab": 200}, "at least 258"),
    ],
)
def test_shapes_that_cannot_be_are_refused(sizes, message):
    good = {"hidden": 256, "intermediate": 704, "layers": 4, "heads": 8, "kv_heads": 2, "vocab": 331}
    with pytest.raises(SettingsError, match=message):
        SyntheticShape(**(good | sizes))


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(SettingsError, match=r"llama-1\.1b, llama-8b"):
        shape_by_name("llama-9b")


def test_the_config_says_what_was_asked_for(model_dir):
    config = json.loads((model_dir / "config.json").read_text())
    assert (config["quantization_config"]["bits"], config["quantization_config"]["head_bits"]) == (4.5, 6)
    assert config["quantization_config"]["quant_method"] == "exl2"
