from __future__ import annotations

from pathlib import Path

import pytest

from exl2_rag.llm.fingerprint import cache_fingerprint
from tests.support.synthetic import make_model_dir


@pytest.fixture
def model_dir(tmp_path: Path) -> Path:
    return make_model_dir(tmp_path / "model")


def test_the_same_model_and_settings_have_the_same_fingerprint(model_dir: Path, tmp_path: Path) -> None:
    copy = make_model_dir(tmp_path / "elsewhere")
    assert cache_fingerprint(model_dir, cache_dtype="fp16") == cache_fingerprint(copy, cache_dtype="fp16")


def test_settings_count(model_dir: Path) -> None:
    found = {cache_fingerprint(model_dir, **one) for one in ({}, {"a": "1"}, {"a": "2"}, {"b": "1"}, {"a": 1})}
    assert len(found) == 5


def test_a_changed_config_counts(model_dir: Path) -> None:
    before = cache_fingerprint(model_dir)
    path = model_dir / "config.json"
    path.write_text(path.read_text().replace("10000.0", "20000.0"))
    assert cache_fingerprint(model_dir) != before


def test_another_tensor_file_counts(model_dir: Path, tmp_path: Path) -> None:
    other = make_model_dir(tmp_path / "other", layers=3)
    (other / "config.json").write_bytes((model_dir / "config.json").read_bytes())
    assert cache_fingerprint(other) != cache_fingerprint(model_dir)
