"""Recorded ops: run again on other numbers, and refused where something would be missing."""

from __future__ import annotations

import pytest
import torch

from exl2_rag.errors import KernelError, ShapeError
from exl2_rag.llm.kernels import ops, tape
from tests.llm.kernels.samples import normal, plane_weights

pytestmark = pytest.mark.usefixtures("native_kernels")


def step(table, ids, weights, norm):
    hidden = ops.embedding(table, ids)
    normed = ops.rms_norm(hidden, norm, 1e-5)
    ops.plane_matmul(ops.digits(normed, weights.perm), weights, add_to=hidden)
    return ops.silu_mul(hidden, hidden)


def test_a_tape_computes_anew_from_what_its_inputs_hold_now():
    weights, table, norm = plane_weights([(5, 128)], 128), normal(9, 128), normal(128, seed=1)
    ids = torch.tensor([3, 4])
    with tape.record() as recording:
        result = step(table, ids, weights, norm)
    assert recording.problem is None
    assert len(recording) == 5
    assert torch.equal(result, step(table, torch.tensor([3, 4]), weights, norm))
    ids.copy_(torch.tensor([8, 0]))
    for _ in range(3):
        recording.run()
        assert torch.equal(result, step(table, torch.tensor([8, 0]), weights, norm))


def test_intermediate_memory_stays_the_tapes_own():
    x = normal(4, 4096)
    with tape.record() as recording:
        result = ops.silu_mul(ops.silu_mul(x, x), x)
    expected = result.clone()
    others = [torch.full((4, 4096), float("nan")) for _ in range(64)]  # would land in memory that was given back
    recording.run()
    assert torch.equal(result, expected)
    assert all(bool(other.isnan().all()) for other in others)


@pytest.mark.parametrize(
    ("compute", "name"),
    [
        (lambda x: x + 1, "add"),
        (lambda x: x.add_(1), "add_"),
        (lambda x: x[:, ::2].contiguous(), "contiguous"),
        (lambda x: x.T.reshape(128), "reshape"),
        (lambda x: x.index_select(0, torch.tensor([0])), "tensor"),
        (lambda x: x[torch.arange(2)], "arange"),
        (lambda x: x.sum().item(), "sum"),
        (lambda x: x.fill_(1), "fill_"),
        (lambda x: x.__setitem__(0, x[1]), "__setitem__"),
    ],
)
def test_what_torch_computes_in_between_makes_a_tape_unusable(compute, name):
    x = normal(2, 64)
    with tape.record() as recording:
        compute(x)
        ops.silu_mul(x, x)
    assert recording.problem == f"the step computes {name} outside the kernels"
    with pytest.raises(KernelError, match=f"cannot be run: the step computes {name} outside"):
        recording.run()


def test_views_and_fresh_memory_do_not_matter():
    x = normal(2, 64)
    with tape.record() as recording:
        torch.empty(3)
        ops.silu_mul(x.view(2, 2, 32).flatten(1)[:, :64].contiguous(), x.reshape(2, 64))
    assert recording.problem is None


def test_an_op_that_fails_in_a_tape_says_what_it_would_say_alone():
    table, ids = normal(9, 64), torch.tensor([1])
    with tape.record() as recording:
        ops.embedding(table, ids)
    ids.fill_(9)
    with pytest.raises(ShapeError, match=r"embedding: .*points outside its tensor"):
        recording.run()


def test_a_recording_within_a_recording_is_refused():
    with tape.record(), pytest.raises(KernelError, match="being recorded in this thread already"), tape.record():
        pass
    assert tape.current() is None


def test_a_tape_is_right_with_any_number_of_threads(restore_threads):
    weights, table, norm = plane_weights([(4, 128)] * 4, 512), normal(9, 512), normal(512, seed=1)
    ids = torch.tensor([3, 4, 5])
    with tape.record() as recording:
        result = step(table, ids, weights, norm)
    expected = result.clone()
    for threads in (1, 2, 3, 7, 2):
        ops.set_num_threads(threads)
        for _ in range(20):
            result.fill_(float("nan"))
            recording.run()
            assert torch.equal(result, expected)
