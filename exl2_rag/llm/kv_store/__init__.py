"""Tiers below the KV cache: pages in host memory, and pages on disk that survive a restart. No torch.

    tiers.py       what the engine talks to: restore at admission, save after use, keep what is evicted
    tier_loader.py page images back into the page table; rates.py: load, or compute again?
    ram_tier.py    page images in host memory, least recently used first out
    disk_store.py  page images on disk: look-up and verified reads; what is to be written goes to `store_writer`
    page_store.py  the protocol of a store, so that another can be plugged in

A page image is the bytes of one full page of all layers. The format on disk is in `docs/kv-store.md`.
"""
