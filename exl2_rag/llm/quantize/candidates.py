"""The layouts that ExLlamaV2's converter chooses from, and which of them a wanted average takes in each layer.

An attention block or an MLP takes one row of its table. Attention layouts are given for q and k, v, o; MLP layouts for
gate, up, down. Knows sizes, not weights.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from exl2_rag.errors import SettingsError
from exl2_rag.llm.quantize.rtn import QuantisationPlan, padded


def _plan(text: str) -> QuantisationPlan:
    """A plan from such as "5:.1/128 4:.9/128": width, share of the rows, rows of a group."""
    bits, proportions, sizes = [], [], []
    for part in text.split():
        width, rest = part.split(":")
        share, size = rest.split("/")
        bits.append(int(width))
        proportions.append(float(share))
        sizes.append(int(size))
    return QuantisationPlan(tuple(bits), tuple(proportions), tuple(sizes))


def _table(rows: Sequence[tuple[str, ...]]) -> tuple[tuple[QuantisationPlan, ...], ...]:
    return tuple(tuple(_plan(text) for text in row) for row in rows)


_ATTENTION = _table(
    (
        ("3:.05/64 2:.95/64", "3:.05/64 2:.95/64", "3:.05/64 2:.95/64"),
        ("3:.1/64 2:.9/64", "3:.25/64 2:.75/64", "3:.1/64 2:.9/64"),
        ("3:.1/64 2:.9/64", "4:.1/128 3:.9/128", "3:.1/64 2:.9/64"),
        ("3:.1/64 2:.9/64", "4:.1/128 3:.9/128", "4:.1/128 3:.9/128"),
        ("4:.1/128 3:.9/128", "4:.1/128 3:.9/128", "4:.1/128 3:.9/128"),
        ("4:.1/128 3:.9/128", "4:.1/64 3:.9/64", "4:.1/128 3:.9/128"),
        ("4:1/128", "4:1/128", "4:1/128"),
        ("4:1/128", "4:1/64", "4:1/128"),
        ("4:1/64", "4:1/32", "4:1/64"),
        ("4:1/32", "4:1/32", "4:1/32"),
        ("5:.1/128 4:.9/128", "5:.1/64 4:.9/64", "5:.1/128 4:.9/128"),
        ("5:.1/64 4:.9/64", "5:.1/32 4:.9/32", "5:.1/64 4:.9/64"),
        ("5:.1/64 4:.9/64", "5:1/64", "5:.1/64 4:.9/64"),
        ("5:.1/32 4:.9/32", "5:1/32", "5:.1/32 4:.9/32"),
        ("6:.1/128 5:.9/128", "6:1/128", "6:.1/128 5:.9/128"),
        ("6:.1/32 5:.9/32", "6:1/32", "6:.1/32 5:.9/32"),
        ("6:1/128", "6:1/128", "6:1/128"),
        ("6:1/32", "8:1/32", "6:1/32"),
        ("8:1/128", "8:1/128", "8:1/128"),
    )
)
"""(q and k, v, o) of each row."""

_MLP = _table(
    (
        ("3:.05/64 2:.95/64", "3:.05/64 2:.95/64", "6:.05/32 3:.2/64 2:.75/64"),
        ("3:.1/64 2:.9/64", "3:.25/64 2:.75/64", "6:.05/32 3:.2/64 2:.75/64"),
        ("3:.1/64 2:.9/64", "3:.3/64 2:.7/64", "5:.05/32 3:.95/32"),
        ("3:.1/64 2:.9/64", "3:.3/64 2:.7/64", "5:.05/32 4:.95/32"),
        ("4:.1/128 3:.9/128", "4:.25/128 3:.75/128", "8:.05/32 4:.1/128 3:.85/128"),
        ("4:.1/32 3:.9/32", "4:.25/32 3:.75/32", "8:.05/32 4:.1/32 3:.85/32"),
        ("4:.1/32 3:.9/32", "4:.25/32 3:.75/32", "8:.05/32 4:.95/128"),
        ("4:1/128", "4:1/32", "8:.05/32 4:.95/128"),
        ("4:1/32", "4:1/32", "8:.05/32 4:.95/32"),
        ("5:.1/128 4:.9/128", "5:.25/128 4:.75/128", "8:.05/32 5:.1/128 4:.85/128"),
        ("5:.1/32 4:.9/32", "5:.25/32 4:.75/32", "8:.05/32 5:.1/32 4:.85/32"),
        ("6:.1/128 5:.9/128", "6:.25/128 5:.75/128", "8:.05/32 6:.1/128 5:.85/128"),
        ("6:.1/32 5:.9/32", "6:.25/32 5:.75/32", "8:.05/32 6:.1/32 5:.85/32"),
        ("6:1/128", "6:1/128", "8:.05/32 6:.95/128"),
        ("8:.1/128 6:.9/128", "8:.1/128 6:.9/128", "8:.15/128 6:.85/128"),
        ("8:.1/128 6:.9/128", "8:.1/128 6:.9/128", "8:1/128"),
        ("8:1/128", "8:1/128", "8:1/128"),
    )
)
"""(gate, up, down) of each row."""

_MIXES = (
    "3:.05/64 2:.95/64",
    "3:.1/64 2:.9/64",
    "3:.25/64 2:.75/64",
    "3:.5/64 2:.5/64",
    "4:.05/128 3:.95/128",
    "4:.1/64 3:.9/64",
    "4:.25/128 3:.75/128",
    "4:.5/128 3:.5/128",
    "4:1/128",
    "4:1/32",
    "5:.1/128 4:.9/128",
    "5:.25/64 4:.75/64",
    "5:.5/128 4:.5/128",
    "5:1/128",
    "5:1/32",
    "6:.1/128 5:.9/128",
    "6:.5/128 5:.5/128",
    "6:1/128",
    "6:1/32",
    "8:.1/128 6:.9/128",
    "8:.3/128 6:.7/128",
    "8:.6/128 6:.4/128",
    "8:.85/128 6:.15/128",
    "8:1/128",
    "8:1/32",
)
_BELOW, _ABOVE = 2.2, 2.1  # layouts of so many bits less and more than the average are worth measuring


def matrix_plans(bits: float, in_features: int, out_features: int) -> list[QuantisationPlan]:
    """Layouts to measure for a single matrix of a model that is to have this average, the smallest one always."""
    plans = [_plan(text) for text in _MIXES]
    elements = in_features * padded(out_features)

    def width(plan: QuantisationPlan) -> float:
        return plan.total_bits(in_features, padded(out_features)) / elements

    return [plan for plan in plans if bits - _BELOW <= width(plan) <= bits + _ABOVE or plan is plans[0]]


def reference_rows(gated: bool = True) -> dict[str, list[dict[str, QuantisationPlan]]]:
    """The rows of ExLlamaV2's tables: plans by short name of the matrix, for each part of a layer.

    Args:
        gated: the MLP has a gate.
    """
    attention = [{"q_proj": qk, "k_proj": qk, "v_proj": value, "o_proj": out} for qk, value, out in _ATTENTION]
    mlp = [{"gate_proj": gate, "up_proj": up, "down_proj": down} for gate, up, down in _MLP]
    if not gated:
        mlp = [{name: plan for name, plan in row.items() if name != "gate_proj"} for row in mlp]
    return {"self_attn": attention, "mlp": mlp}


HEAD_PLANS = {
    2: _plan("4:.3/32 2:.7/32"),
    3: _plan("4:.15/32 3:.85/32"),
    4: _plan("6:.15/32 4:.85/32"),
    5: _plan("6:.15/128 5:.85/128"),
    6: _plan("8:.15/128 6:.85/128"),
    8: _plan("8:1/128"),
}
"""The layout of an output head, by the bits asked for."""


@dataclass(frozen=True, slots=True)
class MatrixSize:
    """A matrix K x N; `role` is such as "self_attn.q_proj"."""

    role: str
    in_features: int
    out_features: int


@dataclass(frozen=True, slots=True)
class BlockOption:
    """One row of a table for the matrices of one block.

    Attributes:
        plans: one per matrix, in the order of the sizes.
        total_bits: of all of them on disk, tables included.
        error: what to expect of it beside the other rows; has no unit.
    """

    plans: tuple[QuantisationPlan, ...]
    total_bits: int
    error: float


def attention_options(q: MatrixSize, k: MatrixSize, v: MatrixSize, o: MatrixSize) -> list[BlockOption]:
    """The rows of the attention table, cheapest first."""
    return _options((q, k, v, o), [(qk, qk, value, out) for qk, value, out in _ATTENTION])


def mlp_options(gate: MatrixSize, up: MatrixSize, down: MatrixSize) -> list[BlockOption]:
    """The rows of the MLP table, cheapest first."""
    return _options((gate, up, down), _MLP)


def choose_options(
    blocks: Sequence[Sequence[BlockOption]], sensitivities: Sequence[float], budget_bits: int
) -> list[BlockOption]:
    """One option per block within a budget, with nearly the least sum of sensitivity times error.

    Args:
        blocks: the options of each block, cheapest first.
        sensitivities: how much an error in each block matters.
        budget_bits: for all blocks together.

    Raises:
        SettingsError: not even the cheapest options fit.
    """
    least = sum(options[0].total_bits for options in blocks)
    if least > budget_bits:
        raise SettingsError(
            f"the smallest layouts take {least} bits, only {budget_bits} are allowed; ask for "
            f"{least / budget_bits:.2f} times as many bits per weight, or more"
        )

    def at_price(price: float) -> list[int]:
        return [
            min(range(len(options)), key=lambda i: weight * options[i].error + price * options[i].total_bits)
            for options, weight in zip(blocks, sensitivities, strict=True)
        ]

    def bits_of(choice: Sequence[int]) -> int:
        return sum(options[i].total_bits for options, i in zip(blocks, choice, strict=True))

    # A price per bit makes each block choose for itself; the right price spends the budget. High: too dear.
    low, high = -60.0, 60.0
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (low, middle) if bits_of(at_price(math.exp(middle))) <= budget_bits else (middle, high)
    choice = at_price(math.exp(high))
    if bits_of(choice) > budget_bits:  # no price is high enough where errors are huge against bits
        choice = [0] * len(blocks)
    _spend_rest(blocks, choice, budget_bits - bits_of(choice))
    return [options[i] for options, i in zip(blocks, choice, strict=True)]


def _spend_rest(blocks: Sequence[Sequence[BlockOption]], choice: list[int], left: int) -> None:
    """Move blocks up their table while the budget allows; changes `choice`."""
    moved = True
    while moved:
        moved = False
        for index, options in enumerate(blocks):
            here = options[choice[index]]
            for better in range(choice[index] + 1, len(options)):
                cost = options[better].total_bits - here.total_bits
                if cost > left:
                    break
                if options[better].error < here.error:
                    choice[index], left, moved = better, left - cost, True
                    break


def _options(sizes: Sequence[MatrixSize], rows: Sequence[tuple[QuantisationPlan, ...]]) -> list[BlockOption]:
    options = [
        BlockOption(
            plans=row,
            total_bits=sum(
                plan.total_bits(size.in_features, padded(size.out_features))
                for plan, size in zip(row, sizes, strict=True)
            ),
            error=sum(
                plan.expected_error(size.in_features) * size.in_features * size.out_features
                for plan, size in zip(row, sizes, strict=True)
            ),
        )
        for row in rows
    ]
    return sorted(options, key=lambda option: option.total_bits)
