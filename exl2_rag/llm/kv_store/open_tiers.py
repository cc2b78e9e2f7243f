"""From options to tiers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from exl2_rag.errors import SettingsError
from exl2_rag.llm.kv_store.disk_store import DEFAULT_QUOTA_BYTES, DiskStore
from exl2_rag.llm.kv_store.ram_tier import RamTier
from exl2_rag.llm.kv_store.store_directory import StoreIdentity, make_directory
from exl2_rag.llm.kv_store.tier_loader import PageImages
from exl2_rag.llm.kv_store.tiers import CacheTiers

if TYPE_CHECKING:
    from exl2_rag.llm.fingerprint import CacheIdentity


@dataclass(frozen=True, slots=True)
class TierOptions:
    """What the caller asked for; names and meanings are those of `ExL2LLM`."""

    kv_store: Path | None = None
    kv_store_bytes: int | None = None
    kv_ram_bytes: int | None = None

    @property
    def survives_restart(self) -> bool:
        """Whether pages outlive the process, so that the identity must name every byte of the weights."""
        return self.kv_store is not None

    def check(self) -> None:
        """Refuse what can be seen to be wrong before a model is loaded.

        Raises:
            SettingsError: a size that makes no sense.
            KVStoreError: the directory cannot be made or written to.
        """
        if self.kv_store_bytes is not None and self.kv_store is None:
            raise SettingsError("kv_store_bytes limits a store that is not there; give kv_store a directory, too")
        if self.kv_store_bytes is not None and self.kv_store_bytes < 1:
            raise SettingsError(f"kv_store_bytes must be at least 1, got {self.kv_store_bytes!r}")
        if self.kv_ram_bytes is not None and self.kv_ram_bytes < 0:
            raise SettingsError(f"kv_ram_bytes must be 0 (off) or more, got {self.kv_ram_bytes!r}")
        if self.kv_store is not None:
            make_directory(self.kv_store)


def open_tiers(options: TierOptions, identity: CacheIdentity, images: PageImages, page_size: int) -> CacheTiers | None:
    """The tiers that the options ask for; None if none.

    Args:
        identity: with a digest of all weights, if there is a store.
        images: the KV cache.

    Raises:
        KVStoreError: the store cannot be opened.
        SettingsError: a size is too small for this model's pages.
    """
    ram = None
    if options.kv_ram_bytes:
        if options.kv_ram_bytes < images.page_bytes:
            raise SettingsError(
                f"kv_ram_bytes must hold at least one page of {images.page_bytes} bytes, got {options.kv_ram_bytes}; "
                "give more, or 0 to have none"
            )
        ram = RamTier(options.kv_ram_bytes, images.page_bytes)
    store = None
    if options.kv_store is not None:
        quota = DEFAULT_QUOTA_BYTES if options.kv_store_bytes is None else options.kv_store_bytes
        name = StoreIdentity(identity.digest(), page_size, images.page_bytes, identity.as_dict())
        store = DiskStore(options.kv_store, name, quota)
    return None if ram is None and store is None else CacheTiers(images, page_size, ram=ram, store=store)
