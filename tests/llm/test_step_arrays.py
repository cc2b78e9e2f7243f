from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from exl2_rag.llm.step_arrays import StepArrays

CPU = torch.device("cpu")


def arrays(lengths: list[tuple[int, int]], *, n_pages: int, n_rows: int) -> StepArrays:
    """lengths: (new tokens, tokens in the cache) of each sequence."""
    rng = np.random.default_rng(len(lengths) + n_pages)
    counts = [count for count, _ in lengths]
    return StepArrays(
        token_ids=rng.integers(0, 1000, sum(counts)),
        positions=rng.integers(0, 1000, sum(counts)),
        slot_mapping=rng.integers(0, 1000, sum(counts)),
        page_table=rng.integers(0, 1000, (len(lengths), n_pages)).astype(np.int32),
        query_starts=np.cumsum([0, *counts]).astype(np.int32),
        context_lens=np.array([context for _, context in lengths], dtype=np.int32),
        logit_rows=rng.integers(0, sum(counts), n_rows),
    )


@pytest.mark.parametrize("lengths", [[(1, 1)], [(1, 5), (1, 9)], [(3, 7), (1, 1), (4, 4)]])
@pytest.mark.parametrize("n_pages", [1, 2, 3])
@pytest.mark.parametrize("n_rows", [0, 1, 2])
def test_what_is_packed_comes_out_again(lengths, n_pages, n_rows):
    one = arrays(lengths, n_pages=n_pages, n_rows=n_rows)
    inputs = one.to(CPU)
    for field in dataclasses.fields(one):
        array, tensor = getattr(one, field.name), getattr(inputs, field.name)
        assert tensor.numpy().dtype == array.dtype, field.name
        assert np.array_equal(tensor.numpy(), array), field.name


def test_a_padded_step_keeps_its_rows_and_writes_nowhere_else():
    one = arrays([(1, 5), (1, 9), (1, 2)], n_pages=2, n_rows=3)
    padded = one.padded(8, 4)
    assert padded.is_decode
    for name in ("token_ids", "positions", "slot_mapping", "context_lens"):
        assert np.array_equal(getattr(padded, name)[:3], getattr(one, name)), name
    assert np.array_equal(padded.page_table[:3, :2], one.page_table)
    assert (padded.page_table[:3, 2:] == -1).all()
    assert (padded.slot_mapping[3:] == -1).all()
    assert (padded.context_lens[3:] == 1).all()
    assert (padded.page_table[3:, 0] == 0).all()
    assert padded.query_starts.tolist() == list(range(9))


def test_only_steps_of_single_wanted_tokens_are_decode_steps():
    assert arrays([(1, 5), (1, 9)], n_pages=1, n_rows=2).is_decode
    assert not arrays([(1, 5), (1, 9)], n_pages=1, n_rows=1).is_decode
    assert not arrays([(2, 5), (1, 9)], n_pages=1, n_rows=2).is_decode
    assert not arrays([(2, 5)], n_pages=1, n_rows=2).is_decode
