"""Where intermediate results lie: apart, aligned, used again, and given back."""

from __future__ import annotations

import gc
import itertools
import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from exl2_rag.llm.kernels import ops, tape
from exl2_rag.llm.kernels.work_memory import Slab, WorkMemory


@pytest.fixture
def memory():
    return WorkMemory(slab_bytes=1 << 20, smallest_bytes=1 << 10)


def test_tensors_in_use_lie_apart_and_aligned(memory):
    tensors = [memory.empty((n, 3), torch.float32) for n in (100, 5000, 700, 200_000, 30_000)]
    for number, tensor in enumerate(tensors):
        assert tensor.data_ptr() % 128 == 0
        assert tensor.is_contiguous()
        tensor.fill_(number)
    for number, tensor in enumerate(tensors):
        assert bool((tensor == number).all())


def test_memory_is_used_again_when_the_last_view_is_gone(memory):
    first = memory.empty((1000,), torch.float32)
    view, address = first.view(10, 100)[3:], first.data_ptr()
    del first
    gc.collect()
    assert memory.empty((1000,), torch.float32).data_ptr() != address
    del view
    gc.collect()
    assert memory.empty((1000,), torch.float32).data_ptr() == address


def test_the_bytes_of_a_dtype_are_counted(memory):
    halves = memory.empty((1 << 10,), torch.int16)
    other = memory.empty((1 << 10,), torch.int16)
    assert abs(other.data_ptr() - halves.data_ptr()) >= 2 << 10
    assert halves.dtype == torch.int16


def test_what_is_given_back_costs_nothing_and_reads_as_zero(memory):
    tensor = memory.empty((10_000,), torch.float32)
    address = tensor.data_ptr()
    tensor.fill_(7)
    del tensor
    gc.collect()
    again = memory.empty((10_000,), torch.float32)
    assert again.data_ptr() == address
    assert not again.any()  # fresh pages


def test_small_tensors_are_left_to_torch(memory):
    assert memory.empty((10,), torch.float32).shape == (10,)
    assert memory.empty((0, 5), torch.float32).shape == (0, 5)
    assert not memory._slabs


def test_a_tape_uses_the_memory_of_dead_results_again_and_keeps_the_last(native_kernels):
    x, weight = torch.full((3, 64), 2.0), torch.ones(64)
    with tape.record() as recording:
        places = []
        y = x
        for _ in range(6):
            y = ops.rms_norm(y, weight, 0.0)
            places.append(y.data_ptr())
    assert recording.problem is None
    assert len(set(places)) == 2
    for value in (4.0, -3.0):
        x.fill_(value)
        y.zero_()
        recording.run()
        torch.testing.assert_close(y, torch.full((3, 64), value / abs(value)))
    del recording
    gc.collect()
    assert float(y.sum()) == -3 * 64  # valid, though the tape is gone


def test_threads_may_take_and_drop_at_once(memory):
    def work(number: int) -> None:
        for size in range(300, 600):
            tensor = memory.empty((size,), torch.float32)
            tensor.fill_(number)
            if not bool((tensor == number).all()):
                wrong.append(number)

    wrong: list[int] = []
    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    gc.collect()
    assert not wrong
    memory.empty((1000,), torch.float32)
    assert all(slab.is_unused for slab in memory._slabs[1:])


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.integers(1, 400)), max_size=60))
def test_holes_are_what_is_not_taken(steps):
    slab, taken = Slab(1000), []
    for takes, number in steps:
        if takes:
            address = slab.take(number)
            if address is not None:
                taken.append((address - slab.base, number))
        elif taken:
            start, length = taken.pop(number % len(taken))
            slab.give(slab.base + start, length)
        spans = sorted([*taken, *slab._holes])
        assert sum(length for _, length in spans) == 1000
        assert all(a + b == c for (a, b), (c, _) in itertools.pairwise(spans))
        ends = [a + b for a, b in slab._holes]
        assert not set(ends) & {a for a, _ in slab._holes}  # neighbours have become one
    assert slab.is_unused == (not taken)
