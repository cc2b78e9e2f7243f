"""One step's tensors: turns planned slices into `ForwardInputs` and runs the model. Decides nothing."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from exl2_rag.llm.decode_tapes import DecodeTapes
from exl2_rag.llm.forward_inputs import ForwardInputs
from exl2_rag.llm.kv_cache import KVCache
from exl2_rag.llm.page_table import PageCopy
from exl2_rag.llm.scheduler import Slice


class Model(Protocol):
    """What is run; `exl2_rag.llm.models.decoder.Decoder` is one."""

    def forward(self, inputs: ForwardInputs, cache: KVCache) -> Tensor:
        """[L, V] float32 logits of `inputs.logit_rows`; writes keys and values of all rows into `cache`."""
        ...


class ModelRunner:
    """A model and its KV cache.

    Args:
        model: computes logits.
        cache: its keys and values.
        device: where the inputs go.
        decode_tapes: runs the steps in which every sequence decodes, where it takes them.
    """

    def __init__(
        self, model: Model, cache: KVCache, device: torch.device, *, decode_tapes: DecodeTapes | None = None
    ) -> None:
        self.cache = cache
        self._model = model
        self._device = device
        self._decode_tapes = decode_tapes

    def copy_rows(self, copies: Seq[PageCopy]) -> None:
        """Carry out the copies, in their order."""
        for copy in copies:
            self.cache.copy_rows(copy.source, copy.target, copy.n_rows)

    @torch.inference_mode()
    def run(self, slices: Seq[Slice]) -> list[Tensor]:
        """Compute the slices in one forward pass.

        Returns:
            For each slice [rows, V] float32: one row if its end is reached and a token is to follow, the rows an
            evaluation asks for, or none. Valid until the next call.
        """
        wanted = [wanted_rows(one) for one in slices]
        inputs = self.build_inputs(slices, wanted)
        if self._decode_tapes is not None and self._decode_tapes.takes(len(slices)) and _is_decode(slices, wanted):
            logits = self._decode_tapes.run(inputs)
        else:
            logits = self._model.forward(inputs, self.cache)
        return list(torch.split(logits, [len(rows) for rows in wanted]))

    def build_inputs(self, slices: Seq[Slice], wanted: Seq[range]) -> ForwardInputs:
        """The ragged batch of the slices; `wanted` are the rows of each, counted from its start, that need logits."""
        page_size = self.cache.page_size
        counts = np.array([one.n_tokens for one in slices], dtype=np.int64)
        starts = np.concatenate([[0], np.cumsum(counts)])
        token_ids = np.empty(starts[-1], dtype=np.int64)
        positions = np.empty(starts[-1], dtype=np.int64)
        slots = np.empty(starts[-1], dtype=np.int64)
        context_lens = np.array([one.start + one.n_tokens for one in slices], dtype=np.int32)
        page_table = np.full((len(slices), -(-int(context_lens.max()) // page_size)), -1, dtype=np.int32)
        for row, one in enumerate(slices):
            assert one.sequence.held is not None
            rows = slice(starts[row], starts[row + 1])
            end = one.start + one.n_tokens
            pages = np.array(one.sequence.held.pages[: -(-end // page_size)], dtype=np.int64)
            place = np.arange(one.start, end)
            token_ids[rows] = one.sequence.token_ids[one.start : end]
            positions[rows] = place
            slots[rows] = pages[place // page_size] * page_size + place % page_size
            page_table[row, : len(pages)] = pages
        every_row = sum(len(offsets) for offsets in wanted) == starts[-1]
        logit_rows = [starts[row] + offset for row, offsets in enumerate(wanted) for offset in offsets]
        return ForwardInputs(
            token_ids=self._tensor(token_ids),
            positions=self._tensor(positions),
            slot_mapping=self._tensor(slots),
            page_table=self._tensor(page_table),
            query_starts=self._tensor(starts.astype(np.int32)),
            context_lens=self._tensor(context_lens),
            logit_rows=None if every_row else self._tensor(np.array(logit_rows, dtype=np.int64)),
        )

    def _tensor(self, array: np.ndarray[tuple[int, ...], np.dtype[np.int32] | np.dtype[np.int64]]) -> Tensor:
        return torch.from_numpy(array).to(self._device)


def _is_decode(slices: Seq[Slice], wanted: Seq[range]) -> bool:
    """Whether each slice is one token whose logits are wanted."""
    return all(one.n_tokens == 1 and len(rows) == 1 for one, rows in zip(slices, wanted, strict=True))


def wanted_rows(one: Slice) -> range:
    """Which rows of a slice, counted from its start, need logits."""
    if one.sequence.evaluation is not None:
        return range(min(max(one.sequence.evaluation.first_row - one.start, 0), one.n_tokens), one.n_tokens)
    is_wanted = one.reaches_end and one.sequence.max_new_tokens > 0
    return range(one.n_tokens - 1, one.n_tokens) if is_wanted else range(0)
