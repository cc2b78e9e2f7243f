"""`generate` and `chat` on a random model: what counts is the form, not the sense."""

import json
from pathlib import Path

from tests.cli.conftest import Run


def test_json_output_is_one_object_with_text_and_usage(run: Run, model_dir: Path) -> None:
    result = run("generate", "Hello", "--model", model_dir, "--max-tokens", 5, "--temperature", 0, "--json")
    assert result.exit_code == 0, result.output
    value = json.loads(result.stdout)
    assert value["usage"]["completion_tokens"] == len(value["token_ids"]) <= 5
    assert value["finish_reason"] in ("stop", "length")


def test_streamed_text_is_the_generated_text(run: Run, model_dir: Path) -> None:
    options = ("--model", model_dir, "--max-tokens", 8, "--temperature", 0)
    whole = json.loads(run("generate", "Hello", *options, "--json").stdout)["text"]
    assert run("generate", "Hello", *options).stdout == whole + "\n"


def test_a_prompt_can_come_from_standard_input(run: Run, model_dir: Path) -> None:
    options = ("--model", model_dir, "--max-tokens", 8, "--temperature", 0, "--json")
    given, piped = run("generate", "Hello", *options), run("generate", "-", *options, text="Hello")
    assert json.loads(given.stdout)["token_ids"] == json.loads(piped.stdout)["token_ids"]


def test_a_seed_repeats_the_text(run: Run, model_dir: Path) -> None:
    options = ("--model", model_dir, "--max-tokens", 8, "--temperature", 1.5, "--json", "--seed")
    first, second, other = (json.loads(run("generate", "Hello", *options, seed).stdout) for seed in (1, 1, 2))
    assert first["token_ids"] == second["token_ids"] != other["token_ids"]


def test_output_obeys_a_schema_file(run: Run, model_dir: Path, tmp_path: Path) -> None:
    schema = {"type": "object", "properties": {"n": {"enum": [1, 2]}}, "required": ["n"], "additionalProperties": False}
    (tmp_path / "schema.json").write_text(json.dumps(schema), encoding="utf-8")
    result = run("generate", "Hello", "--model", model_dir, "--schema", tmp_path / "schema.json", "--json")
    assert json.loads(json.loads(result.stdout)["text"])["n"] in (1, 2)


def test_a_broken_schema_file_is_one_line_on_standard_error(run: Run, model_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "schema.json").write_text("{", encoding="utf-8")
    result = run("generate", "Hello", "--model", model_dir, "--schema", tmp_path / "schema.json")
    assert result.exit_code == 1
    assert "expected a JSON Schema file" in result.stderr
    assert result.stdout == ""


def test_a_missing_model_names_its_path(run: Run, tmp_path: Path) -> None:
    result = run("generate", "Hello", "--model", tmp_path / "nowhere")
    assert result.exit_code == 1
    assert str(tmp_path / "nowhere") in result.stderr.replace("\n", "")


def test_with_json_an_error_is_json_too(run: Run, tmp_path: Path) -> None:
    result = run("generate", "Hello", "--model", tmp_path / "nowhere", "--json")
    assert result.exit_code == 1
    assert json.loads(result.stdout)["error"]["kind"] == "ModelNotFoundError"


def test_an_unknown_settings_file_names_the_known_ones(run: Run, model_dir: Path) -> None:
    result = run("generate", "Hello", "--model", model_dir, "--settings", "gpu-9000")
    assert result.exit_code == 1
    assert "cpu-small" in result.stderr


def test_a_chat_answers_each_line_and_reuses_earlier_turns(run: Run, model_dir: Path) -> None:
    result = run("chat", "--model", model_dir, "--max-tokens", 4, "--temperature", 0, text="Hello\n\nAgain\n/quit\n")
    assert result.exit_code == 0, result.output
    notes = [line for line in result.stderr.splitlines() if "prompt tokens from the cache" in line]
    assert len(notes) == 2
    assert int(notes[1].split("[")[1].split()[0]) > 0


def test_a_new_chat_forgets(run: Run, model_dir: Path) -> None:
    options = ("--model", model_dir, "--max-tokens", 4, "--temperature", 0)
    once = run("chat", *options, text="Hello\n/quit\n")
    twice = run("chat", *options, text="Hello\n/new\nHello\n")
    assert twice.stdout == once.stdout * 2
