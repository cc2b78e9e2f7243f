"""Which sequences of a step share their leading pages: what attention needs to read shared pages once. [no torch]"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class PrefixGroups:
    """A partition of a batch into groups that share leading pages.

    Attributes:
        order: the sequences in an order in which those of a group are neighbours.
        starts: [NG + 1] where each group starts in `order`, and its length at the end.
        prefix_pages: [NG] how many leading pages the sequences of each group share; 0 for groups of one.
    """

    order: tuple[int, ...]
    starts: tuple[int, ...]
    prefix_pages: tuple[int, ...]

    @property
    def shares(self) -> bool:
        """Whether any group shares anything."""
        return any(self.prefix_pages)


def group_by_prefix(pages: Sequence[Sequence[int]], *, min_pages: int) -> PrefixGroups:
    """Group sequences so that many page reads are saved.

    Sorted by their pages, sequences with equal beginnings are neighbours. A group takes its next neighbour as long as
    that does not make it save less: a group of n that shares p pages saves (n - 1) * p reads.

    Args:
        pages: of each sequence, those that are full and stay so in this step, in order.
        min_pages: groups that would share fewer are not made.
    """
    order = sorted(range(len(pages)), key=lambda index: tuple(pages[index]))
    starts, prefix_pages = [0], []
    shared = 0  # pages that the current group, order[starts[-1]:], shares; of a group of one those it has
    for position, index in enumerate(order):
        size = position - starts[-1]
        if size == 0:
            shared = len(pages[index])
            continue
        common = min(shared, _common_length(pages[order[position - 1]], pages[index]))
        if common >= max(1, min_pages) and size * common >= (size - 1) * shared:
            shared = common
            continue
        starts.append(position)
        prefix_pages.append(shared if size > 1 else 0)
        shared = len(pages[index])
    if order:
        prefix_pages.append(shared if len(order) - starts[-1] > 1 else 0)
        starts.append(len(order))
    return PrefixGroups(tuple(order), tuple(starts), tuple(prefix_pages))


def _common_length(first: Sequence[int], second: Sequence[int]) -> int:
    for index, (one, other) in enumerate(zip(first, second, strict=False)):
        if one != other:
            return index
    return min(len(first), len(second))
