"""The files around the tensors of a model that is converted: config.json, and what is copied as it is."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from exl2_rag.errors import ModelNotFoundError, UnsupportedModelError

_NOT_COPIED = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".onnx", ".safetensors.index.json")


def read_source_config(source_dir: Path) -> dict[str, Any]:
    """config.json of a model that is to be quantised.

    Raises:
        ModelNotFoundError: there is none, or it is damaged.
        UnsupportedModelError: the model is quantised already.
    """
    path = source_dir / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelNotFoundError(f"{path} cannot be read: {error}; expected a model directory") from error
    except ValueError as error:
        raise ModelNotFoundError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(config, dict):
        raise ModelNotFoundError(f"{path} must hold a JSON object, it holds a {type(config).__name__}")
    if "quantization_config" in config:
        raise UnsupportedModelError(f"{source_dir} is quantised already; convert the float model it was made from")
    return config


def copy_files(source_dir: Path, target_dir: Path) -> None:
    """Copy everything beside the tensors: tokenizer, generation settings, licence."""
    for path in sorted(source_dir.iterdir()):
        if path.is_file() and path.name != "config.json" and not path.name.endswith(_NOT_COPIED):
            shutil.copyfile(path, target_dir / path.name)


def write_config(
    config: Mapping[str, Any], target_dir: Path, *, bits: float, head_bits: int, calibration: Mapping[str, Any]
) -> None:
    """config.json with its `quantization_config`; written last, it makes the directory a model.

    Args:
        bits: the average that was asked for, as the format has it.
        calibration: rows, length and dataset.
    """
    quantised = dict(config) | {
        "quantization_config": {
            "quant_method": "exl2",
            "version": "exl2-rag",
            "bits": bits,
            "head_bits": head_bits,
            "calibration": dict(calibration),
        }
    }
    partial = target_dir / "config.json.partial"
    partial.write_text(json.dumps(quantised, indent=4) + "\n", encoding="utf-8")
    partial.rename(target_dir / "config.json")
