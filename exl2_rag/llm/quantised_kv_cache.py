"""The KV cache in quantised pages: 8, 6 or 4 bits a number and a float16 scale for each 32, read as they are."""

from __future__ import annotations

import torch
from torch import Tensor

from exl2_rag.llm.kernels.kv_format import QuantisedPages
from exl2_rag.llm.kv_cache import KVCache


class QuantisedKVCache(KVCache):
    """As `KVCache`, with quantised pages.

    Raises:
        ShapeError: heads of no multiple of 32 numbers.
    """

    def __init__(
        self,
        *,
        n_layers: int,
        n_pages: int,
        page_size: int,
        n_kv_heads: int,
        head_dim: int,
        bits: int,
        device: torch.device,
    ) -> None:
        self.page_size = page_size
        self.n_pages = n_pages

        def pages() -> QuantisedPages:
            return QuantisedPages.zeros(n_pages, page_size, n_kv_heads, head_dim, bits=bits, device=device)

        self.k_pages: list[QuantisedPages] = [pages() for _ in range(n_layers)]  # type: ignore[assignment]
        self.v_pages: list[QuantisedPages] = [pages() for _ in range(n_layers)]  # type: ignore[assignment]

    def copy_rows(self, source_page: int, target_page: int, n_rows: int) -> None:
        """Copy the first `n_rows` tokens of one page to another, in every layer."""
        for pages in (*self.k_pages, *self.v_pages):
            for part in (pages.codes, pages.scales):
                part[target_page, :n_rows] = part[source_page, :n_rows]

    def _page_parts(self, index: int) -> list[Tensor]:
        """As in `KVCache`; of keys and values each first the codes, then the scales."""
        layers = zip(self.k_pages, self.v_pages, strict=True)
        return [part[index] for layer in layers for pages in layer for part in (pages.codes, pages.scales)]
