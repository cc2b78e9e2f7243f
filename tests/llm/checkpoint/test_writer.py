from __future__ import annotations

import pytest
import torch

from exl2_rag.errors import CheckpointError
from exl2_rag.llm.checkpoint import Checkpoint
from exl2_rag.llm.checkpoint.writer import write_checkpoint


def some_tensors() -> dict[str, torch.Tensor]:
    return {f"t{index}": torch.full((10, 10), float(index), dtype=torch.float16) for index in range(5)}


def test_what_was_written_is_read_back(tmp_path):
    tensors = some_tensors() | {"words": torch.arange(7, dtype=torch.int32), "one": torch.tensor(2.5)}
    paths = write_checkpoint(tmp_path / "model", tensors)
    assert [path.name for path in paths] == ["output.safetensors"]
    checkpoint = Checkpoint.open(tmp_path / "model")
    assert checkpoint.names() == sorted(tensors)
    for name, tensor in tensors.items():
        assert torch.equal(checkpoint.tensor(name), tensor)
        assert checkpoint.tensor(name).dtype == tensor.dtype


def test_shards_hold_at_most_the_bytes_asked_for(tmp_path):
    paths = write_checkpoint(tmp_path, some_tensors(), shard_bytes=450)
    assert [path.name for path in paths] == [f"output-0000{index}-of-00003.safetensors" for index in (1, 2, 3)]
    assert Checkpoint.open(tmp_path).names() == [f"t{index}" for index in range(5)]


def test_a_tensor_larger_than_a_shard_has_one_to_itself(tmp_path):
    paths = write_checkpoint(tmp_path, some_tensors(), shard_bytes=50)
    assert len(paths) == 5


def test_tensors_that_share_memory_are_written_twice(tmp_path):
    tensor = torch.arange(6.0)
    write_checkpoint(tmp_path, {"a": tensor, "b": tensor, "c": tensor[::2]})
    checkpoint = Checkpoint.open(tmp_path)
    assert torch.equal(checkpoint.tensor("b"), tensor)
    assert torch.equal(checkpoint.tensor("c"), tensor[::2])


def test_a_directory_that_holds_a_model_is_left_alone(tmp_path):
    write_checkpoint(tmp_path, some_tensors())
    with pytest.raises(CheckpointError, match=r"holds output\.safetensors already"):
        write_checkpoint(tmp_path, {"other": torch.zeros(1)})
    assert Checkpoint.open(tmp_path).has("t0")


def test_nothing_to_write_is_an_error(tmp_path):
    with pytest.raises(CheckpointError, match="no tensors"):
        write_checkpoint(tmp_path, {})
    with pytest.raises(CheckpointError, match="positive"):
        write_checkpoint(tmp_path, some_tensors(), shard_bytes=0)


def test_a_failed_write_leaves_no_file_behind(tmp_path):
    with pytest.raises(Exception, match="meta"):
        write_checkpoint(tmp_path, {"good": torch.zeros(4), "bad": torch.empty(4, device="meta")}, shard_bytes=8)
    assert list(tmp_path.iterdir()) == []
