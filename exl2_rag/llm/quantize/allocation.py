"""Chooses a layout for every slot within a budget of bits. Numbers only.

"refined" makes the sum of sensitivity times error small: a price per bit makes each slot choose for itself, the right
price spends the budget, and what is left over buys the best exchanges. "reference" has the objective of ExLlamaV2's
converter, the sum of errors to a power, the power such that the largest error becomes small; solved here in the same
way instead of by annealing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from exl2_rag.errors import SettingsError
from exl2_rag.llm.quantize.measurement import MeasuredOption, Measurement, Slot

_POWERS = [1.5 + 0.05 * step for step in range(41)]


@dataclass(frozen=True, slots=True)
class Choice:
    """One option for each slot, in the order of the slots."""

    options: tuple[MeasuredOption, ...]

    @property
    def total_bits(self) -> int:
        """Of all together."""
        return sum(option.total_bits for option in self.options)


def allocate(measurement: Measurement, budget_bits: int, *, method: str) -> Choice:
    """The choice within the budget.

    Raises:
        SettingsError: not even the cheapest options fit.
    """
    slots = measurement.slots
    least = sum(min(option.total_bits for option in slot.options) for slot in slots)
    if least > budget_bits:
        raise SettingsError(
            f"the smallest layouts take {least} bits, only {budget_bits} are allowed; ask for "
            f"{least / budget_bits:.3f} times as many bits per weight, or more"
        )
    if method == "refined":
        costs = [[slot.sensitivity * option.error for option in slot.options] for slot in slots]
        return _pick(slots, _solve(slots, costs, budget_bits))
    best: list[int] = []
    for power in _POWERS:
        costs = [[option.error**power for option in slot.options] for slot in slots]
        found = _solve(slots, costs, budget_bits)
        if not best or _largest(slots, found) < _largest(slots, best):
            best = found
    return _pick(slots, best)


def _pick(slots: Sequence[Slot], places: Sequence[int]) -> Choice:
    return Choice(tuple(slot.options[place] for slot, place in zip(slots, places, strict=True)))


def _largest(slots: Sequence[Slot], places: Sequence[int]) -> float:
    return max(slot.options[place].error for slot, place in zip(slots, places, strict=True))


def _solve(slots: Sequence[Slot], costs: Sequence[Sequence[float]], budget_bits: int) -> list[int]:
    """Places of options with nearly the least sum of costs."""

    def at_price(price: float) -> list[int]:
        return [
            min(range(len(cost)), key=lambda i: (cost[i] + price * slot.options[i].total_bits, i))
            for slot, cost in zip(slots, costs, strict=True)
        ]

    def bits_of(places: Sequence[int]) -> int:
        return sum(slot.options[place].total_bits for slot, place in zip(slots, places, strict=True))

    low, high = -80.0, 40.0  # logarithms of prices; the higher is too dear
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (low, middle) if bits_of(at_price(math.exp(middle))) <= budget_bits else (middle, high)
    places = at_price(math.exp(high))
    if bits_of(places) > budget_bits:  # no price is high enough where costs are huge against bits
        places = [min(range(len(slot.options)), key=lambda i: slot.options[i].total_bits) for slot in slots]
    _exchange(slots, costs, places, budget_bits - bits_of(places))
    return places


def _exchange(slots: Sequence[Slot], costs: Sequence[Sequence[float]], places: list[int], left: int) -> None:
    """Make the move that saves most of the cost among those the rest of the budget pays for, until none does."""
    while True:
        best: tuple[float, int, int] | None = None
        for index, (slot, cost) in enumerate(zip(slots, costs, strict=True)):
            here = places[index]
            for place, option in enumerate(slot.options):
                saved = cost[here] - cost[place]
                if saved > 0 and option.total_bits - slot.options[here].total_bits <= left:
                    best = max(best or (0.0, -1, -1), (saved, -index, -place))
        if best is None or best[0] <= 0:
            return
        index, place = -best[1], -best[2]
        left -= slots[index].options[place].total_bits - slots[index].options[places[index]].total_bits
        places[index] = place
