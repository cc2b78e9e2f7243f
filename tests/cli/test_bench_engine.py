"""`bench engine` measures the engine's promises on any model."""

import json
from pathlib import Path

from tests.cli.conftest import Run

SMALL = ("--prefix", 200, "--prompt", 300, "--streams", 2, "--questions", 3, "--repeats", 1, "--threads", 1)


def test_every_measurement_gives_its_figures(run: Run, model_dir: Path) -> None:
    result = run("bench", "engine", "--model", model_dir, *SMALL, "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout.splitlines()[-1])
    assert report["prefix-reuse"]["prefix_tokens_computed_again"] == 0
    assert report["prefix-reuse"]["warm_ms"] > 0
    shared = report["shared-prefix"]
    assert shared["prefix_tokens_computed_again"] == 0
    assert shared["pages_used"] <= shared["pages_allowed"]
    gap = report["inter-token-gap"]
    assert gap["gap_p50_ms"] <= gap["gap_p99_ms"] <= gap["gap_max_ms"]
    assert gap["gaps"] > 0
    assert gap["promised_ratio"] == 3.0


def test_one_can_be_chosen_and_shown_as_a_table(run: Run, model_dir: Path) -> None:
    result = run("bench", "engine", "--model", model_dir, *SMALL, "--only", "prefix-reuse")
    assert result.exit_code == 0, result.output
    assert "warm share" in result.stdout
    assert "inter-token-gap" not in result.stdout


def test_an_unknown_measurement_is_refused_by_name(run: Run, model_dir: Path) -> None:
    result = run("bench", "engine", "--model", model_dir, "--only", "speed")
    assert result.exit_code == 1
    assert "--only takes prefix-reuse, shared-prefix, inter-token-gap; got speed" in result.output


def test_sizes_that_make_no_sense_are_refused(run: Run, model_dir: Path) -> None:
    result = run("bench", "engine", "--model", model_dir, "--prompt", 10, "--computed", 10)
    assert result.exit_code == 1
    assert "computed_tokens must be from 0 to prompt_tokens - 1" in result.output
