"""`cache` looks into a store on disk, checks, purges and clears it, and explains what a prompt would find."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from exl2_rag import ExL2LLM, SamplingParams
from tests.cli.conftest import Run

PROMPT = "The rules of the harbour are these. " * 8
GREEDY = SamplingParams(max_tokens=1, temperature=0)


@pytest.fixture
def store(model_dir: Path, tmp_path: Path) -> Path:
    """A store with the pages of two prompts, one of which a document went into."""
    directory = tmp_path / "store"
    with ExL2LLM(model_dir, cache_tokens=2048, kv_store=directory) as llm:
        llm.warm(PROMPT)
        for _ in range(2):
            llm.generate("Ships wait outside. " * 10, GREEDY, sources=["ships.pdf"])
    return directory


def test_show_lists_models_pages_and_documents(run: Run, store: Path) -> None:
    result = run("cache", "show", store)
    assert result.exit_code == 0, result.output
    for text in ("LlamaForCausalLM", "pages of 32", "ships.pdf"):
        assert text in result.stdout
    (model,) = json.loads(run("cache", "show", store, "--json").stdout)["models"]
    assert model["pages"] >= 12
    assert model["tokens"] == model["pages"] * 32
    assert model["identity"]["weights"].startswith("sha256:")
    assert model["sources"]["ships.pdf"] > 0
    assert not model["in_use"]


def test_verify_counts_sound_pages_and_finds_a_flipped_bit(run: Run, store: Path) -> None:
    (counts,) = json.loads(run("cache", "verify", store, "--json").stdout)["models"].values()
    assert counts["damaged"] == 0
    (segment,) = store.rglob("seg-*.kvs")
    content = bytearray(segment.read_bytes())
    content[len(content) // 2] ^= 1
    segment.write_bytes(content)
    result = run("cache", "verify", store)
    assert result.exit_code == 1
    assert "1 damaged (deleted)" in result.stdout
    assert run("cache", "verify", store).exit_code == 0


def test_purge_erases_a_document_and_leaves_the_rest(run: Run, store: Path) -> None:
    before = json.loads(run("cache", "show", store, "--json").stdout)["models"][0]
    purged = json.loads(run("cache", "purge", store, "ships.pdf", "--json").stdout)["purged_pages"]
    after = json.loads(run("cache", "show", store, "--json").stdout)["models"][0]
    assert purged >= before["sources"]["ships.pdf"] > 0
    assert after["pages"] == before["pages"] - purged > 0
    assert "0 pages of ships.pdf" in run("cache", "purge", store, "ships.pdf").stdout


def test_clear_asks_first_and_then_deletes(run: Run, store: Path) -> None:
    assert run("cache", "clear", store, text="n\n").exit_code == 1
    assert json.loads(run("cache", "show", store, "--json").stdout)["models"]
    assert "no folder that begins with 'ffff" in run("cache", "clear", store, "--only", "ffffffff", "-y").output
    assert "1 folders deleted" in run("cache", "clear", store, "--yes").stdout
    assert "holds nothing" in run("cache", "show", store).stdout


def test_a_store_in_use_is_shown_and_kept(run: Run, store: Path, model_dir: Path) -> None:
    with ExL2LLM(model_dir, cache_tokens=2048, kv_store=store):
        assert json.loads(run("cache", "show", store, "--json").stdout)["models"][0]["in_use"]
        for arguments in (("clear", store, "-y"), ("purge", store, "ships.pdf")):
            result = run("cache", *arguments)
            assert result.exit_code == 1
            assert "another process" in " ".join(result.output.split())


def damage_manifest(folder: Path) -> None:
    (folder / "manifest.json").write_text("{")


def age_manifest(folder: Path) -> None:
    values = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**values, "format": 0}))


@pytest.mark.parametrize(
    ("damage", "words", "code"), [(damage_manifest, "no readable manifest", 0), (age_manifest, "another version", 1)]
)
def test_a_folder_that_is_not_understood_is_named_and_left(
    run: Run, store: Path, damage: Callable[[Path], None], words: str, code: int
) -> None:
    (folder,) = [path for path in store.iterdir() if path.is_dir()]
    damage(folder)
    assert run("cache", "show", store).exit_code == 0
    result = run("cache", "verify", store)
    assert result.exit_code == code
    assert words in result.output
    assert list(folder.glob("seg-*.kvs"))


@pytest.mark.parametrize("name", ["show", "verify", "clear"])
def test_a_directory_that_is_not_there_is_an_error(run: Run, tmp_path: Path, name: str) -> None:
    result = run("cache", name, tmp_path / "nowhere")
    assert result.exit_code == 1
    assert "there is no directory" in result.output


def test_explain_says_what_the_store_would_give(run: Run, store: Path, model_dir: Path, tmp_path: Path) -> None:
    prompt = tmp_path / "prompt.txt"
    prompt.write_text(PROMPT[:200] + "But not today, as there is a storm.")
    arguments = ("cache", "explain", "-m", model_dir, "--kv-store", store, "-p", prompt)
    found = json.loads(run(*arguments, "--json").stdout)
    explanation = found["explanation"]
    assert explanation["from_disk"] == 192  # six pages of 32: tokens are bytes, and BOS is one
    assert (explanation["from_memory"], explanation["reason"]) == (0, "other text")
    assert explanation["differs_at"] == 201
    assert "But not today" in explanation["prompt_text"]
    assert found["report"]["tiers"]["store"]["pages"] > 0
    text = run(*arguments)
    assert "192 from disk" in text.stdout
    with ExL2LLM(model_dir, cache_tokens=2048, kv_store=store) as llm:
        result = llm.generate(prompt.read_text(), GREEDY)
    assert result.cache_explain is not None
    assert result.usage.cached_tokens in (0, 192)  # 0 if loading was measured to take longer than computing
    assert result.cache_explain.from_disk == result.usage.cached_tokens


def test_explain_compares_prompts_and_takes_chats(run: Run, model_dir: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "first.json", tmp_path / "second.json"
    for path, day in ((first, "2026-03-14"), (second, "2026-03-15")):
        messages = [
            {"role": "system", "content": f"Today is {day}. Answer in one word."},
            {"role": "user", "content": "?"},
        ]
        path.write_text(json.dumps(messages))
    result = run("cache", "explain", "-m", model_dir, "-p", second, "--after", first)
    assert result.exit_code == 0, result.output
    assert "a date or time stands there" in result.stdout
    other = run("cache", "explain", "-m", model_dir, "-p", second, "--after", first, "--salt", "a", "--json")
    assert json.loads(other.stdout)["explanation"]["reason"] == "other text"


@pytest.mark.parametrize(("name", "text"), [("no.txt", None), ("bad.json", "{"), ("bad.json", '["text"]')])
def test_a_prompt_file_that_cannot_be_read_is_an_error(
    run: Run, model_dir: Path, tmp_path: Path, name: str, text: str | None
) -> None:
    if text is not None:
        (tmp_path / name).write_text(text)
    result = run("cache", "explain", "-m", model_dir, "-p", tmp_path / name)
    assert result.exit_code == 1
    assert name in result.output
