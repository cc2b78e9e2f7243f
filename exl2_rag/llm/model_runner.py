"""One step's tensors: turns planned slices into `ForwardInputs` and runs the model. Decides nothing."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence as Seq
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from exl2_rag.llm.forward_inputs import ForwardInputs
from exl2_rag.llm.kv_cache import KVCache
from exl2_rag.llm.lora.step import lora_rows
from exl2_rag.llm.page_table import PageCopy
from exl2_rag.llm.prefix_groups import PrefixGroups, group_by_prefix
from exl2_rag.llm.scheduler import Slice
from exl2_rag.llm.step_arrays import StepArrays

MIN_SHARED_TOKENS = 256
"""Tokens that sequences must share for a pass of its own over them to pay; one split of attention's work."""


class Model(Protocol):
    """What is run; `exl2_rag.llm.models.decoder.Decoder` is one."""

    def forward(self, inputs: ForwardInputs, cache: KVCache) -> Tensor:
        """[L, V] float32 logits of `inputs.logit_rows`; writes keys and values of all rows into `cache`."""
        ...


class RecordedSteps(Protocol):
    """Runs steps that are the same sequence of kernels each time."""

    def run(self, arrays: StepArrays) -> Tensor | None:
        """[B, V] float32 logits of a decode step, valid until the next call; None: run this step without."""
        ...


class ModelRunner:
    """A model and its KV cache.

    Args:
        model: computes logits.
        cache: its keys and values.
        device: where the inputs go.
        recorded: runs steps that it has recorded: tapes on the CPU, graphs on a card.
        shares_prefixes: the model reads pages that sequences of a decode step share once for all of them.
    """

    def __init__(
        self,
        model: Model,
        cache: KVCache,
        device: torch.device,
        recorded: RecordedSteps | None = None,
        *,
        shares_prefixes: bool = False,
    ) -> None:
        self.cache = cache
        self._model = model
        self._device = device
        self._recorded = recorded
        self._shares_prefixes = shares_prefixes

    def copy_rows(self, copies: Seq[PageCopy]) -> None:
        """Carry out the copies, in their order."""
        for copy in copies:
            self.cache.copy_rows(copy.source, copy.target, copy.n_rows)

    @torch.inference_mode()
    def run(self, slices: Seq[Slice]) -> list[Tensor]:
        """Compute the slices in one forward pass.

        Returns:
            For each slice [rows, V] float32: one row if its end is reached and a token is to follow, and one more for
            each token of its draft; the rows an evaluation asks for; or none. Those of a decode step are valid until
            the next call.
        """
        wanted = [wanted_rows(one) for one in slices]
        groups = self._shared_prefixes(slices)
        if groups is None:
            logits = self._logits(slices, wanted, self._arrays(slices, wanted))
            return list(torch.split(logits, [len(rows) for rows in wanted]))
        # Sequences that share pages must be neighbours; their logits go back to where they were asked for.
        ordered, ordered_rows = [slices[index] for index in groups.order], [wanted[index] for index in groups.order]
        arrays = self._arrays(ordered, ordered_rows)
        arrays = dataclasses.replace(
            arrays,
            group_starts=np.array(groups.starts, dtype=np.int32),
            group_prefix_pages=np.array(groups.prefix_pages, dtype=np.int32),
        )
        logits = self._logits(ordered, ordered_rows, arrays)
        parts = torch.split(logits, [len(rows) for rows in ordered_rows])
        place = {index: position for position, index in enumerate(groups.order)}
        return [parts[place[index]] for index in range(len(slices))]

    def _shared_prefixes(self, slices: Seq[Slice]) -> PrefixGroups | None:
        """The groups of a decode step whose shared pages are worth reading once; None for other steps."""
        if not self._shares_prefixes or len(slices) < 2 or any(one.n_rows > 1 for one in slices):
            return None
        page_size = self.cache.page_size
        # Pages before the one that this step writes to: full, and never written again.
        pages = [one.sequence.held.pages[: one.start // page_size] for one in slices if one.sequence.held is not None]
        groups = group_by_prefix(pages, min_pages=max(1, MIN_SHARED_TOKENS // page_size))
        return groups if groups.shares else None

    def _logits(self, slices: Seq[Slice], wanted: Seq[range], arrays: StepArrays) -> Tensor:
        token_lora = lora_rows((one.sequence.lora, one.n_rows) for one in slices)
        if token_lora is not None:  # other matrices each time: nothing to record
            logit_lora = lora_rows((one.sequence.lora, len(rows)) for one, rows in zip(slices, wanted, strict=True))
            inputs = dataclasses.replace(arrays.to(self._device), token_lora=token_lora, logit_lora=logit_lora)
            return self._model.forward(inputs, self.cache)
        logits = None if self._recorded is None else self._recorded.run(arrays)
        return self._model.forward(arrays.to(self._device), self.cache) if logits is None else logits

    def build_inputs(self, slices: Seq[Slice], wanted: Seq[range]) -> ForwardInputs:
        """The ragged batch of the slices; `wanted` are the rows of each, counted from its start, that need logits."""
        return self._arrays(slices, wanted).to(self._device)

    def _arrays(self, slices: Seq[Slice], wanted: Seq[range]) -> StepArrays:
        page_size = self.cache.page_size
        counts = np.array([one.n_rows for one in slices], dtype=np.int64)
        starts = np.concatenate([[0], np.cumsum(counts)])
        token_ids = np.empty(starts[-1], dtype=np.int64)
        positions = np.empty(starts[-1], dtype=np.int64)
        slots = np.empty(starts[-1], dtype=np.int64)
        context_lens = np.array([one.start + one.n_rows for one in slices], dtype=np.int32)
        page_table = np.full((len(slices), -(-int(context_lens.max()) // page_size)), -1, dtype=np.int32)
        for row, one in enumerate(slices):
            assert one.sequence.held is not None
            rows = slice(starts[row], starts[row + 1])
            end = one.start + one.n_rows
            pages = np.array(one.sequence.held.pages[: -(-end // page_size)], dtype=np.int64)
            place = np.arange(one.start, end)
            token_ids[rows] = [*one.sequence.token_ids[one.start : one.start + one.n_tokens], *one.draft]
            positions[rows] = place
            slots[rows] = pages[place // page_size] * page_size + place % page_size
            page_table[row, : len(pages)] = pages
        logit_rows = [starts[row] + offset for row, offsets in enumerate(wanted) for offset in offsets]
        every_row = sum(len(offsets) for offsets in wanted) == starts[-1]
        return StepArrays(
            token_ids=token_ids,
            positions=positions,
            slot_mapping=slots,
            page_table=page_table,
            query_starts=starts.astype(np.int32),
            context_lens=context_lens,
            logit_rows=None if every_row else np.array(logit_rows, dtype=np.int64),
        )


def wanted_rows(one: Slice) -> range:
    """Which rows of a slice, counted from its start, need logits."""
    if one.sequence.evaluation is not None:
        return range(min(max(one.sequence.evaluation.first_row - one.start, 0), one.n_tokens), one.n_tokens)
    is_wanted = one.reaches_end and one.sequence.max_new_tokens > 0
    return range(one.n_tokens - 1, one.n_rows) if is_wanted else range(0)
