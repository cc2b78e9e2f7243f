"""What measuring found: for each attention and MLP block, what its layouts cost in bits and in accuracy.

Two forms. `Measurement` is our own: errors of each layout of each matrix, and how much an error in each block matters
to the model's output. `measurement.json` is ExLlamaV2's: the accuracy of each row of its tables; it is read and
written, so measurements can be exchanged.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from exl2_rag.errors import ConversionError, SettingsError
from exl2_rag.llm.quantize.rtn import QuantisationPlan

LEAST_ERROR: Final = 1e-6
_SCALE_BITS = 4


@dataclass(frozen=True, slots=True)
class MeasuredOption:
    """One way to store some matrices.

    Attributes:
        plans: by short name of the matrix.
        total_bits: of all of them on disk, tables included.
        error: of the block's output when it is used; what it is a measure of depends on who measured.
    """

    plans: Mapping[str, QuantisationPlan]
    total_bits: int
    error: float


@dataclass(frozen=True, slots=True)
class Slot:
    """A choice to make: one of some options.

    Attributes:
        block: such as "model.layers.3.mlp".
        options: cheapest first.
        sensitivity: what an error of 1 in this block costs the model.
    """

    block: str
    options: tuple[MeasuredOption, ...]
    sensitivity: float = 1.0


@dataclass(frozen=True, slots=True)
class Measurement:
    """All slots of a model, in its order."""

    slots: tuple[Slot, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "slots": [
                {
                    "block": slot.block,
                    "sensitivity": slot.sensitivity,
                    "options": [option_to_json(option) for option in slot.options],
                }
                for slot in self.slots
            ]
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Measurement:
        """The inverse of `to_json`."""
        return cls(
            tuple(
                Slot(
                    one["block"],
                    tuple(option_from_json(option, "error") for option in one["options"]),
                    float(one["sensitivity"]),
                )
                for one in data["slots"]
            )
        )


def option_to_json(option: MeasuredOption, *, as_accuracy: bool = False) -> dict[str, Any]:
    """An option as ExLlamaV2's file has it, with "accuracy" in the place of our "error" if asked."""
    result = {"accuracy": 1 - option.error} if as_accuracy else {"error": option.error}
    result["total_bits"] = option.total_bits
    plans = {
        name: {
            "group_size": {str(bits): size for bits, size in zip(plan.bits, plan.group_sizes, strict=True)},
            "bits": list(plan.bits),
            "bits_prop": list(plan.proportions),
            "scale_bits": _SCALE_BITS,
        }
        for name, plan in option.plans.items()
    }
    return result | plans


def option_from_json(data: Mapping[str, Any], value: str = "accuracy") -> MeasuredOption:
    """An option of a file; `value` names what it measures.

    Raises:
        ConversionError: it is not of that form.
    """
    try:
        plans = {name: _plan(part) for name, part in data.items() if isinstance(part, Mapping)}
        number = float(data[value])
        total_bits = int(data["total_bits"])
    except (KeyError, TypeError, ValueError, SettingsError) as error:
        raise ConversionError(f"an option of the measurement cannot be read: {error!r}; measure anew") from error
    if not math.isfinite(number) or not plans:
        raise ConversionError(f"an option of the measurement holds {value} {number} and {len(plans)} matrices")
    return MeasuredOption(plans, total_bits, max(LEAST_ERROR, 1 - number) if value == "accuracy" else number)


def read_reference_file(path: Path, blocks: Sequence[str]) -> Measurement:
    """ExLlamaV2's `measurement.json`.

    Args:
        path: the file.
        blocks: the blocks of the model that it must be of, such as "model.layers.0.self_attn".

    Raises:
        ConversionError: it cannot be read, or is of another model.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))["measurement"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConversionError(f"{path} is no measurement.json ({error!r}); expected one of ExLlamaV2's form") from error
    measured = {key: value for key, value in found.items() if isinstance(value, list)}
    if sorted(measured) != sorted(blocks):
        other = sorted(set(measured) ^ set(blocks))
        raise ConversionError(
            f"{path} was measured on another model: it has {len(measured)} blocks, this model {len(blocks)}; "
            f"the first that differs is {other[0]}"
        )
    return Measurement(
        tuple(
            Slot(block, tuple(sorted((option_from_json(one) for one in measured[block]), key=lambda o: o.total_bits)))
            for block in blocks
        )
    )


def write_reference_file(path: Path, measurement: Measurement, *, other_modules: Sequence[str]) -> None:
    """Write ExLlamaV2's form; `other_modules` are those of the model that are not measured, in its order."""
    entries: dict[str, Any] = {
        slot.block: [option_to_json(option, as_accuracy=True) for option in slot.options] for slot in measurement.slots
    }
    entries |= dict.fromkeys(other_modules)
    # The embedding is module 0, then come the blocks, then the rest.
    data = {"measurement": entries, "last_module_idx": len(entries)}
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(data, indent=4) + "\n", encoding="utf-8")
    partial.replace(path)


def _plan(part: Mapping[str, Any]) -> QuantisationPlan:
    bits = tuple(int(one) for one in part["bits"])
    sizes = tuple(_group_sizes(part["group_size"], bits))
    if int(part.get("scale_bits", _SCALE_BITS)) != _SCALE_BITS:
        raise ValueError(f"scale_bits must be {_SCALE_BITS}, they are {part['scale_bits']}")
    return QuantisationPlan(bits, tuple(float(one) for one in part["bits_prop"]), sizes)


def _group_sizes(value: Any, bits: Sequence[int]) -> Iterator[int]:
    """A size for each width: one number for all, a list, or a mapping from the width."""
    for index, width in enumerate(bits):
        if isinstance(value, Mapping):
            yield int(value[str(width)])
        else:
            yield int(value[index] if isinstance(value, list) else value)
