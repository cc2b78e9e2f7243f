"""What attention over pages is told beside queries and pages: where the keys of each row lie, and what scores mean.

Every implementation, operator and caller names these arguments by way of the two classes here, so the list stands once.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from exl2_rag.errors import DTypeError, ShapeError
from exl2_rag.llm.kernels.checks import FLOATS, check_devices, check_dtype
from exl2_rag.llm.kernels.kv_format import QuantisedPages

Pages = Tensor | QuantisedPages


@dataclass(frozen=True, slots=True)
class PagedBatch:
    """A ragged batch of B sequences over pages.

    Attributes:
        page_table: [B, MP] int32, the pages of each sequence in order; entries beyond its length are not read.
        query_starts: [B + 1] int32; sequence b has rows query_starts[b] to query_starts[b + 1] of q, its last ones.
        context_lens: [B] int32, tokens of sequence b in the cache, the new ones included.
        group_starts: [NG + 1] int32 or None; group g has the sequences group_starts[g] to group_starts[g + 1]. Groups
            may be empty.
        group_prefix_pages: [NG] int32 or None; so many leading pages are the same for all sequences of the group, and
            full before this step's tokens. They are read once for all of them.
        max_context, max_rest: bounds that the caller knows, of the context lengths and of the keys of a sequence beyond
            its shared pages; 0: none. For launch sizes on a card.
    """

    page_table: Tensor
    query_starts: Tensor
    context_lens: Tensor
    group_starts: Tensor | None = None
    group_prefix_pages: Tensor | None = None
    max_context: int = 0
    max_rest: int = 0

    def check(self, op: str, q: Tensor) -> None:
        """Refuse tensors that do not describe a batch on the device of `q`. Does not look at what they hold.

        Raises:
            ShapeError, DTypeError, DeviceError: what does not fit.
        """
        for name in ("page_table", "query_starts", "context_lens"):
            check_dtype(op, name, getattr(self, name), (torch.int32,))
        n_sequences = self.context_lens.shape[0]
        shapes = (self.page_table.shape[:1], self.query_starts.shape, self.context_lens.shape)
        if self.page_table.dim() != 2 or shapes != ((n_sequences,), (n_sequences + 1,), (n_sequences,)):
            raise ShapeError(
                f"{op}: page_table must be [B, MP], query_starts [B + 1] and context_lens [B]; they are "
                f"{list(self.page_table.shape)}, {list(self.query_starts.shape)} and {list(self.context_lens.shape)}"
            )
        check_devices(op, q, self.page_table, self.query_starts, self.context_lens)
        if (self.group_starts is None) != (self.group_prefix_pages is None):
            raise ShapeError(f"{op}: group_starts and group_prefix_pages go together, give both or neither")
        if self.group_starts is not None and self.group_prefix_pages is not None:
            for name in ("group_starts", "group_prefix_pages"):
                check_dtype(op, name, getattr(self, name), (torch.int32,))
            if self.group_starts.dim() != 1 or self.group_prefix_pages.shape != (self.group_starts.shape[0] - 1,):
                raise ShapeError(
                    f"{op}: group_starts must be [NG + 1] and group_prefix_pages [NG], they are "
                    f"{list(self.group_starts.shape)} and {list(self.group_prefix_pages.shape)}"
                )
            check_devices(op, q, self.group_starts, self.group_prefix_pages)


@dataclass(frozen=True, slots=True)
class Scoring:
    """From dot products to weights.

    Attributes:
        softmax_scale: multiplies the scores.
        sliding_window: 0, or how many keys a query sees: the last that many, itself included.
        softcap: 0, or c: scores become c * tanh(score / c).
        sinks: [H] float32 or None: a score for each head that takes part in the softmax and has no value.
    """

    softmax_scale: float
    sliding_window: int = 0
    softcap: float = 0.0
    sinks: Tensor | None = None

    def check(self, op: str, q: Tensor) -> None:
        """Refuse what does not go with q [T, H, D].

        Raises:
            ShapeError, DTypeError, DeviceError: what does not fit.
        """
        for name in ("sliding_window", "softcap"):
            if getattr(self, name) < 0:
                raise ShapeError(f"{op}: {name} must be 0 (off) or positive, it is {getattr(self, name)}")
        if self.sinks is not None:
            check_dtype(op, "sinks", self.sinks, (torch.float32,))
            if self.sinks.shape != (q.shape[1],):
                raise ShapeError(f"{op}: sinks must be [{q.shape[1]}], they are {list(self.sinks.shape)}")
            check_devices(op, q, self.sinks)


_TYPES: Final = {"Tensor": "Tensor", "Tensor | None": "Tensor?", "int": "int", "float": "float"}
_N_BATCH: Final = len(dataclasses.fields(PagedBatch))

SCHEMA: Final = ", ".join(
    f"{_TYPES[str(field.type)]} {field.name}" for kind in (PagedBatch, Scoring) for field in dataclasses.fields(kind)
)
"""The arguments of an operator that takes both, as torch writes them."""


def flatten(batch: PagedBatch, scoring: Scoring) -> tuple[Any, ...]:
    """The arguments that `SCHEMA` names."""
    return tuple(
        getattr(one, field.name)  # not astuple, which would copy the tensors
        for one in (batch, scoring)
        for field in dataclasses.fields(one)
    )


def unflatten(arguments: tuple[Any, ...]) -> tuple[PagedBatch, Scoring]:
    """The inverse of `flatten`."""
    return PagedBatch(*arguments[:_N_BATCH]), Scoring(*arguments[_N_BATCH:])


def check_pages(op: str, k_pages: Pages, v_pages: Pages) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """The numbers or codes of keys and values, then their scales, which plain pages do not have.

    Raises:
        ShapeError, DTypeError: they are not pages of one kind and size.
    """
    if isinstance(k_pages, QuantisedPages) and isinstance(v_pages, QuantisedPages):
        for name, pages in (("k_pages", k_pages), ("v_pages", v_pages)):
            pages.check(op, name)
        if k_pages.codes.shape != v_pages.codes.shape:
            raise ShapeError(
                f"{op}: k_pages and v_pages must be alike, they have codes {list(k_pages.codes.shape)} and "
                f"{list(v_pages.codes.shape)}"
            )
        return k_pages.codes, v_pages.codes, k_pages.scales, v_pages.scales
    if not isinstance(k_pages, Tensor) or not isinstance(v_pages, Tensor):
        raise DTypeError(f"{op}: either both k_pages and v_pages must be quantised, or neither")
    check_plain_pages(op, k_pages, v_pages)
    return k_pages, v_pages, None, None


def check_plain_pages(op: str, k_pages: Tensor, v_pages: Tensor) -> None:
    """Refuse anything but two tensors [P, PS, KH, D] of one floating-point dtype."""
    if k_pages.dtype not in FLOATS or v_pages.dtype != k_pages.dtype:
        raise DTypeError(
            f"{op}: pages must be float32, float16 or bfloat16 and alike, they are {k_pages.dtype} and {v_pages.dtype}"
        )
    contiguous = k_pages.is_contiguous() and v_pages.is_contiguous()
    if k_pages.dim() != 4 or v_pages.shape != k_pages.shape or not contiguous:
        raise ShapeError(
            f"{op}: k_pages and v_pages must be [P, PS, KH, D], alike and contiguous, "
            f"they are {list(k_pages.shape)} and {list(v_pages.shape)}"
        )
