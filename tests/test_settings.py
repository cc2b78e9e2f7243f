"""Settings files: every key documented, unknown ones refused, values checked."""

import re
from pathlib import Path

import pytest

from exl2_rag.errors import SettingsError
from exl2_rag.settings import Settings, builtin_names, load_settings

CONFIGS = Path(__file__).parent.parent / "configs"


@pytest.mark.parametrize("name", ["default", "cpu-small", "gpu-24gb", "rag-default"])
def test_every_built_in_file_loads(name: str) -> None:
    assert name in builtin_names()
    assert isinstance(load_settings(name), Settings)


def test_the_default_file_says_exactly_the_defaults() -> None:
    assert load_settings("default") == Settings()


def test_the_default_file_documents_every_key() -> None:
    text = (CONFIGS / "default.toml").read_text(encoding="utf-8")
    for section, field in Settings.model_fields.items():
        body = text.split(f"[{section}]")[1].split("\n[")[0]
        documented = set(re.findall(r"^(?:#: )?(\w+) = ", body, flags=re.MULTILINE))
        assert documented == set(type(field.default).model_fields), section


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[engine]\ndevise = 'cpu'", "engine.devise"),
        ("[motor]\nx = 1", "motor"),
        ("[engine]\nmax_batch_size = 0", "engine.max_batch_size"),
        ("[engine]\ncache_dtype = 'int4'", "int4"),
        ("[sampling]\ntemperature = 'warm'", "sampling.temperature"),
        ("[retrieval]\ndense_weight = 1.5", "retrieval.dense_weight"),
        ("[engine\n", "not a TOML file"),
    ],
)
def test_a_wrong_file_is_refused_by_name(tmp_path: Path, text: str, expected: str) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(SettingsError, match=re.escape(expected)):
        load_settings(path)


def test_a_missing_file_names_the_built_in_ones() -> None:
    with pytest.raises(SettingsError, match="cpu-small"):
        load_settings("no-such-file")


def test_what_a_file_leaves_out_keeps_its_default(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text("[sampling]\ntemperature = 0.0\n", encoding="utf-8")
    settings = load_settings(path)
    assert settings.sampling.temperature == 0.0
    assert settings.engine == Settings().engine
