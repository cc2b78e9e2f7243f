"""The header of a tensor file: every way it can be bad has its own error."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from exl2_rag.errors import CheckpointError
from exl2_rag.llm.checkpoint.safetensors_file import read_header

TENSORS = {
    "a": torch.arange(6, dtype=torch.float32).reshape(2, 3),
    "b": torch.arange(5, dtype=torch.int16),
    "c": torch.tensor(1.5, dtype=torch.bfloat16),
    "empty": torch.empty((0, 4), dtype=torch.float16),
}


def raw_file(path: Path, header: Any, data: bytes = b"") -> Path:
    """A file of this header, valid or not, and this data."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def entry(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.safetensors"


def test_what_the_safetensors_library_writes_is_read(path):
    path.write_bytes(save(TENSORS, metadata={"format": "pt"}))
    stored = {tensor.name: tensor for tensor in read_header(path)}
    assert set(stored) == set(TENSORS)
    for name, tensor in TENSORS.items():
        assert stored[name].shape == tuple(tensor.shape)
        assert stored[name].read().dtype == tensor.dtype
        assert torch.equal(stored[name].read(), tensor)


def test_an_empty_file_is_refused(path):
    path.write_bytes(b"")
    with pytest.raises(CheckpointError, match="at least 8 bytes, this one has 0"):
        read_header(path)


def test_a_missing_file_is_refused(path):
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_header(path)


def test_a_header_larger_than_the_file_is_refused(path):
    path.write_bytes((1000).to_bytes(8, "little") + b"{}")
    with pytest.raises(CheckpointError, match="claims 1000 bytes, but only 2 follow"):
        read_header(path)


def test_a_header_of_absurd_size_is_refused_unread(path):
    path.write_bytes((1 << 63).to_bytes(8, "little") + b"{}")
    with pytest.raises(CheckpointError, match="more than the 100000000 allowed"):
        read_header(path)


@pytest.mark.parametrize("text", [b"{", b"\xff\xfe", b"[" * 100_000, b"", b'{"a": 1' + b"0" * 5000 + b"}"])
def test_a_header_that_is_no_json_is_refused(path, text):
    with pytest.raises(CheckpointError, match=r"not valid JSON|must have dtype"):
        read_header(raw_file(path, text))


def test_a_header_that_is_no_object_is_refused(path):
    with pytest.raises(CheckpointError, match="must be a JSON object, it is a list"):
        read_header(raw_file(path, []))


def test_a_name_that_stands_twice_in_a_header_is_refused(path):
    one = json.dumps(entry())
    with pytest.raises(CheckpointError, match="names 'x' twice"):
        read_header(raw_file(path, f'{{"x": {one}, "x": {one}}}'.encode(), bytes(8)))


@pytest.mark.parametrize("bad", [3, None, [], {"dtype": "F32"}, {"dtype": "F32", "shape": [2]}])
def test_an_entry_without_its_three_parts_is_refused(path, bad):
    with pytest.raises(CheckpointError, match="must have dtype, shape and data_offsets"):
        read_header(raw_file(path, {"x": bad}, bytes(8)))


@pytest.mark.parametrize("dtype", ["F7", "", 3, None, ["F32"]])
def test_an_unknown_element_type_is_refused(path, dtype):
    with pytest.raises(CheckpointError, match="unknown element type"):
        read_header(raw_file(path, {"x": entry(dtype=dtype)}, bytes(8)))


@pytest.mark.parametrize("shape", [[-1, 2], [1.5], ["2"], [True, 2], [1] * 17, [1 << 62]])
def test_a_shape_that_is_none_is_refused(path, shape):
    with pytest.raises(CheckpointError, match="list of sizes"):
        read_header(raw_file(path, {"x": entry(shape=shape)}, bytes(8)))


def test_a_shape_that_is_no_list_is_refused(path):
    with pytest.raises(CheckpointError, match="list of sizes"):
        read_header(raw_file(path, {"x": entry() | {"shape": 2}}, bytes(8)))


def test_a_shape_of_too_many_elements_is_refused(path):
    with pytest.raises(CheckpointError, match="more elements than can be counted"):
        read_header(raw_file(path, {"x": entry(shape=(1 << 40, 0, 1 << 40), offsets=(0, 0))}))


@pytest.mark.parametrize("offsets", [[0], [0, 4, 8], [-8, 0], [0.0, 8], [None, 8], [True, 8]])
def test_offsets_that_are_none_are_refused(path, offsets):
    with pytest.raises(CheckpointError, match="two byte offsets"):
        read_header(raw_file(path, {"x": entry(offsets=offsets)}, bytes(8)))


@pytest.mark.parametrize("offsets", [(8, 0), (0, 16), (8, 16)])
def test_offsets_outside_the_file_are_refused(path, offsets):
    with pytest.raises(CheckpointError, match="but the file has 8 bytes of data"):
        read_header(raw_file(path, {"x": entry(offsets=offsets)}, bytes(8)))


def test_offsets_that_do_not_fit_shape_and_type_are_refused(path):
    with pytest.raises(CheckpointError, match=r"of shape \[3\] and type F32 takes 12 bytes, its offsets span 8"):
        read_header(raw_file(path, {"x": entry(shape=(3,))}, bytes(8)))


def test_tensors_that_overlap_are_refused(path):
    header = {"x": entry(), "y": entry(offsets=(4, 12))}
    with pytest.raises(CheckpointError, match="tensors 'x' and 'y' overlap"):
        read_header(raw_file(path, header, bytes(12)))


def test_bytes_between_tensors_are_refused(path):
    header = {"x": entry(), "y": entry(offsets=(12, 20))}
    with pytest.raises(CheckpointError, match="4 bytes between x and 'y' belong to no tensor"):
        read_header(raw_file(path, header, bytes(20)))


def test_bytes_after_the_last_tensor_are_refused(path):
    with pytest.raises(CheckpointError, match="3 bytes after 'x' belong to no tensor"):
        read_header(raw_file(path, {"x": entry()}, bytes(11)))


def test_a_truncated_file_is_refused(path):
    path.write_bytes(save(TENSORS)[:-1])
    with pytest.raises(CheckpointError, match="truncated or damaged"):
        read_header(path)


def test_a_file_truncated_after_its_header_was_read_is_refused(path):
    path.write_bytes(save(TENSORS))
    stored = next(tensor for tensor in read_header(path) if tensor.name == "a")
    path.write_bytes(path.read_bytes()[: stored.start + 4])
    with pytest.raises(CheckpointError, match="should have 24 bytes, 4 are left"):
        stored.read()


def test_a_file_removed_after_its_header_was_read_is_refused(path):
    path.write_bytes(save(TENSORS))
    stored = read_header(path)[0]
    path.unlink()
    with pytest.raises(CheckpointError, match="cannot be read"):
        stored.read()


def test_an_element_type_that_we_do_not_read_may_stand_in_the_file(path):
    (stored,) = read_header(raw_file(path, {"x": entry(dtype="F8_E4M3", offsets=(0, 2))}, bytes(2)))
    with pytest.raises(CheckpointError, match="elements of type F8_E4M3"):
        stored.read()


FUZZED = save(TENSORS, metadata={"format": "pt"})


def read_all(path: Path) -> None:
    """Read everything; the only error a file may cause is ours."""
    try:
        tensors = read_header(path)
    except CheckpointError:
        return
    for tensor in tensors:
        try:
            assert tuple(tensor.read().shape) == tensor.shape
        except CheckpointError:
            continue


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(flips=st.lists(st.tuples(st.integers(0, len(FUZZED) - 1), st.integers(1, 255)), min_size=1, max_size=8))
def test_flipped_bytes_never_raise_anything_but_our_error(tmp_path, flips):
    data = bytearray(FUZZED)
    for place, change in flips:
        data[place] ^= change
    (tmp_path / "fuzz.safetensors").write_bytes(data)
    read_all(tmp_path / "fuzz.safetensors")


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.one_of(st.binary(max_size=200), st.integers(0, len(FUZZED)).map(lambda count: FUZZED[:count])))
def test_any_bytes_at_all_never_raise_anything_but_our_error(tmp_path, data):
    (tmp_path / "fuzz.safetensors").write_bytes(data)
    read_all(tmp_path / "fuzz.safetensors")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
ENTRY = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "I16", "U8", "F8_E4M3", "X"]) | JSON,
        "shape": st.lists(st.integers(-1, 4) | st.integers(), max_size=3) | JSON,
        "data_offsets": st.tuples(st.integers(0, 40), st.integers(0, 40)).map(list) | JSON,
    }
)


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(header=st.dictionaries(st.text(max_size=5), ENTRY | JSON, max_size=3), size=st.integers(0, 40))
def test_any_json_header_never_raises_anything_but_our_error(tmp_path, header, size):
    read_all(raw_file(tmp_path / "fuzz.safetensors", header, bytes(size)))
