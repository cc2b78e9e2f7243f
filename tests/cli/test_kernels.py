from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from exl2_rag.cli.kernels import architectures
from exl2_rag.cli.main import app
from exl2_rag.errors import SettingsError
from exl2_rag.llm.kernels.cuda_backend import ARCHITECTURES

pytest.importorskip("cuda.bindings")


def build(*arguments: str):
    return CliRunner().invoke(app, ["kernels", "build", "--jobs", "1", *arguments])


def test_build_reports_what_each_kernel_takes():
    result = build("--arch", "sm_80,sm_90", "--module", "embedding", "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["errors"] == []
    assert {(one["arch"], one["kernel"]) for one in report["kernels"]} == {
        (arch, f"embedding_{dtype}") for arch in ("sm_80", "sm_90") for dtype in ("f32", "f16", "bf16")
    }
    assert all(0 < one["registers"] < 256 and one["spill_bytes"] == 0 for one in report["kernels"])


def test_build_shows_a_table_to_people():
    result = build("--arch", "sm_90", "--module", "embedding")
    assert result.exit_code == 0
    assert "embedding_bf16" in result.stdout
    assert "registers" in result.stdout


def test_what_does_not_compile_ends_with_one():
    result = build("--arch", "sm_90", "--module", "embedding", "--module", "missing", "--json")
    assert result.exit_code == 1
    report = json.loads(result.stdout)
    assert len(report["kernels"]) == 3
    assert "no CUDA module 'missing'" in report["errors"][0]


def test_architectures_are_named_as_nvidia_does():
    assert architectures("sm_80, 90") == [80, 90]
    assert architectures("all") == list(ARCHITECTURES)
    for wrong in ("sm_70", "hopper", "sm_80,"):
        with pytest.raises(SettingsError, match="--arch takes architectures from sm_75 up"):
            architectures(wrong)
