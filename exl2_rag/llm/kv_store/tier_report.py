"""What the tiers hold and have done, in numbers."""

from __future__ import annotations

from dataclasses import dataclass

from exl2_rag.llm.kv_store.page_store import StoreReport
from exl2_rag.llm.kv_store.ram_tier import RamReport


@dataclass(frozen=True, slots=True)
class TierReport:
    """What the tiers have done since the engine was made.

    Attributes:
        ram, store: of each tier; None where there is none.
        ram_tokens, disk_tokens: prompt tokens that came from there.
        load_s: seconds it took.
        saved_s: seconds their prefill would have taken beyond that, by this engine's measured rate.
        declined_pages: that would have taken longer to load than to compute.
        skipped_saves: pages worth keeping on disk that were evicted before they could be copied.
        prefill_tokens_per_s, disk_bytes_per_s: the rates that decide; None until measured.
    """

    ram: RamReport | None
    store: StoreReport | None
    ram_tokens: int
    disk_tokens: int
    load_s: float
    saved_s: float
    declined_pages: int
    skipped_saves: int
    prefill_tokens_per_s: float | None
    disk_bytes_per_s: float | None


@dataclass(frozen=True, slots=True)
class TierPeek:
    """Leading tokens of a prompt by where they are; those in the cache are counted in whole pages."""

    cache_tokens: int
    ram_tokens: int
    disk_tokens: int
