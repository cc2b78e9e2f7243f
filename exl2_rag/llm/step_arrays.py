"""One step's numbers on their way to the device: numpy arrays that become `ForwardInputs`.

On a card everything travels in one piece: seven small copies would each cost as much as a large one. The piece is a
row of 64-bit words, in this order; 32-bit numbers lie two to a word:

    64-bit: token_ids [T], positions [T], slot_mapping [T], logit_rows [L]
    32-bit: page_table [B * MP], query_starts [B + 1], context_lens [B], and of a step whose sequences share pages
            group_starts [NG + 1], group_prefix_pages [NG]
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from exl2_rag.llm.forward_inputs import ForwardInputs, HostLengths

PADDING_SLOT = -1
"""Where a padding row's key and value go: nowhere."""


@dataclass(frozen=True, slots=True)
class StepArrays:
    """A ragged batch, as `ForwardInputs` has it."""

    token_ids: NDArray[np.int64]
    positions: NDArray[np.int64]
    slot_mapping: NDArray[np.int64]
    page_table: NDArray[np.int32]
    query_starts: NDArray[np.int32]
    context_lens: NDArray[np.int32]
    logit_rows: NDArray[np.int64] | None
    group_starts: NDArray[np.int32] | None = None
    group_prefix_pages: NDArray[np.int32] | None = None

    @property
    def is_decode(self) -> bool:
        """Whether every sequence has one new token whose logits are wanted."""
        return len(self.context_lens) == len(self.token_ids) and self.logit_rows is None

    def padded(self, batch: int, n_pages: int) -> StepArrays:
        """A decode step with rows and page table columns added, up to `batch` and `n_pages`.

        A padding row is a sequence of one token that reads the first row of page 0 and writes nothing.
        """
        n_tokens = len(self.token_ids)
        more = batch - n_tokens

        def extended(array: NDArray[np.int64], value: int) -> NDArray[np.int64]:
            return np.concatenate([array, np.full(more, value, dtype=np.int64)])

        page_table = np.full((batch, n_pages), -1, dtype=np.int32)
        page_table[:n_tokens, : self.page_table.shape[1]] = self.page_table
        page_table[n_tokens:, 0] = 0
        group_starts = group_prefix_pages = None
        if self.group_starts is not None and self.group_prefix_pages is not None:
            # Each padding row is a group by itself; what is left of the groups is empty.
            n_groups = len(self.group_prefix_pages)
            group_starts = np.full(batch + 1, batch, dtype=np.int32)
            group_starts[: n_groups + 1] = self.group_starts
            group_starts[n_groups : n_groups + more] = np.arange(n_tokens, batch)
            group_prefix_pages = np.zeros(batch, dtype=np.int32)
            group_prefix_pages[:n_groups] = self.group_prefix_pages
        return StepArrays(
            token_ids=extended(self.token_ids, 0),
            positions=extended(self.positions, 0),
            slot_mapping=extended(self.slot_mapping, PADDING_SLOT),
            page_table=page_table,
            query_starts=np.arange(batch + 1, dtype=np.int32),
            context_lens=np.concatenate([self.context_lens, np.ones(more, dtype=np.int32)]),
            logit_rows=None,
            group_starts=group_starts,
            group_prefix_pages=group_prefix_pages,
        )

    def pack(self) -> NDArray[np.int64]:
        """All of it in one row of words."""
        rows = self.token_ids[:0] if self.logit_rows is None else self.logit_rows
        long = (self.token_ids, self.positions, self.slot_mapping, rows)
        short = [self.page_table.reshape(-1), self.query_starts, self.context_lens, *self._groups()]
        n_long, n_short = sum(map(len, long)), sum(map(len, short))
        words = np.zeros(n_long + -(-n_short // 2), dtype=np.int64)
        np.concatenate(long, out=words[:n_long])
        np.concatenate(short, out=words[n_long:].view(np.int32)[:n_short])
        return words

    def _groups(self) -> list[NDArray[np.int32]]:
        return [part for part in (self.group_starts, self.group_prefix_pages) if part is not None]

    def unpack(self, words: Tensor) -> ForwardInputs:
        """Views of what `pack` made of arrays of these sizes, wherever it is now."""
        n_tokens, n_rows = len(self.token_ids), 0 if self.logit_rows is None else len(self.logit_rows)
        batch, n_pages = self.page_table.shape
        token_ids, positions, slots, logit_rows, rest = torch.split(
            words, [n_tokens, n_tokens, n_tokens, n_rows, len(words) - 3 * n_tokens - n_rows]
        )
        sizes = [batch * n_pages, batch + 1, batch, *(len(part) for part in self._groups())]
        page_table, query_starts, context_lens, *groups = torch.split(rest.view(torch.int32)[: sum(sizes)], sizes)
        return ForwardInputs(
            token_ids=token_ids,
            positions=positions,
            slot_mapping=slots,
            page_table=page_table.view(batch, n_pages),
            query_starts=query_starts,
            context_lens=context_lens,
            logit_rows=None if self.logit_rows is None else logit_rows,
            group_starts=groups[0] if groups else None,
            group_prefix_pages=groups[1] if groups else None,
        )

    def to(self, device: torch.device) -> ForwardInputs:
        """On the device. On a card the copy is queued, not waited for."""
        inputs = self.unpack(host_tensor(self.pack(), device).to(device, non_blocking=True))
        if device.type != "cuda":
            return inputs
        lengths = HostLengths(tuple(self.query_starts.tolist()), tuple(self.context_lens.tolist()))
        return dataclasses.replace(inputs, lengths=lengths)


def host_tensor(array: NDArray[np.int64], device: torch.device) -> Tensor:
    """The array as a tensor from which a card copies by itself; torch keeps its memory until that has happened."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory() if device.type == "cuda" else tensor
