"""The tensors of one engine step: what a model's forward pass is given."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from exl2_rag.llm.kernels.paged_batch import PagedBatch

if TYPE_CHECKING:
    from exl2_rag.llm.layers.lora import LoraRows


@dataclass(frozen=True, slots=True)
class HostLengths:
    """Lengths of a batch as plain numbers.

    Attributes:
        query_starts: B + 1 numbers.
        context_lens: B numbers.
    """

    query_starts: tuple[int, ...]
    context_lens: tuple[int, ...]

    @property
    def longest_slice(self) -> int:
        """Most new tokens that a sequence has."""
        return max((end - start for start, end in itertools.pairwise(self.query_starts)), default=0)


@dataclass(frozen=True, slots=True)
class ForwardInputs:
    """A ragged batch of B sequences with T new tokens in all, laid end to end.

    Attributes:
        token_ids: [T] int64.
        positions: [T] int64, the position of each token in its sequence (0 is the first).
        slot_mapping: [T] int64, where the token's key and value go: page * page_size + row.
        page_table: [B, MP] int32, the pages of each sequence in order; unused entries are -1.
        query_starts: [B + 1] int32; the new tokens of sequence b are rows query_starts[b] to query_starts[b + 1].
        context_lens: [B] int32, tokens of sequence b in the cache once this step's tokens are written.
        group_starts: [NG + 1] int32, or None; sequences group_starts[g] to group_starts[g + 1] share leading pages.
        group_prefix_pages: [NG] int32: how many.
        lengths: `query_starts` and `context_lens` once more, for who must not wait for a card to know them; or None.
        logit_rows: [L] int64, the rows of which logits are wanted; None: of every row, in order.
        token_lora, logit_lora: the LoRA adapters at work on the T rows and on the L rows; None without any.
    """

    token_ids: Tensor
    positions: Tensor
    slot_mapping: Tensor
    page_table: Tensor
    query_starts: Tensor
    context_lens: Tensor
    logit_rows: Tensor | None
    lengths: HostLengths | None = None
    group_starts: Tensor | None = None
    group_prefix_pages: Tensor | None = None
    token_lora: LoraRows | None = None
    logit_lora: LoraRows | None = None

    @property
    def batch(self) -> PagedBatch:
        """What attention needs of it."""
        return PagedBatch(
            self.page_table, self.query_starts, self.context_lens, self.group_starts, self.group_prefix_pages
        )

    @staticmethod
    def single(token_ids: Tensor, *, start: int, pages: Tensor, page_size: int) -> ForwardInputs:
        """One sequence: `token_ids` [T] at positions start, start + 1, …, on `pages` [MP]; logits of every row."""
        count = token_ids.shape[0]
        positions = torch.arange(start, start + count, dtype=torch.int64)
        slots = pages.to(torch.int64)[positions // page_size] * page_size + positions % page_size
        return ForwardInputs(
            token_ids=token_ids.to(torch.int64),
            positions=positions,
            slot_mapping=slots,
            page_table=pages.to(torch.int32)[None, :],
            query_starts=torch.tensor([0, count], dtype=torch.int32),
            context_lens=torch.tensor([start + count], dtype=torch.int32),
            logit_rows=None,
        )
