"""Decode steps of small batches, recorded once for each size and then run again in one native call.

A step of so many sequences and rows, all of whose logits are wanted, is the same sequence of ops on the same buffers
every time; only the input tensors' contents differ. A sequence has one row, or several if it carries a draft. Knows the
model and its inputs; what a tape is stands in `kernels/tape.py`.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from exl2_rag.llm.forward_inputs import ForwardInputs
from exl2_rag.llm.kernels import tape
from exl2_rag.llm.kv_cache import KVCache
from exl2_rag.llm.step_arrays import StepArrays

MOST_ROWS = 8
"""Rows of a recorded step. With more, the ops are large enough to be handed out one by one."""

SLICE_ROWS = 4
"""Rows of a recorded slice of a prompt, few of whose logits are wanted; with more, computing all costs too much."""

MOST_KEPT_ROWS = 32
"""Rows of all recorded steps that are kept at a time: each holds the buffers of one step."""

_logger = logging.getLogger(__name__)


class Model(Protocol):
    """What is recorded."""

    def forward(self, inputs: ForwardInputs, cache: KVCache) -> Tensor:
        """[L, V] float32 logits; writes keys and values of all rows into `cache`."""
        ...


@dataclass(frozen=True, slots=True)
class _Recorded:
    tape: tape.Tape
    inputs: ForwardInputs
    logits: Tensor


class DecodeTapes:
    """The recorded steps of one model over one cache.

    Args:
        model: runs on the CPU with native kernels.
        cache: its keys and values; its memory must not move.
        table_width: pages that the longest sequence has.
    """

    def __init__(self, model: Model, cache: KVCache, table_width: int) -> None:
        self._model = model
        self._cache = cache
        self._table_width = table_width
        self._recorded: OrderedDict[tuple[int, int], _Recorded] = OrderedDict()  # by sequences and rows
        self._is_recordable = tape.is_available()

    def run(self, arrays: StepArrays) -> Tensor | None:
        """[L, V] logits of a small step, valid until the next one of its size; None if it must run without a tape."""
        n_rows = len(arrays.token_ids)
        if not self._is_recordable or n_rows > (MOST_ROWS if arrays.logit_rows is None else SLICE_ROWS):
            return None
        logits = self._run((len(arrays.context_lens), n_rows), arrays)
        return logits if arrays.logit_rows is None else logits[torch.from_numpy(arrays.logit_rows)]

    @torch.inference_mode()
    def prepare(self) -> None:
        """Record slices of one sequence, which takes longer than to run them, before anyone waits for a token.

        Writes to the first rows of the first page, which must be blank.
        """
        for n_rows in range(1, min(SLICE_ROWS, self._cache.page_size) + 1):
            place = np.arange(n_rows)
            self.run(
                StepArrays(
                    token_ids=np.zeros(n_rows, dtype=np.int64),
                    positions=place,
                    slot_mapping=place,
                    page_table=np.zeros((1, 1), dtype=np.int32),
                    query_starts=np.array([0, n_rows], dtype=np.int32),
                    context_lens=np.array([n_rows], dtype=np.int32),
                    logit_rows=None,
                )
            )

    def _run(self, size: tuple[int, int], arrays: StepArrays) -> Tensor:
        inputs = arrays.to(torch.device("cpu"))
        found = self._recorded.get(size)
        if found is None:
            return self._record(size, inputs)
        self._recorded.move_to_end(size)
        _fill(found.inputs, inputs)
        found.tape.run()
        return found.logits

    def _record(self, size: tuple[int, int], inputs: ForwardInputs) -> Tensor:
        own = ForwardInputs(
            token_ids=torch.empty_like(inputs.token_ids),
            positions=torch.empty_like(inputs.positions),
            slot_mapping=torch.empty_like(inputs.slot_mapping),
            page_table=torch.full((size[0], self._table_width), -1, dtype=torch.int32),
            query_starts=torch.empty_like(inputs.query_starts),
            context_lens=torch.empty_like(inputs.context_lens),
            logit_rows=None,
            group_starts=torch.empty(size[0] + 1, dtype=torch.int32),
            group_prefix_pages=torch.empty(size[0], dtype=torch.int32),
        )
        _fill(own, inputs)
        with tape.record() as recording:
            logits = self._model.forward(own, self._cache)
        if recording.problem is not None:
            self._is_recordable = False
            _logger.debug("decode steps are not recorded: %s", recording.problem)
            return logits
        self._recorded[size] = _Recorded(recording, own, logits)
        while sum(rows for _, rows in self._recorded) > MOST_KEPT_ROWS:
            self._recorded.popitem(last=False)
        return logits


def _fill(target: ForwardInputs, source: ForwardInputs) -> None:
    """Write one step's inputs over another's. What a page table has beyond its sequence is never read."""
    for name in ("token_ids", "positions", "slot_mapping", "query_starts", "context_lens"):
        getattr(target, name).copy_(getattr(source, name))
    target.page_table[:, : source.page_table.shape[1]].copy_(source.page_table)
    # A tape has as many groups as sequences, the last ones empty; of a step that shares nothing, each is a sequence.
    assert target.group_starts is not None
    assert target.group_prefix_pages is not None
    target.group_prefix_pages.zero_()
    if source.group_starts is None or source.group_prefix_pages is None:
        torch.arange(target.group_starts.shape[0], out=target.group_starts)
        return
    n_groups = source.group_prefix_pages.shape[0]
    target.group_starts.fill_(target.group_prefix_pages.shape[0])
    target.group_starts[: n_groups + 1].copy_(source.group_starts)
    target.group_prefix_pages[:n_groups].copy_(source.group_prefix_pages)
