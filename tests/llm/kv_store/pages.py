"""Pages for tests of stores: chains of keys as the page table makes them, and images that follow from the key."""

from __future__ import annotations

import random
from collections.abc import Sequence

from exl2_rag.llm.kv_store.page_store import PageName, PageRecord
from exl2_rag.llm.kv_store.store_directory import StoreIdentity
from exl2_rag.llm.page_table import PageTable

PAGE_SIZE = 4
IMAGE_BYTES = 5000
IDENTITY = StoreIdentity(b"\x01" * 32, PAGE_SIZE, IMAGE_BYTES, {"model": "a test"})
TABLE = PageTable(1, PAGE_SIZE, IDENTITY.fingerprint)


def image_of(key: bytes, image_bytes: int = IMAGE_BYTES) -> bytearray:
    return bytearray(random.Random(key).randbytes(image_bytes))


def chain(token_ids: Sequence[int], root_key: bytes = TABLE.root_key) -> list[PageName]:
    """The names of the full pages of a text."""
    names: list[PageName] = []
    parent = root_key
    for start in range(0, len(token_ids) - PAGE_SIZE + 1, PAGE_SIZE):
        tokens = tuple(token_ids[start : start + PAGE_SIZE])
        key = TABLE.page_key(parent, tokens)
        names.append(PageName(key, parent, tokens))
        parent = key
    return names


def records(
    names: Sequence[PageName],
    root_key: bytes = TABLE.root_key,
    *,
    recompute_s: float = 1.0,
    sources: tuple[str, ...] = (),
) -> list[PageRecord]:
    return [PageRecord(one, root_key, image_of(one.key), recompute_s, sources) for one in names]


def text(seed: int, n_pages: int = 3) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(100) for _ in range(n_pages * PAGE_SIZE)]
