"""Decode steps of small batches, recorded once for each size and then run again in one native call.

A step of so many sequences and rows, all of whose logits are wanted, is the same sequence of ops on the same buffers
every time; only the input tensors' contents differ. A sequence has one row, or several if it carries a draft. Knows the
model and its inputs; what a tape is stands in `kernels/tape.py`.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from dataclasses import dataclass, fields
from typing import Protocol

import torch
from torch import Tensor

from exl2_rag.llm.forward_inputs import ForwardInputs
from exl2_rag.llm.kernels import tape
from exl2_rag.llm.kv_cache import KVCache
from exl2_rag.llm.step_arrays import StepArrays

MOST_ROWS = 8
"""Rows of a recorded step. With more, the ops are large enough to be handed out one by one."""

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
        """[T, V] logits of a small step, valid until the next one of its size; None if it must run without a tape."""
        n_rows = len(arrays.token_ids)
        if not (self._is_recordable and arrays.logit_rows is None and n_rows <= MOST_ROWS):
            return None
        size = (len(arrays.context_lens), n_rows)
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
    for field in fields(ForwardInputs):
        new, old = getattr(source, field.name), getattr(target, field.name)
        if old is None:  # the rows whose logits are wanted: all of them
            continue
        if field.name == "page_table":
            old = old[:, : new.shape[1]]
        old.copy_(new)
