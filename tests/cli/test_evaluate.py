"""`eval ppl` and `eval kl` show and print figures; what cannot be measured is one line."""

import json
from pathlib import Path

import pytest

from tests.cli.conftest import Run


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("A small text to measure with, and a few words more. " * 4)
    return path


def test_perplexity_is_shown_and_printed(run: Run, model_dir: Path, text: Path) -> None:
    result = run("eval", "ppl", model_dir, "--text", text, "--length", 64)
    assert result.exit_code == 0, result.output
    assert "perplexity" in result.stdout
    report = json.loads(run("eval", "ppl", model_dir, "--text", text, "--length", 64, "--tokens", 50, "--json").stdout)
    assert report["n_tokens"] == 50
    assert report["perplexity"] > 1
    assert report["length"] == report["stride"] == 64


def test_divergence_is_shown_and_printed(run: Run, model_dir: Path, text: Path) -> None:
    command = ("eval", "kl", model_dir, model_dir, "--text", text, "--length", 64, "--tokens", 80)
    result = run(*command)
    assert result.exit_code == 0, result.output
    assert "mean KL" in result.stdout
    report = json.loads(run(*command, "--json").stdout)
    assert report["mean_kl"] == 0
    assert sum(one["n_tokens"] for one in report["segments"]) == 80


def test_a_missing_text_is_one_line(run: Run, model_dir: Path, tmp_path: Path) -> None:
    assert "--text FILE" in run("eval", "ppl", model_dir).output
    result = run("eval", "kl", model_dir, model_dir, "--text", tmp_path / "nowhere")
    assert result.exit_code == 1
    assert "no file or folder" in result.output.replace("\n", " ")
