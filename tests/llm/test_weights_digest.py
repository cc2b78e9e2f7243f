from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from exl2_rag.errors import CheckpointError
from exl2_rag.llm import weights_digest as module
from exl2_rag.llm.weights_digest import digest_file, header_digest, weights_digest


@pytest.fixture
def model_dir(tmp_path: Path) -> Path:
    path = tmp_path / "model"
    path.mkdir()
    header = b'{"__metadata__":{}}'
    (path / "a.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + os.urandom(5000))
    (path / "b.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    return path


@pytest.fixture
def kept_in(tmp_path: Path) -> Path:
    return tmp_path / "cache" / "weights.json"


def flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("place", [27, 3000, 5026])
def test_every_byte_counts(model_dir: Path, kept_in: Path, place: int) -> None:
    before, headers = weights_digest(model_dir, kept_in=kept_in), header_digest(model_dir)
    flip(model_dir / "a.safetensors", place)
    assert weights_digest(model_dir, kept_in=kept_in) != before
    assert header_digest(model_dir) == headers  # which is why it does not do for a store
    flip(model_dir / "a.safetensors", place)
    assert weights_digest(model_dir, kept_in=kept_in) == before


def test_slices_are_put_together_in_order(model_dir: Path, kept_in: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = weights_digest(model_dir, kept_in=kept_in)
    monkeypatch.setattr(module, "_SLICE_BYTES", 1000)
    cut = weights_digest(model_dir, kept_in=kept_in.with_name("other.json"))
    assert cut == weights_digest(model_dir, kept_in=kept_in.with_name("third.json")) != whole
    path = model_dir / "a.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[1000:2000] + content[:1000] + content[2000:])
    assert weights_digest(model_dir, kept_in=kept_in.with_name("fourth.json")) != cut


def test_a_file_is_hashed_once(model_dir: Path, kept_in: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = weights_digest(model_dir, kept_in=kept_in)
    monkeypatch.setattr(module, "_hash_file", None)
    assert weights_digest(model_dir, kept_in=kept_in) == before


def test_a_copy_elsewhere_has_the_same_digest(model_dir: Path, kept_in: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(model_dir, copy)
    assert weights_digest(copy, kept_in=kept_in) == weights_digest(model_dir, kept_in=kept_in)
    assert len(json.loads(kept_in.read_text())) == 4


def test_a_time_of_change_set_back_does_not_hide_a_change(model_dir: Path, kept_in: Path) -> None:
    path = model_dir / "a.safetensors"
    before, status = weights_digest(model_dir, kept_in=kept_in), path.stat()
    flip(path, 3000)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert weights_digest(model_dir, kept_in=kept_in) != before


@pytest.mark.parametrize("content", ["", "[1, 2]", "{", '{"x": 3}'])
def test_a_damaged_file_of_digests_costs_a_computation_and_no_more(
    model_dir: Path, kept_in: Path, content: str
) -> None:
    before = weights_digest(model_dir, kept_in=kept_in)
    kept_in.write_text(content)
    assert weights_digest(model_dir, kept_in=kept_in) == before


def test_digests_that_cannot_be_kept_are_said_and_returned(
    model_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("in the way")
    assert weights_digest(model_dir, kept_in=tmp_path / "file" / "weights.json").startswith("sha256:")
    assert "are not kept" in caplog.text


def test_a_file_that_cannot_be_read_is_named(model_dir: Path, kept_in: Path) -> None:
    (model_dir / "c.safetensors").symlink_to(model_dir / "gone")
    with pytest.raises(CheckpointError, match=r"c\.safetensors"):
        weights_digest(model_dir, kept_in=kept_in)
    with pytest.raises(CheckpointError, match=r"c\.safetensors"):
        header_digest(model_dir)


def test_digests_are_kept_where_the_environment_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EXL2_RAG_CACHE", str(tmp_path))
    assert digest_file() == tmp_path / "weights.json"
