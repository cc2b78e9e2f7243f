from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from exl2_rag.errors import CalibrationError, CheckpointError, ConversionError, SettingsError, UnsupportedModelError
from exl2_rag.llm.checkpoint import Checkpoint, exl2_format
from exl2_rag.llm.quantize import ConversionOptions, convert
from exl2_rag.llm.quantize.job import Job
from tests.support.synthetic import make_model_dir

TEXTS = ["The quick brown fox jumps over the lazy dog, and then it sleeps for a while. " * 40]
QUICK = {"rows": 4, "length": 32, "measure_rows": 2}


@pytest.fixture(autouse=True)
def one_thread():
    """Matrices of this size gain nothing from threads, and a busy machine loses much."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return make_model_dir(
        tmp_path_factory.mktemp("models") / "source",
        architecture="Qwen2ForCausalLM",
        hidden=64,
        intermediate=96,
        layers=2,
        vocab=330,
    )


def run(source: Path, target: Path, **options):
    """A quick conversion."""
    keywords = {key: options.pop(key) for key in list(options) if key not in ConversionOptions.__dataclass_fields__}
    keywords.setdefault("texts", TEXTS)
    return convert(source, target, ConversionOptions(**(QUICK | options)), **keywords)


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir()) if path.is_file()}


@pytest.mark.parametrize("method", ["refined", "reference"])
def test_what_is_written_obeys_the_format(source, tmp_path, method):
    target = tmp_path / "exl2"
    result = run(source, target, bits=5.5, method=method, shard_bytes=60_000)
    assert abs(result.bits_per_weight - 5.5) < 0.25  # two narrow layers leave few choices
    assert result.bits_per_weight <= 5.5
    plain, written = Checkpoint.open(source), Checkpoint.open(target)
    sizes = written.layer_sizes()
    for layer in range(2):
        for name in ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj"):
            key = f"model.layers.{layer}.{name}"
            parts = written.linear(key)  # the strict reader checks dtypes, sizes and the permutation
            groups = exl2_format.check(parts, key)
            assert [group.bits for group in groups] == sorted((group.bits for group in groups), reverse=True)
            weight = plain.tensor(f"{key}.weight").float()
            decoded = exl2_format.decode(parts, key, prescale=1.0)[:, : len(weight)].T.float()
            assert (decoded - weight).norm() / weight.norm() < 0.2
            assert sizes[key].in_features == weight.shape[1]
    key = "model.layers.0.self_attn.q_proj"
    assert torch.equal(written.linear(key)["bias"], plain.tensor(f"{key}.bias").half())
    q, k, v = (written.tensor(f"model.layers.0.self_attn.{name}_proj.q_invperm") for name in "qkv")
    assert torch.equal(q, k)  # so that engines can read their input once
    assert torch.equal(q, v)
    assert written.kind("lm_head") == "exl2"
    assert torch.equal(written.tensor("model.norm.weight"), plain.tensor("model.norm.weight").half())
    config = json.loads((target / "config.json").read_text())["quantization_config"]
    assert (config["quant_method"], config["bits"], config["head_bits"]) == ("exl2", 5.5, 6)
    assert config["calibration"] == {"rows": 4, "length": 32, "dataset": "text"}
    assert len(list(target.glob("output-*.safetensors"))) > 1
    assert (target / "tokenizer.json").is_file()
    assert not (tmp_path / "exl2.job").exists()


def test_more_bits_lose_less(source, tmp_path):
    losses = [run(source, tmp_path / str(bits), bits=bits).quality.divergence for bits in (4.5, 5.5, 7.0)]
    assert losses[0] > 2 * losses[1] > 4 * losses[2] > 0


def test_uniform_gives_every_matrix_the_same_bits(source, tmp_path):
    result = run(source, tmp_path / "exl2", bits=5.5, method="uniform")
    sizes = Checkpoint.open(tmp_path / "exl2").layer_sizes()
    assert len({sizes[f"model.layers.{layer}.mlp.up_proj"].widths for layer in range(2)}) == 1
    assert result.bits_per_weight <= 5.5


def test_the_same_conversion_writes_the_same_bytes(source, tmp_path):
    run(source, tmp_path / "a", bits=5.0)
    run(source, tmp_path / "b", bits=5.0)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


class Crash(BaseException):
    """Stands for a process that ends at once."""


@pytest.mark.parametrize("method", ["refined", "reference"])
def test_a_job_that_ended_at_any_write_goes_on_to_the_same_bytes(source, tmp_path, monkeypatch, method):
    run(source, tmp_path / "whole", bits=5.0, method=method)
    write = Job._write
    monkeypatch.setattr("exl2_rag.llm.quantize.passes.SAVE_INTERVAL_S", 0.0)
    left = 0

    def crashing(self, name, make):
        nonlocal left
        left -= 1
        if left == 0:
            partial = self.directory / f"{name}.partial"
            partial.parent.mkdir(parents=True, exist_ok=True)
            partial.write_bytes(b"half")
            raise Crash
        write(self, name, make)

    monkeypatch.setattr(Job, "_write", crashing)
    chance = random.Random(7)
    crashes = 0
    for _ in range(40):
        left = chance.randrange(1, 5) if crashes < 10 else 10**9
        try:
            run(source, tmp_path / "resumed", bits=5.0, method=method)
            break
        except Crash:
            crashes += 1
    assert crashes == 10
    assert contents(tmp_path / "whole") == contents(tmp_path / "resumed")


def test_a_killed_process_loses_at_most_a_block(source, tmp_path):
    script = (
        "import sys, torch; torch.set_num_threads(1)\n"
        "from pathlib import Path\n"
        "from exl2_rag.llm.quantize import ConversionOptions, convert\n"
        "def tell(stage, done, total): print(stage, done, flush=True)\n"
        f"convert(Path({str(source)!r}), Path(sys.argv[1]), ConversionOptions(bits=5.0, **{QUICK!r}), "
        f"texts={TEXTS!r}, progress=tell)\n"
    )
    for wanted in ("measure 2", "quantise 3"):
        process = subprocess.Popen(
            [sys.executable, "-c", script, str(tmp_path / "killed")], stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        for line in process.stdout:
            if line.strip() == wanted:
                time.sleep(0.01)
                process.send_signal(signal.SIGKILL)
                break
        process.stdout.close()
        assert process.wait() == -signal.SIGKILL
    seen: list[tuple[str, int]] = []
    run(source, tmp_path / "killed", bits=5.0, progress=lambda stage, done, _total: seen.append((stage, done)))
    assert not any(stage == "measure" for stage, _ in seen)
    run(source, tmp_path / "whole", bits=5.0)
    assert contents(tmp_path / "whole") == contents(tmp_path / "killed")


def test_a_measurement_can_be_handed_on(source, tmp_path):
    path = tmp_path / "measurement.json"
    first = run(source, tmp_path / "a", bits=5.5, method="reference", output_measurement=path)
    data = json.loads(path.read_text())
    assert list(data["measurement"])[:2] == ["model.layers.0.self_attn", "model.layers.0.mlp"]
    assert [len(value) for value in data["measurement"].values() if value] == [19, 17] * 2
    assert data["measurement"]["lm_head.linear"] is None
    second = run(source, tmp_path / "b", bits=5.5, method="reference", measurement_file=path)
    assert second.bits_per_weight == first.bits_per_weight
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    other = {"measurement": {"model.layers.0.mlp": data["measurement"]["model.layers.0.mlp"]}}
    path.write_text(json.dumps(other))
    with pytest.raises(ConversionError, match="measured on another model"):
        run(source, tmp_path / "c", measurement_file=path)
    path.write_text("[]")
    with pytest.raises(ConversionError, match=r"no measurement\.json"):
        run(source, tmp_path / "d", measurement_file=path)


def test_a_job_directory_of_another_conversion_is_refused(source, tmp_path):
    def stop(stage, done, _total):
        if (stage, done) == ("quantise", 1):
            raise Crash

    with pytest.raises(Crash):
        run(source, tmp_path / "exl2", bits=5.0, progress=stop)
    with pytest.raises(ConversionError, match="holds a conversion with options"):
        run(source, tmp_path / "exl2", bits=6.0)
    with pytest.raises(ConversionError, match="calibration"):
        run(source, tmp_path / "exl2", bits=5.0, texts=["Something else entirely. " * 60])
    tuned = tmp_path / "tuned"  # the same names, shapes and config
    tuned.mkdir()
    for path in source.iterdir():
        (tuned / path.name).write_bytes(path.read_bytes())
    tensors = load_file(tuned / "model.safetensors")
    tensors["model.norm.weight"][-1] += 1
    save_file(tensors, tuned / "model.safetensors")
    with pytest.raises(ConversionError, match="holds a conversion with source"):
        run(tuned, tmp_path / "exl2", bits=5.0)
    run(source, tmp_path / "exl2", bits=6.0, fresh=True)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("x")
    with pytest.raises(ConversionError, match="holds no conversion"):
        run(source, tmp_path / "other", job_dir=tmp_path / "full")


def test_too_little_text_is_refused(source, tmp_path):
    with pytest.raises(CalibrationError, match=r"needs 128 tokens, text has \d+"):
        run(source, tmp_path / "exl2", texts=["Short."])
    with pytest.raises(CalibrationError, match="longer than the model's"):
        run(source, tmp_path / "exl2", length=100_000)


def test_the_built_in_text_is_enough_and_the_same_each_time(source, tmp_path):
    first = run(source, tmp_path / "a", bits=6.0, texts=None, rows=12)
    run(source, tmp_path / "b", bits=6.0, texts=None, rows=12)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert json.loads((tmp_path / "a" / "config.json").read_text())["quantization_config"]["calibration"] == {
        "rows": 12,
        "length": 32,
        "dataset": "built-in",
    }
    assert 0 < first.quality.divergence < 0.1


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused_by_name(source, tmp_path, bad):
    broken = tmp_path / "broken"
    broken.mkdir()
    for path in source.iterdir():
        (broken / path.name).write_bytes(path.read_bytes())
    tensors = load_file(broken / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = bad
    save_file(tensors, broken / "model.safetensors")
    with pytest.raises(CalibrationError, match=r"model\.layers\.1\.mlp\.up_proj\.weight"):
        run(broken, tmp_path / "exl2")


def test_sources_that_cannot_be_converted_are_refused(source, tmp_path):
    run(source, tmp_path / "exl2", bits=6.0)
    with pytest.raises(UnsupportedModelError, match="quantised already"):
        run(tmp_path / "exl2", tmp_path / "again")
    with pytest.raises(ConversionError, match="holds a model already"):
        run(source, tmp_path / "exl2")
    incomplete = tmp_path / "incomplete"
    incomplete.mkdir()
    for path in source.iterdir():
        (incomplete / path.name).write_bytes(path.read_bytes())
    tensors = load_file(incomplete / "model.safetensors")
    del tensors["model.layers.0.mlp.up_proj.weight"]
    save_file(tensors, incomplete / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"model\.layers\.0\.mlp\.up_proj"):
        run(incomplete, tmp_path / "other")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 1.5}, "above 2"),
        ({"bits": float("nan")}, "above 2"),
        ({"head_bits": 7}, "head_bits must be one of"),
        ({"method": "fast"}, "method must be one of refined, reference, uniform"),
        ({"rows": 0}, "rows must be at least 1"),
        ({"rows": 2, "measure_rows": 3}, "measure_rows from 1 to rows"),
        ({"length": 3}, "length must be at least 16"),
        ({"shard_bytes": -1}, "shard_bytes must be"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(SettingsError, match=message):
        ConversionOptions(**options)


def test_bits_that_cannot_be_had_are_refused_with_what_can(source, tmp_path):
    with pytest.raises(SettingsError, match="times as many bits"):
        run(source, tmp_path / "exl2", bits=2.1)


def test_a_full_disk_is_told_and_the_job_resumes(source, tmp_path, monkeypatch):
    write = Job._write

    def full(self, name, make):
        def fail(path):
            raise OSError(28, "No space left on device")

        write(self, name, fail if name.startswith("matrices/model.layers.1.mlp") else make)

    monkeypatch.setattr(Job, "_write", full)
    with pytest.raises(ConversionError, match=r"No space left on device.*the job resumes"):
        run(source, tmp_path / "exl2", bits=5.0)
    monkeypatch.setattr(Job, "_write", write)
    run(source, tmp_path / "exl2", bits=5.0)
    assert Checkpoint.open(tmp_path / "exl2").kind("model.layers.1.mlp.up_proj") == "exl2"
