"""A model directory: where tensors are found, and every way a layer's tensors can be bad."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from exl2_rag.errors import CheckpointError, ModelNotFoundError
from exl2_rag.llm.checkpoint import Checkpoint, pack, reconstruct
from tests.support.golden import golden

GROUPS = [(8, 32), (5, 64), (5, 32), (3, 32)]


def exl2_layer() -> dict[str, torch.Tensor]:
    rng = torch.Generator().manual_seed(0)
    codes = torch.cat([torch.randint(0, 1 << bits, (rows, 64), generator=rng) for bits, rows in GROUPS])
    scales = torch.randint(1, 17, (4, 64), generator=rng)
    return pack(codes, scales, torch.full((4,), 0.01), GROUPS, torch.randperm(160, generator=rng))


def gptq_layer() -> dict[str, torch.Tensor]:
    layer = golden("gptq4_g32_actorder")
    return layer.parts()


def model(directory, parts: dict[str, torch.Tensor], key: str = "layer") -> Checkpoint:
    save_file({f"{key}.{name}": part.contiguous() for name, part in parts.items()}, directory / "model.safetensors")
    return Checkpoint.open(directory)


# ---- the directory ----


def test_tensors_are_found_in_whatever_file_they_lie(tmp_path):
    save_file({"a": torch.ones(2)}, tmp_path / "model-00001-of-00002.safetensors")
    save_file({"b": torch.zeros(3)}, tmp_path / "zzz.safetensors")
    checkpoint = Checkpoint.open(tmp_path)
    assert checkpoint.names() == ["a", "b"]
    assert checkpoint.has("b")
    assert not checkpoint.has("c")
    assert torch.equal(checkpoint.tensor("b"), torch.zeros(3))
    assert checkpoint.shape("a") == (2,)
    assert checkpoint.total_bytes() == 20


def test_a_stale_index_is_ignored(tmp_path):
    save_file({"a": torch.ones(2)}, tmp_path / "output.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-00001-of-00009.safetensors"}}')
    assert Checkpoint.open(tmp_path).names() == ["a"]


def test_a_missing_directory_is_named(tmp_path):
    with pytest.raises(ModelNotFoundError, match=r"no model directory at .*nowhere"):
        Checkpoint.open(tmp_path / "nowhere")


def test_a_directory_without_tensors_is_no_model(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(ModelNotFoundError, match=r"holds no \*\.safetensors"):
        Checkpoint.open(tmp_path)


def test_a_tensor_in_two_files_is_refused(tmp_path):
    save_file({"a": torch.ones(2), "b": torch.ones(1)}, tmp_path / "one.safetensors")
    save_file({"a": torch.ones(2)}, tmp_path / "two.safetensors")
    with pytest.raises(CheckpointError, match=r"'a' is in both one\.safetensors and two\.safetensors"):
        Checkpoint.open(tmp_path)


def test_a_damaged_file_is_named(tmp_path):
    save_file({"a": torch.ones(2)}, tmp_path / "one.safetensors")
    (tmp_path / "two.safetensors").write_bytes(b"1234")
    with pytest.raises(CheckpointError, match=r"two\.safetensors"):
        Checkpoint.open(tmp_path)


def test_a_tensor_that_is_not_there_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="no tensor 'x'"):
        model(tmp_path, exl2_layer()).tensor("x")


def test_kinds_are_told_by_names(tmp_path):
    save_file(
        {"e.q_weight": torch.ones(1), "g.qweight": torch.ones(1), "d.weight": torch.ones(1), "e.weight": torch.ones(1)},
        tmp_path / "m.safetensors",
    )
    checkpoint = Checkpoint.open(tmp_path)
    assert [checkpoint.kind(key) for key in ("e", "g", "d", "x")] == ["exl2", "gptq", "dense", None]


def test_sizes_are_known_without_decoding(tmp_path):
    parts = exl2_layer() | {"bias": torch.zeros(64, dtype=torch.float16)}
    size = model(tmp_path, parts).layer_sizes()["layer"]
    assert (size.kind, size.in_features, size.out_features) == ("exl2", 160, 64)
    assert size.widths == ((8, 32), (5, 96), (3, 32))
    assert size.n_bytes == sum(part.nbytes for part in parts.values())
    assert size.bits_per_weight == size.n_bytes * 8 / (160 * 64)


# ---- good layers ----


def test_an_exl2_layer_comes_with_its_parts(tmp_path):
    parts = exl2_layer() | {"bias": torch.ones(64, dtype=torch.float16)}
    loaded = model(tmp_path, parts).linear("layer")
    assert set(loaded) == set(parts)
    for name, part in parts.items():
        assert torch.equal(loaded[name], part)


def test_gptq_and_dense_layers_come_with_their_parts(tmp_path):
    assert set(model(tmp_path, gptq_layer()).linear("layer")) == {"qweight", "qzeros", "scales", "g_idx"}
    dense = {"weight": torch.ones(3, 5, dtype=torch.bfloat16), "bias": torch.ones(3)}
    assert set(model(tmp_path, dense).linear("layer")) == {"weight", "bias"}


# ---- bad EXL2 layers: one fault each ----


def groups_of(*pairs: int) -> torch.Tensor:
    return torch.tensor(pairs, dtype=torch.int16)


EXL2_FAULTS = {
    "a part is missing": ("q_scale", lambda t: None, r"layer\.q_scale is missing"),
    "a wrong element type": ("q_weight", lambda t: t.to(torch.float32), r"q_weight must be torch\.int32"),
    "scales of a wrong type": ("q_scale_max", lambda t: t.float(), r"q_scale_max must be torch\.float16"),
    "a wrong number of dimensions": ("q_invperm", lambda t: t[None], r"q_invperm must be torch\.int32 with 1 dim"),
    "columns that fill no tile": ("q_weight", lambda t: t[:, :48], "multiple of 32 columns, it has 48"),
    "no columns": ("q_weight", lambda t: t[:, :0], "multiple of 32 columns, it has 0"),
    "half a pair of a group": ("q_groups", lambda t: t[:-1], "it holds 7 numbers"),
    "no groups": ("q_groups", lambda t: t[:0], "it holds 0 numbers"),
    "7 bits": ("q_groups", lambda t: groups_of(7, 0, 5, 8, 5, 18, 3, 23), "7 bits"),
    "a first row that is not 0": ("q_groups", lambda t: groups_of(8, 1, 5, 8, 5, 18, 3, 23), "instead of 0"),
    "groups that overlap": ("q_groups", lambda t: groups_of(8, 0, 5, 18, 5, 8, 3, 23), "groups overlap"),
    "a group past the end": ("q_groups", lambda t: groups_of(8, 0, 5, 8, 5, 18, 3, 99), "groups overlap"),
    "a group of no whole chunk": ("q_groups", lambda t: groups_of(8, 0, 5, 8, 5, 17, 3, 23), "9 packed rows of 5 bits"),
    "widths that rise": ("q_groups", lambda t: groups_of(5, 0, 8, 5, 5, 13, 3, 23), "must not rise"),
    "a packed row too few": ("q_weight", lambda t: t[:-1], "2 packed rows of 3 bits"),
    "packed rows too many": ("q_weight", lambda t: torch.cat((t, t[:3])), "describes 192 rows"),
    "scales of too few groups": ("q_scale", lambda t: t[:-1], r"q_scale must be \[4, 8\]"),
    "scales of too few columns": ("q_scale", lambda t: t[:, :-1], r"q_scale must be \[4, 8\]"),
    "multipliers of too few groups": ("q_scale_max", lambda t: t[:-1], r"q_scale_max must be \[4\]"),
    "a multiplier that is infinite": ("q_scale_max", lambda t: t / 0, "not finite"),
    "a multiplier that is no number": ("q_scale_max", lambda t: t * float("nan"), "not finite"),
    "too few inputs": ("q_invperm", lambda t: t[:-1], "describes 160 rows, but layer.q_invperm has 159"),
    "an input out of range": ("q_invperm", lambda t: t + 1, "runs from 1 to 160"),
    "a negative input": ("q_invperm", lambda t: t - 1, "runs from -1 to 158"),
    "a stored row named twice": ("q_invperm", lambda t: t.clamp(max=158), "names a stored row twice"),
    "a bias of the wrong width": ("bias", lambda t: torch.zeros(63, dtype=torch.float16), r"bias must be .* \[64\]"),
    "a bias of whole numbers": ("bias", lambda t: torch.zeros(64, dtype=torch.int32), r"bias must be floating"),
}


@pytest.mark.parametrize("fault", EXL2_FAULTS)
def test_a_bad_exl2_layer_is_refused(tmp_path, fault):
    part, change, message = EXL2_FAULTS[fault]
    parts = exl2_layer()
    changed = change(parts.get(part))
    parts = {name: tensor for name, tensor in parts.items() if name != part}
    if changed is not None:
        parts[part] = changed
    checkpoint = model(tmp_path, parts)
    with pytest.raises(CheckpointError, match=message):
        checkpoint.linear("layer")
    if part != "bias":
        with pytest.raises(CheckpointError, match=message):
            reconstruct({f"layer.{name}": tensor for name, tensor in parts.items()}, "layer")


def test_zero_scales_are_legal(tmp_path):
    parts = exl2_layer() | {"q_scale_max": torch.zeros(4, dtype=torch.float16)}
    assert not model(tmp_path, parts).linear("layer")["q_scale_max"].any()


# ---- bad GPTQ layers ----

GPTQ_FAULTS = {
    "a part is missing": ("qzeros", lambda t: None, r"layer\.qzeros is missing"),
    "codes of a wrong type": ("qweight", lambda t: t.to(torch.int64), r"qweight must be torch\.int32"),
    "scales of a wrong type": ("scales", lambda t: t.to(torch.int32), "scales must be torch.float16 or"),
    "a wrong number of dimensions": ("scales", lambda t: t[None], "2 dimensions"),
    "columns that fill no tile": ("qweight", lambda t: t[:, :-8], "multiple of 32 columns"),
    "zero points of too few columns": ("qzeros", lambda t: t[:, :-1], "only 4-bit GPTQ is supported"),
    "zero points of too few groups": ("qzeros", lambda t: t[:-1], "only 4-bit GPTQ is supported"),
    "scales that are not finite": ("scales", lambda t: t / 0, "not finite"),
    "a group out of range": ("g_idx", lambda t: t + 1, r"must be 0 to 7, it runs from 1 to 8"),
    "a negative group": ("g_idx", lambda t: t - 1, r"must be 0 to 7, it runs from -1 to 6"),
    "groups of too few rows": ("g_idx", lambda t: t[:-1], r"g_idx must be int32 \[256\]"),
    "groups of a wrong type": ("g_idx", lambda t: t.to(torch.int16), r"g_idx must be int32 \[256\]"),
}


@pytest.mark.parametrize("fault", GPTQ_FAULTS)
def test_a_bad_gptq_layer_is_refused(tmp_path, fault):
    part, change, message = GPTQ_FAULTS[fault]
    parts = gptq_layer()
    changed = change(parts[part])
    parts = {name: tensor for name, tensor in parts.items() if name != part}
    if changed is not None:
        parts[part] = changed
    with pytest.raises(CheckpointError, match=message):
        model(tmp_path, parts).linear("layer")


# ---- bad plain layers ----


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (torch.ones(4), "2 dimensions"),
        (torch.ones(4, 4, dtype=torch.int32), "must be float16, bfloat16 or float32"),
        (torch.ones(4, 4, dtype=torch.float64), "must be float16, bfloat16 or float32"),
    ],
)
def test_a_bad_plain_layer_is_refused(tmp_path, weight, message):
    with pytest.raises(CheckpointError, match=message):
        model(tmp_path, {"weight": weight}).linear("layer")


def test_a_layer_that_is_not_there_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="no layer 'other'"):
        model(tmp_path, exl2_layer()).linear("other")
    with pytest.raises(CheckpointError, match="no quantised layer 'other'"):
        reconstruct({}, "other")


# ---- packing what the format cannot hold ----


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"groups": [(4, 32)]}, "groups must have 64 rows in all"),
        ({"groups": [(7, 64)]}, "cannot be stored"),
        ({"groups": [(4, 48), (4, 16)], "scales": torch.ones(2, 32)}, "cannot be stored"),
        ({"groups": [(3, 32), (4, 32)], "scales": torch.ones(2, 32)}, "must not rise"),
        ({"codes": torch.full((64, 32), 16)}, "codes of group 0 must be 0 to 15"),
        ({"codes": torch.full((64, 32), -1)}, "codes of group 0 must be 0 to 15"),
        ({"codes": torch.zeros(64, 40, dtype=torch.int64)}, "multiple of 32"),
        ({"scales": torch.zeros(1, 32)}, "scales must be 1 to 16, they run from 0"),
        ({"scales": torch.full((1, 32), 17)}, "scales must be 1 to 16"),
        ({"scale_max": torch.tensor([float("inf")])}, "not finite"),
        ({"invperm": torch.zeros(64)}, "names a stored row twice"),
    ],
)
def test_what_the_format_cannot_hold_is_not_packed(change, message):
    arguments = {
        "codes": torch.zeros(64, 32, dtype=torch.int64),
        "scales": torch.ones(1, 32, dtype=torch.int64),
        "scale_max": torch.tensor([0.01]),
        "groups": [(4, 64)],
    }
    with pytest.raises(CheckpointError, match=message):
        pack(**arguments | change)
