"""`bench` measures a model and ends with one JSON object."""

import json
from pathlib import Path

import pytest

from exl2_rag.llm.quantize import synthetic
from tests.cli.conftest import Run

FAST = ("--prompt", 24, "--new", 4, "--repeats", 2, "--threads", 1)
TINY = synthetic.SyntheticShape(hidden=256, intermediate=704, layers=4, heads=8, kv_heads=2, vocab=331)


@pytest.fixture(autouse=True)
def _small_buffer(monkeypatch: pytest.MonkeyPatch) -> None:
    from exl2_rag.llm import read_bandwidth

    whole = read_bandwidth.measure_read_bandwidth
    monkeypatch.setattr(
        read_bandwidth, "measure_read_bandwidth", lambda threads: whole(threads, buffer_bytes=8_000, passes=1)
    )


def test_json_is_the_last_line_and_has_every_figure(run: Run, model_dir: Path) -> None:
    result = run("bench", "--model", model_dir, *FAST, "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout.splitlines()[-1])
    assert report["shape"] is None
    assert report["model"] == "tiny-exl2"
    assert (report["threads"], report["prompt_tokens"], report["new_tokens"], report["repeats"]) == (1, 24, 4, 2)
    assert len(report["runs"]) == 2
    for figure in ("decode_tok_s", "prefill_tok_s", "bandwidth_gb_s"):
        low, high = sorted(one[figure] for one in report["runs"])
        assert 0 < low <= report[figure] <= high
    assert report["weight_bytes_per_token"] < report["model_file_bytes"]
    assert report["bandwidth_share"] > 0
    assert report["kv_cache_bytes"] == 2 * 2 * 2 * 32 * 64 * 4  # K and V, layers, heads, head width, tokens, fp32
    assert 0 < report["baseline_memory_bytes"] <= report["peak_memory_bytes"]
    model_bytes = report["model_file_bytes"] + report["kv_cache_bytes"]
    grown = report["peak_memory_bytes"] - report["baseline_memory_bytes"]
    assert report["memory_ratio"] == round(grown / model_bytes, 4)
    assert report["precision"] in ("exact", "fast")
    assert "decode tokens/s" in result.stderr


def test_without_json_a_table_is_the_result(run: Run, model_dir: Path) -> None:
    result = run("bench", "--model", model_dir, *FAST, "--batch", 2, "--new", 80)
    assert result.exit_code == 0, result.output
    for text in ("prefill tokens/s", "median", "batch 2", "of the bandwidth"):
        assert text in result.stdout


def test_the_model_of_a_shape_is_written_once(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(synthetic, "SHAPES", {"tiny": TINY})
    arguments = ("bench", "--shape", "tiny", "--bpw", "3.5", "--cache-dir", tmp_path / "cache", *FAST, "--json")
    first = json.loads(run(*arguments).stdout.splitlines()[-1])
    assert (first["shape"], first["model"]) == ("tiny", "tiny-3.5bpw-h6-v1")
    assert first["bpw"] == pytest.approx(3.5, rel=0.02)
    config = tmp_path / "cache" / first["model"] / "config.json"
    written = config.stat().st_mtime_ns
    assert run(*arguments).exit_code == 0
    assert config.stat().st_mtime_ns == written


def test_a_model_and_a_shape_exclude_each_other(run: Run, model_dir: Path) -> None:
    result = run("bench", "--model", model_dir, "--shape", "llama-1.1b")
    assert result.exit_code == 1
    assert "not both" in result.stderr


def test_an_unknown_shape_lists_the_known_ones(run: Run, tmp_path: Path) -> None:
    result = run("bench", "--shape", "llama-9b", "--cache-dir", tmp_path)
    assert result.exit_code == 1
    assert "llama-1.1b" in result.stderr


def test_bits_that_cannot_be_had_are_an_error(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(synthetic, "SHAPES", {"tiny": TINY})
    result = run("bench", "--shape", "tiny", "--bpw", "1.5", "--cache-dir", tmp_path)
    assert result.exit_code == 1
    assert "smallest layouts" in result.stderr
    assert list(tmp_path.iterdir()) == []
