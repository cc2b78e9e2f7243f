"""Decode steps as CUDA graphs: some hundred launches of a step recorded once and replayed in one call.

A graph is fixed in its sizes and its addresses. So there is one for each bucket of batch sizes and of page table
widths, captured when a step first needs it; smaller steps are padded. Inputs are copied into the buffers that it was
captured with, and its logits lie where they lay then, until the next replay.

What a row gives does not depend on the padding: rows are independent of each other in every kernel of a decode step.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, Protocol

import torch
from torch import Tensor

from exl2_rag.llm.forward_inputs import ForwardInputs
from exl2_rag.llm.step_arrays import StepArrays, host_tensor

_logger = logging.getLogger(__name__)

BATCH_BUCKETS: Final = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64)
"""Batch sizes that graphs are captured for; larger steps run without."""

MIN_WIDTH: Final = 16
"""Columns of the narrowest page table; wider ones double."""


class Recorder(Protocol):
    """Records launches; `TorchRecorder` on a card."""

    def record(self, step: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        """Run the step once, then record it.

        Returns:
            What replays it, and the tensor that its result is found in after each replay.

        Raises:
            RuntimeError: the step cannot be recorded.
        """


class TorchRecorder:
    """Captures with torch's CUDA graphs, all of them in one pool of memory."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool: Any = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def record(self, step: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        """See `Recorder`."""
        with torch.cuda.device(self._device):
            # Run once as usual: kernels are compiled and loaded here, which a capture must not do.
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                step()
            torch.cuda.current_stream().wait_stream(self._stream)
            graph = torch.cuda.CUDAGraph()
            # "thread_local": what other threads do on the card meanwhile (an embedding model, say) is their business.
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
                result = step()
        return graph.replay, result


@dataclass(frozen=True, slots=True)
class _Graph:
    """One recorded step. `words` is what its inputs are views of; `inputs` keeps them."""

    words: Tensor
    inputs: ForwardInputs
    replay: Callable[[], None]
    logits: Tensor


class DecodeGraphs:
    """The graphs of one model and cache.

    Args:
        step: the model's forward pass over its cache.
        device: where inputs go.
        max_pages: widest page table that can come.
        recorder: records; None is torch on the device.

    Attributes:
        n_recorded: graphs so far.
        failure: why nothing is recorded any more; None while it works.
    """

    def __init__(
        self,
        step: Callable[[ForwardInputs], Tensor],
        device: torch.device,
        *,
        max_pages: int,
        recorder: Recorder | None = None,
    ) -> None:
        self._step = step
        self._device = device
        self._max_pages = max_pages
        self._recorder = TorchRecorder(device) if recorder is None else recorder
        self._graphs: dict[tuple[int, int], _Graph] = {}
        self.failure: str | None = None

    @property
    def n_recorded(self) -> int:
        """Graphs so far."""
        return len(self._graphs)

    def run(self, arrays: StepArrays) -> Tensor | None:
        """The logits [B, V] of a decode step, valid until the next call; None if the step must run without a graph."""
        batch = len(arrays.token_ids)
        if self.failure is not None or not arrays.is_decode or batch > BATCH_BUCKETS[-1]:
            return None
        bucket = next(size for size in BATCH_BUCKETS if size >= batch)
        padded = arrays.padded(bucket, self._width(arrays.page_table.shape[1]))
        words = host_tensor(padded.pack(), self._device)
        graph = self._graphs.get(padded.page_table.shape)
        if graph is None:
            graph = self._record(padded, words.to(self._device, non_blocking=True))
            if graph is None:
                return None
            self._graphs[padded.page_table.shape] = graph
        graph.words.copy_(words, non_blocking=True)
        graph.replay()
        return graph.logits[:batch]

    def _width(self, n_pages: int) -> int:
        width = MIN_WIDTH
        while width < n_pages:
            width *= 2
        return max(n_pages, min(width, self._max_pages))

    def _record(self, padded: StepArrays, words: Tensor) -> _Graph | None:
        inputs = padded.unpack(words)
        try:
            replay, logits = self._recorder.record(lambda: self._step(inputs))
        except torch.OutOfMemoryError:
            raise  # the step itself would have met it too
        except RuntimeError as error:
            self.failure = str(error).splitlines()[0]
            _logger.warning(
                "decode steps run without CUDA graphs, which is slower, because one could not be captured: %s",
                self.failure,
            )
            return None
        return _Graph(words, inputs, replay, logits)
