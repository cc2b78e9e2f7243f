"""Makes an EXL2 model of a float one: calibrate, measure, choose, quantise, write. Resumes where it was stopped.

One layer is in memory at a time, beside the hidden states of the calibration rows, which go to a file where they are
large. The same options, text and source give the same bytes.
"""

from __future__ import annotations

import hashlib
import math
import shutil
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from exl2_rag.errors import CalibrationError, ConversionError
from exl2_rag.llm.checkpoint import Checkpoint
from exl2_rag.llm.checkpoint.shard_writer import ShardWriter
from exl2_rag.llm.config import ModelConfig
from exl2_rag.llm.layers.linear import LinearSpec
from exl2_rag.llm.models import tensor_names
from exl2_rag.llm.quantize.allocation import allocate
from exl2_rag.llm.quantize.blocks import FloatModel
from exl2_rag.llm.quantize.calibration import CalibrationText, built_in_rows, rows_from_texts
from exl2_rag.llm.quantize.job import Job, tensor_hash
from exl2_rag.llm.quantize.measure import block_name
from exl2_rag.llm.quantize.measurement import (
    MeasuredOption,
    Measurement,
    Slot,
    option_from_json,
    option_to_json,
    read_reference_file,
    write_reference_file,
)
from exl2_rag.llm.quantize.model_files import copy_files, read_source_config, write_config
from exl2_rag.llm.quantize.options import ConversionOptions
from exl2_rag.llm.quantize.passes import (
    BlockReport,
    Progress,
    QualityReport,
    Quantiser,
    all_parts,
    block_specs,
    measure_model,
)
from exl2_rag.llm.quantize.rtn import QuantisationPlan, padded, plan_for_bits
from exl2_rag.llm.tokenizer import Tokenizer
from exl2_rag.llm.weights_digest import weights_digest


@dataclass(frozen=True, slots=True)
class Conversion:
    """What a conversion produced.

    Attributes:
        bits_per_weight: attained average over the decoder's matrices, tables included, head excluded.
        blocks: one entry for each attention and MLP.
        quality: on the calibration rows.
        n_bytes: of the tensor files.
        seconds: of this run; a resumed one counts from where it went on.
    """

    target_dir: Path
    bits_per_weight: float
    blocks: tuple[BlockReport, ...]
    quality: QualityReport
    n_bytes: int
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self) | {"target_dir": str(self.target_dir)}


def convert(
    source_dir: Path,
    target_dir: Path,
    options: ConversionOptions | None = None,
    *,
    job_dir: Path | None = None,
    texts: Iterable[str] | None = None,
    text_source: str = "",
    measurement_file: Path | None = None,
    output_measurement: Path | None = None,
    device: str = "cpu",
    fresh: bool = False,
    keep_job: bool = False,
    progress: Progress = lambda _stage, _done, _total: None,
) -> Conversion:
    """Write an EXL2 copy of a float16, bfloat16 or float32 model.

    Args:
        source_dir: config.json, safetensors and tokenizer files. Not modified.
        target_dir: where the copy goes; must hold no safetensors yet. config.json appears last.
        options: bits, method, calibration.
        job_dir: working directory, by default `target_dir` with ".job" behind; an unfinished conversion in it with the
            same options is resumed.
        texts: calibration text; None: the built-in mix.
        text_source: where `texts` is from.
        measurement_file: a measurement.json of ExLlamaV2's form, to skip measuring.
        output_measurement: write one there; "reference" only, since only that method measures the table's rows.
        device: "cpu", "cuda" or such as "cuda:1".
        fresh: throw away what is in the job directory.
        keep_job: leave the job directory behind.
        progress: told (stage, done, in all).

    Raises:
        SettingsError: bits that cannot be had.
        ModelError: the source is not a float model that the engine runs.
        ConversionError: text, weights, disk or job directory; what is done stays, and the job can be resumed.
    """
    started = time.monotonic()
    options = options or ConversionOptions()
    if output_measurement is not None and options.method != "reference":
        raise ConversionError('a measurement.json can only be written by method="reference"')
    raw_config = read_source_config(source_dir)
    config = ModelConfig.from_dir(source_dir)
    checkpoint = Checkpoint.open(source_dir)
    tensor_names.check_tensors(config, checkpoint)
    if any(target_dir.glob("*.safetensors")):
        raise ConversionError(f"{target_dir} holds a model already; give an empty directory")
    if options.length > config.max_seq_len:
        raise CalibrationError(
            f"rows of {options.length} tokens are longer than the model's {config.max_seq_len}; ask for shorter rows"
        )
    tokenizer = Tokenizer.from_dir(source_dir)
    text = _calibration(tokenizer, options, texts, text_source)
    job = Job(
        job_dir if job_dir is not None else target_dir.with_name(target_dir.name + ".job"),
        {
            "source": source_identity(source_dir),
            "options": options.as_dict() | {"shard_bytes": None},
            "calibration": {"source": text.source, "hash": tensor_hash(text.ids)},
            "measurement": None if measurement_file is None else _file_hash(measurement_file),
        },
        fresh=fresh,
    )
    torch_device = torch.device(device)
    model = FloatModel(config, checkpoint, length=options.length, device=torch_device)
    with torch.inference_mode():
        measurement = _measurement(model, text, options, job, measurement_file, progress)
        if output_measurement is not None:
            write_reference_file(output_measurement, measurement, other_modules=["model.norm.norm", "lm_head.linear"])
        # Errors of a measurement.json are those of the reference, whoever uses them.
        objective = "reference" if measurement_file is not None else options.method
        plans = _plans(model, measurement, options, job, objective)
        quantiser = Quantiser(model, text.ids, plans, options, job)
        blocks = tuple(quantiser.blocks(progress))
        quality = quantiser.head()
    progress("write", 0, 1)
    n_bytes = _write(source_dir, target_dir, model, checkpoint, job, options)
    bits_per_weight = _attained(model, plans)
    write_config(
        raw_config,
        target_dir,
        bits=options.bits,
        head_bits=options.head_bits,
        calibration={"rows": options.rows, "length": options.length, "dataset": text.source},
    )
    progress("write", 1, 1)
    if not keep_job:
        shutil.rmtree(job.directory, ignore_errors=True)
    return Conversion(target_dir, bits_per_weight, blocks, quality, n_bytes, time.monotonic() - started)


def source_identity(source_dir: Path) -> str:
    """Names a source model: its config, and every byte of its weights."""
    config = hashlib.blake2b((source_dir / "config.json").read_bytes(), digest_size=16).hexdigest()
    return f"config:{config} {weights_digest(source_dir)}"


def _calibration(
    tokenizer: Tokenizer, options: ConversionOptions, texts: Iterable[str] | None, text_source: str
) -> CalibrationText:
    if texts is None:
        return built_in_rows(tokenizer, rows=options.rows, length=options.length, seed=options.seed)
    return rows_from_texts(tokenizer, texts, rows=options.rows, length=options.length, source=text_source or "text")


def _measurement(
    model: FloatModel,
    text: CalibrationText,
    options: ConversionOptions,
    job: Job,
    measurement_file: Path | None,
    progress: Progress,
) -> Measurement:
    if measurement_file is not None:
        blocks = [block_name(index, part) for index, part in all_parts(model.n_layers)]
        return read_reference_file(measurement_file, blocks)
    if options.method == "uniform":
        return _uniform(model, options.bits)
    if job.has("measurement.json"):
        return Measurement.from_json(job.read_json("measurement.json"))
    measurement = measure_model(model, text.ids[: options.measure_rows], options, job, progress)
    job.write_json("measurement.json", measurement.to_json())
    return measurement


def _uniform(model: FloatModel, bits: float) -> Measurement:
    """No choice for any matrix: the layout of least expected error that has these bits."""
    slots = []
    for index, part in all_parts(model.n_layers):
        for short, spec in block_specs(model, index, part).items():
            plan = plan_for_bits(bits, spec.in_features, spec.out_features)
            option = MeasuredOption({short: plan}, plan.total_bits(spec.in_features, padded(spec.out_features)), 1.0)
            slots.append(Slot(block_name(index, part), (option,)))
    return Measurement(tuple(slots))


def _plans(
    model: FloatModel, measurement: Measurement, options: ConversionOptions, job: Job, objective: str
) -> dict[str, QuantisationPlan]:
    """The layout of each matrix, by key."""
    if not job.has("strategy.json"):
        choice = allocate(measurement, math.floor(options.bits * _elements(model)), method=objective)
        chosen = [
            [slot.block, option_to_json(option)] for slot, option in zip(measurement.slots, choice.options, strict=True)
        ]
        job.write_json("strategy.json", chosen)
    plans: dict[str, QuantisationPlan] = {}
    keys = {block_name(index, part): block_specs(model, index, part) for index, part in all_parts(model.n_layers)}
    for block, data in job.read_json("strategy.json"):
        option: MeasuredOption = option_from_json(data, "error")
        plans |= {keys[block][short].key: plan for short, plan in option.plans.items()}
    missing = [spec.key for specs in keys.values() for spec in specs.values() if spec.key not in plans]
    if missing:
        raise ConversionError(f"the measurement has no layout for {missing[0]}; it is of another model: measure anew")
    return plans


def _specs(model: FloatModel) -> list[LinearSpec]:
    return [spec for index, part in all_parts(model.n_layers) for spec in block_specs(model, index, part).values()]


def _elements(model: FloatModel) -> int:
    return sum(spec.in_features * padded(spec.out_features) for spec in _specs(model))


def _attained(model: FloatModel, plans: Mapping[str, QuantisationPlan]) -> float:
    bits = sum(plans[spec.key].total_bits(spec.in_features, padded(spec.out_features)) for spec in _specs(model))
    return bits / _elements(model)


def _write(
    source_dir: Path, target_dir: Path, model: FloatModel, checkpoint: Checkpoint, job: Job, options: ConversionOptions
) -> int:
    """The tensor files, in the model's order, and everything else but config.json; returns the tensors' bytes."""
    quantised = {spec.key for spec in _specs(model)} | {tensor_names.HEAD_KEY}
    kept = [name for name in checkpoint.names() if name.rpartition(".")[0] not in quantised]
    shard_bytes = options.shard_bytes or 1 << 62
    try:
        with ShardWriter(target_dir, shard_bytes) as writer:
            for name in sorted(kept, key=_model_order):
                if not tensor_names.is_ignored(name):
                    writer.add(name, checkpoint.tensor(name).to(torch.float16))
            for key in sorted(quantised, key=_model_order):
                for part, tensor in job.read_tensors(Job.matrix_name(key)).items():
                    writer.add(f"{key}.{part}", tensor)
        copy_files(source_dir, target_dir)
    except OSError as error:
        raise ConversionError(
            f"cannot write the model to {target_dir}: {error}; make room and start again: the job resumes"
        ) from error
    return sum(path.stat().st_size for path in target_dir.glob("*.safetensors"))


def _model_order(name: str) -> tuple[int, int, str]:
    """The embedding first, then the layers in their order, then the rest."""
    words = name.split(".")
    number = next((int(word) for word in words if word.isdecimal()), None)
    if number is not None:
        return 1, number, name
    return (0 if "embed" in name else 2), 0, name


def _file_hash(path: Path) -> str:
    try:
        return hashlib.blake2b(path.read_bytes(), digest_size=16).hexdigest()
    except OSError as error:
        raise ConversionError(f"{path} cannot be read: {error}; expected a measurement.json") from error
