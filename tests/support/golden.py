"""The golden EXL2 and GPTQ vectors committed with the tests."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path

from safetensors import safe_open
from torch import Tensor

GOLDEN_DIR = Path(__file__).resolve().parents[1] / "golden" / "exl2"


@dataclass(frozen=True)
class GoldenLayer:
    """One file: its tensors, its metadata and the key of its layer."""

    name: str
    tensors: dict[str, Tensor]
    metadata: dict[str, str]

    @property
    def key(self) -> str:
        return self.metadata["key"]

    @property
    def checkpoint_format(self) -> str | None:
        return self.metadata.get("checkpoint_format")

    @property
    def prescale(self) -> float:
        return float(self.metadata["prescale"])

    def part(self, name: str) -> Tensor:
        return self.tensors[f"{self.key}.{name}"]

    def parts(self) -> dict[str, Tensor]:
        prefix = f"{self.key}."
        return {name.removeprefix(prefix): value for name, value in self.tensors.items() if name.startswith(prefix)}


def golden_names(pattern: str) -> list[str]:
    """Names of the files that match, without their ending."""
    names = sorted(path.stem for path in GOLDEN_DIR.glob(f"{pattern}.safetensors"))
    assert names, f"no golden vectors match {pattern}"
    return names


@cache
def golden(name: str) -> GoldenLayer:
    """One golden file. Shared between tests: do not modify its tensors."""
    with safe_open(GOLDEN_DIR / f"{name}.safetensors", "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        return GoldenLayer(name, tensors, dict(file.metadata()))


EXL2_NAMES = [name for name in golden_names("*") if not name.startswith(("gptq", "quantiser"))]
GPTQ_NAMES = golden_names("gptq*")
QUANTISER_NAMES = golden_names("quantiser_gptq*")
PRESCALED_NAMES = [name for name in EXL2_NAMES if "head" in name]
