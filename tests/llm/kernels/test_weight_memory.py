"""Where weights lie: apart, aligned, and freed when nobody uses them."""

from __future__ import annotations

import gc
import weakref

import torch

from exl2_rag.llm.kernels.weight_memory import WeightMemory


def test_parts_lie_apart_and_aligned():
    memory = WeightMemory(slab_bytes=1 << 16)
    parts = [memory.empty((n, 3)) for n in (1, 100, 5000, 7, 30000, 12, 4000)]
    for number, part in enumerate(parts):
        assert part.data_ptr() % 128 == 0
        assert part.is_contiguous()
        part.fill_(number)
    for number, part in enumerate(parts):
        assert part.dtype == torch.uint8
        assert bool((part == number).all())


def test_small_parts_share_a_slab_and_large_ones_do_not_waste_it():
    memory = WeightMemory(slab_bytes=1 << 16)
    first = memory.empty((1000,))
    large = memory.empty((1 << 16,))
    second = memory.empty((1000,))
    assert second.data_ptr() - first.data_ptr() == 1024
    assert large.untyped_storage().data_ptr() != first.untyped_storage().data_ptr()
    assert first.data_ptr() % (2 << 20) == 0


def test_a_slab_goes_with_its_last_part():
    memory = WeightMemory(slab_bytes=1 << 16)
    part = memory.empty((1000,))
    storage = weakref.ref(part._base)
    del memory
    gc.collect()
    part.fill_(1)
    assert storage() is not None
    del part
    gc.collect()
    assert storage() is None
