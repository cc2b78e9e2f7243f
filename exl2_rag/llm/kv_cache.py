"""The tensors behind the pages. Which page belongs to whom is `page_table`'s business."""

from __future__ import annotations

import torch
from torch import Tensor


class KVCache:
    """Keys and values of every layer, in pages of `page_size` tokens.

    Attributes:
        k_pages, v_pages: one tensor a layer, [P, PS, KH, D] in `dtype`.
    """

    def __init__(
        self,
        *,
        n_layers: int,
        n_pages: int,
        page_size: int,
        n_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.page_size = page_size
        self.n_pages = n_pages
        shape = (n_pages, page_size, n_kv_heads, head_dim)
        # Zeroed, so that a row read before it was written shows up as zeros, never as another request's data.
        self.k_pages: list[Tensor] = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(n_layers)]
        self.v_pages: list[Tensor] = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(n_layers)]

    def copy_rows(self, source_page: int, target_page: int, n_rows: int) -> None:
        """Copy the first `n_rows` tokens of one page to another, in every layer."""
        for pages in (*self.k_pages, *self.v_pages):
            pages[target_page, :n_rows] = pages[source_page, :n_rows]

    @property
    def size_bytes(self) -> int:
        """Bytes held by all layers."""
        return sum(pages.nbytes for pages in (*self.k_pages, *self.v_pages))
