"""Finding, building and loading the native library: with, without and with a broken compiler."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from exl2_rag.errors import SettingsError
from exl2_rag.llm.kernels import library_build, native, ops
from tests.llm.kernels.samples import exl2_weights, normal

PACKAGE = Path(library_build.__file__).resolve().parents[2]

PROBE = """
import logging, torch
logging.basicConfig(format="LOG %(levelname)s %(message)s")
from exl2_rag.errors import Exl2RagError
from exl2_rag.llm.kernels import native, ops
try:
    for _ in range(3):
        result = ops.dense_matmul(torch.ones(2, 3), torch.ones(4, 3))
    assert (result == 3).all()
    print("LEVEL", native.cpu_level())
except Exl2RagError as error:
    print("ERROR", type(error).__name__, error)
"""


def probe(tmp_path: Path, *, root: Path = PACKAGE.parent, **environment: str) -> str:
    """What a new process says that runs an op three times."""
    variables = {name: value for name, value in os.environ.items() if not name.startswith("EXL2_RAG_")}
    variables |= {"EXL2_RAG_CACHE": str(tmp_path / "cache"), "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", PROBE],
        env=variables | environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout + done.stderr


def fake_compiler(tmp_path: Path, *, contents: str = "no library") -> Path:
    """A compiler that notes each call and writes `contents` as its output."""
    script = tmp_path / "fake-c++"
    script.write_text(
        f"""#!/bin/sh
echo "$@" >> {tmp_path}/calls
for word in "$@"; do [ "$last" = -o ] && printf '{contents}' > "$word"; last="$word"; done
"""
    )
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    return script


def test_reference_kernels_can_be_forced(tmp_path):
    said = probe(tmp_path, EXL2_RAG_KERNELS="reference")
    assert said.strip() == "LEVEL reference"
    assert not (tmp_path / "cache").exists()


def test_a_broken_compiler_leaves_the_reference_kernels_and_one_notice(tmp_path):
    said = probe(tmp_path, CXX="/bin/false")
    assert "LEVEL reference" in said
    assert said.count("LOG WARNING") == 1
    assert "/bin/false" in said
    assert not list((tmp_path / "cache").glob("**/*.so"))


def test_a_compiler_that_does_not_exist_is_named(tmp_path):
    said = probe(tmp_path, CXX="/no/such/compiler")
    assert "LEVEL reference" in said
    assert "'/no/such/compiler', cannot be found" in said


def test_forcing_native_kernels_without_a_compiler_is_an_error_that_says_why(tmp_path):
    said = probe(tmp_path, CXX="/bin/false", EXL2_RAG_KERNELS="native")
    assert said.startswith("ERROR KernelError EXL2_RAG_KERNELS is 'native', but there are no native kernels")
    assert "/bin/false" in said


def test_what_the_compiler_said_is_in_the_error(tmp_path):
    script = tmp_path / "c++"
    script.write_text(
        '#!/bin/sh\n[ "$1" = --version ] && echo 1.0 && exit 0\necho "error: no such register" >&2\nexit 1\n'
    )
    script.chmod(0o755)
    said = probe(tmp_path, CXX=str(script), EXL2_RAG_KERNELS="native")
    assert "error: no such register" in said


def test_a_library_that_cannot_be_loaded_leaves_the_reference_kernels(tmp_path):
    said = probe(tmp_path, CXX=str(fake_compiler(tmp_path)))
    assert "LEVEL reference" in said
    assert "cannot be loaded" in said


def test_a_cache_that_cannot_be_written_leaves_the_reference_kernels(tmp_path):
    (tmp_path / "file").write_text("")
    said = probe(tmp_path, EXL2_RAG_CACHE=str(tmp_path / "file" / "cache"), CXX=str(fake_compiler(tmp_path)))
    assert "LEVEL reference" in said
    assert "cannot write to" in said


def test_a_process_without_a_home_is_told_to_name_a_cache(monkeypatch):
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("EXL2_RAG_CACHE", raising=False)
    monkeypatch.setattr(Path, "home", no_home)
    with pytest.raises(library_build.BuildError, match="set EXL2_RAG_CACHE"):
        native.cache_dir()


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("EXL2_RAG_KERNELS", "fast", "must be 'native', 'reference' or 'auto', it is 'fast'"),
        ("EXL2_RAG_NUM_THREADS", "0", "must be a positive whole number, it is '0'"),
        ("EXL2_RAG_NUM_THREADS", "two", "must be a positive whole number, it is 'two'"),
    ],
)
def test_environment_variables_that_make_no_sense_are_errors(tmp_path, name, value, message):
    said = probe(tmp_path, **{name: value})
    assert said.startswith("ERROR SettingsError")
    assert message in said


def test_processes_that_start_together_compile_once(tmp_path, monkeypatch):
    monkeypatch.setenv("EXL2_RAG_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("CXX", str(fake_compiler(tmp_path)))
    paths: list[Path] = []
    threads = [threading.Thread(target=lambda: paths.append(native._cached_library("a"))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(paths) == 4
    assert len(set(paths)) == 1
    links = [line for line in (tmp_path / "calls").read_text().splitlines() if "-shared" in line]
    assert len(links) == 1
    leftovers = {path.name for path in paths[0].parent.iterdir()} - {paths[0].name, paths[0].with_suffix(".lock").name}
    assert not leftovers


def test_the_name_of_a_library_changes_with_sources_and_compiler(tmp_path, monkeypatch):
    monkeypatch.setenv("EXL2_RAG_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("CXX", str(fake_compiler(tmp_path)))
    first = native._cached_library("a")
    assert native._cached_library("a") == first
    assert native._cached_library("b") != first
    (tmp_path / "other").mkdir()
    monkeypatch.setenv("CXX", str(fake_compiler(tmp_path / "other")))
    assert native._cached_library("a") != first


@pytest.mark.parametrize("name", ["cpu/attention.cpp", "cpu/simd.h", "exl2_layout.h"])
def test_the_source_hash_changes_with_every_source_and_header(tmp_path, monkeypatch, name):
    copy = tmp_path / "kernels"
    shutil.copytree(library_build.SOURCE_DIR, copy)
    monkeypatch.setattr(library_build, "SOURCE_DIR", copy)
    before = library_build.source_hash()
    (copy / name).write_text((copy / name).read_text() + "\n// edited\n")
    assert library_build.source_hash() != before


@pytest.mark.slow
@pytest.mark.usefixtures("native_kernels")
def test_an_edited_source_is_rebuilt_at_first_use(tmp_path, monkeypatch):
    copy = tmp_path / "kernels"
    shutil.copytree(library_build.SOURCE_DIR, copy)
    source = copy / "cpu" / "library.cpp"
    edited = source.read_text().replace("return exl2::current()->name; }", 'return "edited"; }')
    assert edited != source.read_text()
    source.write_text(edited)
    monkeypatch.setattr(library_build, "SOURCE_DIR", copy)
    monkeypatch.setattr(library_build, "_levels", lambda _machine: {"baseline": ()})  # a third of the time
    monkeypatch.setenv("EXL2_RAG_CACHE", str(tmp_path / "cache"))
    assert native._load().exl2_cpu_level() == b"edited"


@pytest.mark.usefixtures("native_kernels")
def test_the_library_of_a_wheel_is_used_without_a_compiler(tmp_path, monkeypatch):
    built = Path(native.library()._name)
    packaged = tmp_path / "libexl2_cpu.so"
    shutil.copyfile(built, packaged)
    monkeypatch.setattr(native, "PACKAGED_LIBRARY", packaged)
    monkeypatch.setenv("EXL2_RAG_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("CXX", "/bin/false")
    assert Path(native._load()._name) == packaged


def test_a_wheel_is_built_without_the_library_where_that_is_tolerated(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("CXX", "/bin/false")
    output = tmp_path / "libexl2_cpu.so"
    assert library_build.main([str(output), "--tolerate-failure"]) == 0
    assert "native kernels are left out" in capsys.readouterr().err
    assert library_build.main([str(output)]) == 1
    assert not output.exists()
    assert library_build.main([]) == 2


def test_the_interface_version_is_that_of_the_header():
    header = (library_build.SOURCE_DIR / "exl2_layout.h").read_text()
    assert f"kAbiVersion = {native.ABI_VERSION};" in header


def test_a_number_of_threads_below_one_is_refused():
    with pytest.raises(SettingsError, match="at least 1, it is 0"):
        ops.set_num_threads(0)


@pytest.mark.usefixtures("native_kernels", "restore_threads")
def test_callers_on_many_threads_get_the_same_results():
    ops.set_num_threads(3)
    weights, x = exl2_weights([(4, 512)], 512), normal(9, 512)
    expected = ops.exl2_matmul(x, weights)
    with ThreadPoolExecutor(6) as callers:
        results = list(callers.map(lambda _: ops.exl2_matmul(x, weights), range(300)))
    assert all(torch.equal(result, expected) for result in results)


@pytest.mark.usefixtures("native_kernels")
def test_a_forked_process_has_threads_of_its_own(tmp_path):
    script = """
import os, torch
from exl2_rag.llm.kernels import ops
ops.set_num_threads(3)
x, weight = torch.ones(64, 512), torch.ones(512, 512)
before = ops.dense_matmul(x, weight)
child = os.fork()
if child == 0:
    os._exit(0 if torch.equal(ops.dense_matmul(x, weight), before) else 1)
_, status = os.waitpid(child, 0)
assert torch.equal(ops.dense_matmul(x, weight), before)
print("CHILD", os.waitstatus_to_exitcode(status))
"""
    environment = os.environ | {"PYTHONPATH": str(PACKAGE.parent)}
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert done.stdout.strip() == "CHILD 0"
