"""Memory bandwidth: the fastest loop counts, and torch's threads come back."""

from __future__ import annotations

import pytest
import torch

from exl2_rag.llm import read_bandwidth
from exl2_rag.llm.read_bandwidth import measure_read_bandwidth


@pytest.mark.parametrize("num_threads", [1, 2, 3])
def test_it_reads_at_a_believable_speed_and_restores_torch(num_threads):
    before = torch.get_num_threads()
    found = measure_read_bandwidth(num_threads, buffer_bytes=8 * 100_003, passes=2)
    assert 1e7 < found.bytes_per_second < 1e13
    assert found.method.split()[0] in ("exl2_rag", "torch.sum", "numpy.bitwise_or", "numpy.dot")
    assert torch.get_num_threads() == before


def test_the_fastest_pass_of_the_fastest_loop_counts(monkeypatch):
    seconds = {"slow": iter([0.5, 0.4]), "fast": iter([0.3, 0.2])}
    monkeypatch.setattr(read_bandwidth, "_loops", lambda *_: dict(seconds))
    monkeypatch.setattr(read_bandwidth, "_seconds", next)
    found = measure_read_bandwidth(1, buffer_bytes=800, passes=2)
    assert (found.bytes_per_second, found.method) == (4000.0, "fast")


def test_every_loop_reads_all_of_the_buffer():
    buffer = torch.ones(1003 * 2)
    with read_bandwidth.ThreadPoolExecutor(3) as pool:
        loops = read_bandwidth._loops(buffer, pool, 3)
        assert float(loops["torch.sum float32"]()) == buffer.numel()
        assert sum(loops["numpy.dot float32"]()) == buffer.numel()
        buffer[-1] = -1.0  # only the last word has the sign bit
        assert sum(int(word) >> 63 for word in loops["numpy.bitwise_or uint64"]()) == 1
