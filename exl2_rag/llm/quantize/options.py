"""What a conversion is asked for: plain, checked data."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Final, Literal

from exl2_rag.errors import SettingsError
from exl2_rag.llm.quantize.candidates import HEAD_PLANS

Method = Literal["refined", "reference", "uniform"]

METHODS: Final[tuple[Method, ...]] = ("refined", "reference", "uniform")
_LEAST_LENGTH = 16


def check_method(name: str) -> Method:
    """The method of this name.

    Raises:
        SettingsError: there is none.
    """
    for method in METHODS:
        if method == name:
            return method
    raise SettingsError(f"method must be one of {', '.join(METHODS)}, got {name!r}")


@dataclass(frozen=True, slots=True)
class ConversionOptions:
    """How a model is converted. Two conversions with the same options, text and source write the same bytes.

    Attributes:
        bits: average bits per weight of the decoder's matrices on disk, scales and tables included; the head is not
            counted.
        head_bits: of the output head: 2, 3, 4, 5, 6 or 8.
        method: "refined" chooses layouts by what they cost the model's output, weighs scales by what errors cost, and
            makes up for what earlier layers lost; "reference" does what ExLlamaV2's converter does; "uniform" measures
            nothing and gives every matrix the same bits, by plain GPTQ.
        rows, length: calibration text of the quantising pass: rows of so many tokens.
        measure_rows: rows of the measuring pass.
        seed: of what is drawn at random in the built-in calibration text.
        shard_bytes: most bytes of one tensor file; 0: one file.
    """

    bits: float = 4.0
    head_bits: int = 6
    method: Method = "refined"
    rows: int = 64
    length: int = 1024
    measure_rows: int = 8
    seed: int = 0
    shard_bytes: int = 8 << 30

    def __post_init__(self) -> None:
        if not math.isfinite(self.bits) or not 2 < self.bits <= 8.5:
            raise SettingsError(f"bits must be above 2 and at most 8.5 for EXL2, got {self.bits}")
        if self.head_bits not in HEAD_PLANS:
            raise SettingsError(f"head_bits must be one of {sorted(HEAD_PLANS)}, got {self.head_bits}")
        check_method(self.method)
        if self.rows < 1 or not 1 <= self.measure_rows <= self.rows:
            raise SettingsError(
                f"rows must be at least 1 and measure_rows from 1 to rows, got {self.rows} and {self.measure_rows}"
            )
        if self.length < _LEAST_LENGTH:
            raise SettingsError(f"length must be at least {_LEAST_LENGTH} tokens, got {self.length}")
        if self.shard_bytes < 0:
            raise SettingsError(f"shard_bytes must be positive, or 0 for one file, got {self.shard_bytes}")

    def as_dict(self) -> dict[str, Any]:
        """For a job's record."""
        return asdict(self)
