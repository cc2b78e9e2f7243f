"""One step's numbers on their way to the device: numpy arrays that become `ForwardInputs`.

On a card everything travels in one piece: seven small copies would each cost as much as a large one. The piece is a
row of 64-bit words, in this order; 32-bit numbers lie two to a word:

    64-bit: token_ids [T], positions [T], slot_mapping [T], logit_rows [L]
    32-bit: page_table [B * MP], query_starts [B + 1], context_lens [B]
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from exl2_rag.llm.forward_inputs import ForwardInputs

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
    logit_rows: NDArray[np.int64]

    @property
    def is_decode(self) -> bool:
        """Whether every sequence has one new token whose logits are wanted."""
        n_tokens = len(self.token_ids)
        return len(self.context_lens) == n_tokens == len(self.logit_rows)

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
        return StepArrays(
            token_ids=extended(self.token_ids, 0),
            positions=extended(self.positions, 0),
            slot_mapping=extended(self.slot_mapping, PADDING_SLOT),
            page_table=page_table,
            query_starts=np.arange(batch + 1, dtype=np.int32),
            context_lens=np.concatenate([self.context_lens, np.ones(more, dtype=np.int32)]),
            logit_rows=np.arange(batch, dtype=np.int64),
        )

    def pack(self) -> NDArray[np.int64]:
        """All of it in one row of words."""
        long = (self.token_ids, self.positions, self.slot_mapping, self.logit_rows)
        short = (self.page_table.reshape(-1), self.query_starts, self.context_lens)
        n_long, n_short = sum(map(len, long)), sum(map(len, short))
        words = np.zeros(n_long + -(-n_short // 2), dtype=np.int64)
        np.concatenate(long, out=words[:n_long])
        np.concatenate(short, out=words[n_long:].view(np.int32)[:n_short])
        return words

    def unpack(self, words: Tensor) -> ForwardInputs:
        """Views of what `pack` made of arrays of these sizes, wherever it is now."""
        n_tokens, n_rows = len(self.token_ids), len(self.logit_rows)
        batch, n_pages = self.page_table.shape
        token_ids, positions, slots, logit_rows, rest = torch.split(
            words, [n_tokens, n_tokens, n_tokens, n_rows, len(words) - 3 * n_tokens - n_rows]
        )
        sizes = [batch * n_pages, batch + 1, batch]
        page_table, query_starts, context_lens = torch.split(rest.view(torch.int32)[: sum(sizes)], sizes)
        return ForwardInputs(
            token_ids=token_ids,
            positions=positions,
            slot_mapping=slots,
            page_table=page_table.view(batch, n_pages),
            query_starts=query_starts,
            context_lens=context_lens,
            logit_rows=logit_rows,
        )

    def to(self, device: torch.device) -> ForwardInputs:
        """On the device. On a card the copy is queued, not waited for."""
        return self.unpack(host_tensor(self.pack(), device).to(device, non_blocking=True))


def host_tensor(array: NDArray[np.int64], device: torch.device) -> Tensor:
    """The array as a tensor from which a card copies by itself; torch keeps its memory until that has happened."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory() if device.type == "cuda" else tensor
