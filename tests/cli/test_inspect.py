"""`inspect` shows what is in a model directory, without loading it."""

import json
from pathlib import Path

import pytest

from exl2_rag.cli.inspect import size
from tests.cli.conftest import Run


def test_it_shows_architecture_bits_and_what_fits(run: Run, model_dir: Path) -> None:
    result = run("inspect", model_dir)
    assert result.exit_code == 0, result.output
    for text in ("LlamaForCausalLM", "self_attn.q_proj", "exl2", "bits a weight", "24 GiB card"):
        assert text in result.stdout


def test_json_has_every_role(run: Run, model_dir: Path) -> None:
    report = json.loads(run("inspect", model_dir, "--json").stdout)
    assert report["architecture"] == "LlamaForCausalLM"
    assert {"mlp.down_proj", "lm_head"} <= {role["role"] for role in report["roles"]}


def test_a_model_that_cannot_be_run_says_why(run: Run, model_dir: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in model_dir.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    config = json.loads((copy / "config.json").read_text(encoding="utf-8"))
    config["architectures"] = ["FancyForCausalLM"]
    (copy / "config.json").write_text(json.dumps(config), encoding="utf-8")
    result = run("inspect", copy)
    assert result.exit_code == 0
    assert "cannot be run" in result.stdout
    assert "FancyForCausalLM" in result.stdout


def test_an_empty_directory_is_an_error(run: Run, tmp_path: Path) -> None:
    result = run("inspect", tmp_path)
    assert result.exit_code == 1
    assert "config.json" in result.stderr


@pytest.mark.parametrize(
    ("n_bytes", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (5 << 20, "5.0 MiB"), (3 << 40, "3072.0 GiB")],
)
def test_sizes_are_readable(n_bytes: int, text: str) -> None:
    assert size(n_bytes) == text
