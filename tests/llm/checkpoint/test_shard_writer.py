"""Tensors that come one by one end up in numbered files, all or none."""

from __future__ import annotations

import pytest
import torch

from exl2_rag.errors import CheckpointError
from exl2_rag.llm.checkpoint import Checkpoint
from exl2_rag.llm.checkpoint.shard_writer import ShardWriter


def write(directory, tensors, shard_bytes):
    with ShardWriter(directory, shard_bytes) as writer:
        for name, tensor in tensors.items():
            writer.add(name, tensor)


def some_tensors() -> dict[str, torch.Tensor]:
    return {f"t{index}": torch.full((10, 10), float(index), dtype=torch.float16) for index in range(5)}


@pytest.mark.parametrize(
    ("shard_bytes", "names"),
    [
        (1000, ["output.safetensors"]),
        (999, ["output-00001-of-00002.safetensors", "output-00002-of-00002.safetensors"]),
        (450, [f"output-0000{index}-of-00003.safetensors" for index in (1, 2, 3)]),
        (50, [f"output-0000{index}-of-00005.safetensors" for index in (1, 2, 3, 4, 5)]),
    ],
)
def test_files_hold_at_most_the_bytes_asked_for(tmp_path, shard_bytes, names):
    write(tmp_path, some_tensors(), shard_bytes)
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    checkpoint = Checkpoint.open(tmp_path)
    assert checkpoint.names() == sorted(some_tensors())
    for name, tensor in some_tensors().items():
        assert torch.equal(checkpoint.tensor(name), tensor)


def tensors_until(error):
    """Tensors as a model gives them, until something goes wrong."""
    yield from some_tensors().items()
    raise error


def test_nothing_stays_of_what_was_interrupted(tmp_path):
    def interrupted():
        with ShardWriter(tmp_path, 250) as writer:
            for name, tensor in tensors_until(RuntimeError("stopped")):
                writer.add(name, tensor)

    with pytest.raises(RuntimeError, match="stopped"):
        interrupted()
    assert list(tmp_path.iterdir()) == []


def test_a_name_comes_once_even_when_its_file_is_full(tmp_path):
    with ShardWriter(tmp_path, 200) as writer:
        for name, tensor in some_tensors().items():
            writer.add(name, tensor)
        with pytest.raises(CheckpointError, match="two tensors named 't0'"):
            writer.add("t0", torch.zeros(1))


def test_a_directory_with_a_model_is_refused(tmp_path):
    write(tmp_path, some_tensors(), 1000)
    with pytest.raises(CheckpointError, match="already"):
        ShardWriter(tmp_path)


def test_nothing_to_write_is_an_error(tmp_path):
    with pytest.raises(CheckpointError, match="no tensors"), ShardWriter(tmp_path):
        pass


def test_a_shard_of_no_bytes_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="positive"):
        ShardWriter(tmp_path, 0)
