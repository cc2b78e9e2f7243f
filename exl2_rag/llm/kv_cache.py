"""The tensors behind the pages. Which page belongs to whom is `page_table`'s business."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from exl2_rag.errors import ShapeError
from exl2_rag.llm.kernels import weight_memory


def zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A contiguous tensor of zeros; on the CPU in large pages, and taking memory only as it is written to."""
    if device.type == "cpu":
        return weight_memory.zeros(shape, dtype)
    return torch.zeros(shape, dtype=dtype, device=device)


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
        self.k_pages: list[Tensor] = [zeros(shape, dtype, device) for _ in range(n_layers)]
        self.v_pages: list[Tensor] = [zeros(shape, dtype, device) for _ in range(n_layers)]

    def copy_rows(self, source_page: int, target_page: int, n_rows: int) -> None:
        """Copy the first `n_rows` tokens of one page to another, in every layer."""
        for pages in (*self.k_pages, *self.v_pages):
            pages[target_page, :n_rows] = pages[source_page, :n_rows]

    @functools.cached_property
    def page_bytes(self) -> int:
        """Bytes of a page's image."""
        return sum(part.nbytes for part in self._page_parts(0))

    def read_page(self, index: int) -> bytearray:
        """The image of a page: its bytes in all layers, [layer][K, V][PS][KH][D]. On a card it waits for the copy.

        Raises:
            IndexError: there is no such page.
        """
        image = bytearray(self.page_bytes)
        target = torch.frombuffer(image, dtype=torch.uint8)
        parts = [part.reshape(-1).view(torch.uint8) for part in self._page_parts(index)]
        if parts[0].device.type == "cpu":
            torch.cat(parts, out=target)
        else:
            target.copy_(torch.cat(parts))  # gathered on the card, so that one copy crosses the bus
        return image

    def write_page(self, index: int, image: bytearray | memoryview) -> None:
        """Put an image back; the page then holds the bytes that `read_page` found.

        Raises:
            ShapeError: the image has not the size of a page.
        """
        parts = self._page_parts(index)
        if len(image) != self.page_bytes:
            raise ShapeError(f"expected the image of a page, {self.page_bytes} bytes, got {len(image)}")
        source = torch.frombuffer(image, dtype=torch.uint8).to(parts[0].device)
        sizes = [part.nbytes for part in parts]
        for part, piece in zip(parts, torch.split(source, sizes), strict=True):
            part.reshape(-1).view(torch.uint8).copy_(piece)

    def _page_parts(self, index: int) -> list[Tensor]:
        """The tensors that make up a page, contiguous, in the order of its image."""
        return [pages[index] for layer in zip(self.k_pages, self.v_pages, strict=True) for pages in layer]

    @property
    def size_bytes(self) -> int:
        """Bytes held by all layers."""
        return sum(pages.nbytes for pages in (*self.k_pages, *self.v_pages))
