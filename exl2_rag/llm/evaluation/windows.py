"""Cutting a text into windows that a model's context takes, each token scored once.

    tokens   0 1 2 3 4 5 6 7 8 9          length 6, stride 3
    window   0 1 2 3 4 5                  scores 1-5 (0 has nothing before it, unless BOS is)
                   3 4 5 6 7 8            scores 6-8, with 3-5 as context
                         6 7 8 9          scores 9

With stride = length windows do not overlap, and each one's first token goes unscored without BOS. A smaller stride
gives every token at least length - stride tokens of context, for length / stride times the work.

Source: the sliding window of the transformers documentation on perplexity.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from exl2_rag.errors import SettingsError


@dataclass(frozen=True, slots=True)
class Window:
    """Token ids to compute, the BOS token included if there is one.

    Attributes:
        first_scored: place in `token_ids` of the first token whose probability counts; at least 1.
    """

    token_ids: tuple[int, ...]
    first_scored: int

    @property
    def n_scored(self) -> int:
        """How many tokens are scored."""
        return len(self.token_ids) - self.first_scored


def sliding_windows(token_ids: Sequence[int], length: int, stride: int, *, bos: int | None = None) -> Iterator[Window]:
    """The windows of one text; those in which nothing is left to score are not given.

    Args:
        token_ids: the text, without BOS.
        length: tokens of a window, BOS included.
        stride: how far a window begins behind the one before, at most the tokens of a window.
        bos: stands at the head of every window.

    Raises:
        SettingsError: a length below 2, or a stride out of range.
    """
    head = () if bos is None else (bos,)
    room = length - len(head)
    check_sizes(length, stride)
    stride = min(stride, room)
    done = 0  # tokens scored, or passed over, so far
    for begin in range(0, len(token_ids), stride):
        end = min(begin + room, len(token_ids))
        window = (*head, *token_ids[begin:end])
        first = max(len(head) + done - begin, 1)
        if first < len(window):
            yield Window(window, first)
        done = end
        if end == len(token_ids):
            return


def check_sizes(length: int, stride: int) -> None:
    """Refuse sizes that make no windows.

    Raises:
        SettingsError: see `sliding_windows`.
    """
    if length < 2:
        raise SettingsError(f"length must be at least 2 tokens, one to predict from and one to predict; got {length}")
    if not 1 <= stride <= length:
        raise SettingsError(f"stride must be from 1 to the length of {length}, got {stride}")
