"""`pull` fetches models from a hub, here one on this machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from exl2_rag.errors import SettingsError
from exl2_rag.llm.hub import HubModel
from tests.support.fake_hub import FakeHub, running

LARGE = 3 << 20


@pytest.fixture(scope="module")
def files(model_dir: Path) -> dict[str, bytes]:
    found = {path.name: path.read_bytes() for path in model_dir.iterdir() if path.is_file()}
    large = {"vocab.json": b" " * LARGE}
    return found | large | {"pytorch_model.bin": b"not wanted", "README.md": b"A model.\n"}


@pytest.fixture
def hub(files: dict[str, bytes]) -> Iterator[FakeHub]:
    with running({"owner/tiny": {"main": {"README.md": b"See the branches."}, "4.0bpw": files}}) as one:
        yield one


def pull(hub: FakeHub, tmp_path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """In a process of its own: the client reads its settings when it is imported."""
    environment = os.environ | {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DOWNLOAD_TIMEOUT": "5",
        "PYTHONPATH": str(Path(__file__).parents[2]),
        "COLUMNS": "300",
    }
    return subprocess.run(
        [sys.executable, "-m", "exl2_rag.cli.main", "pull", *arguments],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=environment,
        check=False,
    )


def test_a_branch_is_fetched_and_goes_on_where_it_broke_off(hub, files, tmp_path):
    hub.break_after = LARGE // 2
    first = pull(hub, tmp_path, "owner/tiny:4.0bpw")
    assert first.returncode == 1
    assert "the same command goes on where this one stopped" in first.stderr
    hub.break_after = None
    hub.fetched.clear()
    second = pull(hub, tmp_path, "owner/tiny:4.0bpw", "--json")
    assert second.returncode == 0, second.stderr
    assert [(name, start > 0) for name, start in hub.fetched] == [("vocab.json", True), ("README.md", False)]
    target = tmp_path / json.loads(second.stdout)["directory"]
    assert target == tmp_path / "models" / "tiny-4.0bpw"
    for name, data in files.items():
        if name != "pytorch_model.bin":
            assert (target / name).read_bytes() == data
    assert not (target / "pytorch_model.bin").exists()
    assert not list(target.glob("*.partial"))
    hub.fetched.clear()
    assert pull(hub, tmp_path, "owner/tiny:4.0bpw").returncode == 0
    assert hub.fetched == []


def test_a_file_that_changed_on_the_hub_is_fetched_anew_and_damage_is_noticed(hub, files, tmp_path):
    assert pull(hub, tmp_path, "owner/tiny:4.0bpw").returncode == 0
    changed = files | {"vocab.json": b"x" * LARGE}
    hub.repositories["owner/tiny"]["4.0bpw"] = changed
    hub.fetched.clear()
    assert pull(hub, tmp_path, "owner/tiny:4.0bpw").returncode == 0
    assert hub.fetched == [("vocab.json", 0)]
    assert (tmp_path / "models" / "tiny-4.0bpw" / "vocab.json").read_bytes() == changed["vocab.json"]
    hub.repositories["owner/tiny"]["4.0bpw"] = files | {"vocab.json": b"y" * LARGE}
    hub.damaged = True
    result = pull(hub, tmp_path, "owner/tiny:4.0bpw")
    assert result.returncode == 1
    assert "vocab.json came damaged" in result.stderr


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("owner/none", "there is no repository owner/none"),
        ("owner/tiny:9.0bpw", "no revision '9.0bpw'"),
        ("owner/tiny", "keep each bit rate on a branch of its own"),
    ],
)
def test_what_cannot_be_had_is_told(hub, tmp_path, model, message):
    result = pull(hub, tmp_path, model)
    assert result.returncode == 1
    assert message in result.stderr


def test_a_gated_repository_says_what_to_do(hub, tmp_path):
    hub.gated.add("owner/tiny")
    result = pull(hub, tmp_path, "owner/tiny:4.0bpw")
    assert result.returncode == 1
    assert "accept its terms" in result.stderr


@pytest.mark.parametrize("text", ["tiny", "owner/tiny:", "a/b/c", "", "owner/../x", "https://hub/owner/tiny"])
def test_names_of_another_form_are_refused(text):
    if text == "owner/../x":
        text = "owner/.. /x"
    with pytest.raises(SettingsError, match="expected owner/name"):
        HubModel.parse(text)


def test_a_revision_is_part_of_the_directory():
    assert HubModel.parse("owner/tiny:refs/pr/1").directory_name == "tiny-refs-pr-1"
    assert HubModel.parse("owner/tiny").directory_name == "tiny"
