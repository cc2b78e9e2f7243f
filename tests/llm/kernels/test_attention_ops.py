"""The ops around quantised pages, shared prefixes and sampling, as any device has them."""

from __future__ import annotations

import pytest
import torch

from exl2_rag.errors import DTypeError, ShapeError
from exl2_rag.llm.kernels import kv_format, ops, reference
from exl2_rag.llm.kernels.kv_format import QuantisedPages
from exl2_rag.llm.kernels.paged_batch import flatten
from tests.llm.kernels.samples import AttentionCase, attention_call, attention_case, normal

# Attention over random keys with scores of about 1.6: how far q8, q6 and q4 pages may lead from unquantised ones.
LOSSES = {8: 0.02, 6: 0.06, 4: 0.25}


def written(case: AttentionCase, bits: int) -> tuple[QuantisedPages, QuantisedPages]:
    """The case's keys and values written as quantised pages, at position 0: nothing turns."""
    n_pages, page_size, kv_heads, head_dim = case.k_pages.shape
    pages = [
        QuantisedPages.zeros(n_pages, page_size, kv_heads, head_dim, bits=bits, device=case.q.device) for _ in range(2)
    ]
    for index, (keys, values) in enumerate(zip(case.keys, case.values, strict=True)):
        tokens = torch.arange(len(keys))
        slots = case.page_table[index].long()[tokens // page_size] * page_size + tokens % page_size
        tables = torch.ones(1, head_dim // 2), torch.zeros(1, head_dim // 2)
        ops.quantise_kv_write(keys, keys, values, *tables, torch.zeros_like(tokens), slots, *pages)
    return pages[0], pages[1]


@pytest.mark.parametrize("bits", kv_format.CACHE_BITS)
def test_attention_over_quantised_pages_is_near_that_over_plain_ones(bits):
    case = attention_case([(1, 70), (5, 200), (3, 3)], heads=4, kv_heads=2, head_dim=64)
    q, _, _, *batch = case.arguments()
    plain = reference.paged_attention(*attention_call(*case.arguments()))
    pages = written(case, bits)
    rotated = kv_format.rotate(q)
    quantised = ops.paged_attention(*attention_call(rotated, *pages, *batch))
    loss = float((quantised - plain).norm() / plain.norm())
    assert LOSSES[bits] / 8 < loss < LOSSES[bits]


@pytest.mark.parametrize("bits", kv_format.CACHE_BITS)
def test_the_one_key_that_matters_is_found_in_quantised_pages(bits):
    case = attention_case([(1, 150)], heads=2, kv_heads=1, head_dim=64)
    for position in (0, 77, 149):
        keys, values = case.keys[0].clone(), case.values[0].clone()
        keys[position], values[position] = case.q[0, 0] * 3, 5.0
        needle = AttentionCase(**{**vars(case), "keys": [keys], "values": [values]})
        rotated = kv_format.rotate(case.q)
        _, _, _, *batch = case.arguments()
        found = ops.paged_attention(*attention_call(rotated, *written(needle, bits), *batch, softmax_scale=0.5))
        assert (found[0, 0] - 5).abs().max() < 0.4


def test_softcap_and_sinks_mean_what_they_say():
    case = attention_case([(2, 30)], heads=2, kv_heads=1)
    q, _, _, *_ = case.arguments()
    keys, values = case.keys[0].double(), case.values[0].double()
    sinks = normal(2, seed=5)
    call = attention_call(*case.arguments(), softmax_scale=0.3, softcap=1.5, sinks=sinks)
    actual = reference.paged_attention(*call)
    for row in range(2):
        for head in range(2):
            scores = 1.5 * torch.tanh((keys[: 29 + row, 0] @ q[row, head].double()) * 0.3 / 1.5)
            weights = scores.exp() / (scores.exp().sum() + sinks[head].double().exp())
            wanted = weights @ values[: 29 + row, 0]
            torch.testing.assert_close(actual[row, head], wanted.float(), atol=1e-6, rtol=1e-6)


def test_tensors_that_do_not_fit_are_refused():
    case = attention_case([(1, 20)], head_dim=64)
    q, _, _, *batch = case.arguments()
    pages = written(case, 4)
    for arguments, options, error, message in (
        ((q[..., :32], *pages, *batch), {}, ShapeError, "q must be"),
        ((q.double(), *pages, *batch), {}, DTypeError, "q must be float32"),
        ((q, pages[0], case.v_pages, *batch), {}, DTypeError, "both"),
        ((q, *pages, batch[0].long(), *batch[1:]), {}, DTypeError, "page_table must be"),
        ((q, *pages, batch[0], batch[1][:1], batch[2]), {}, ShapeError, "query_starts"),
        ((q, *pages, *batch), {"sinks": torch.ones(3)}, ShapeError, "sinks must be"),
        ((q, *pages, *batch), {"softcap": -1.0}, ShapeError, "softcap"),
    ):
        with pytest.raises(error, match=message):
            ops.paged_attention(*attention_call(*arguments, **options))
    tables = torch.ones(4, 32), torch.zeros(4, 32)
    place = torch.tensor([0]), torch.tensor([3])
    k = normal(1, 2, 64)
    for arguments, error, message in (
        ((q, k.half(), k, *tables, *place), DTypeError, "k must be float32"),
        ((q, k[:, :1], k, *tables, *place), ShapeError, "k and v must be"),
        ((q, k, k, torch.ones(4, 33), tables[1], *place), ShapeError, "cos and sin"),
        ((q, k, k, *tables, place[0].int(), place[1]), DTypeError, "positions must be"),
        ((q, k, k, *tables, torch.tensor([4]), place[1]), ShapeError, "positions must be"),
        ((q, k, k, *tables, place[0], torch.tensor([-1])), ShapeError, "slot_mapping must be"),
    ):
        with pytest.raises(error, match=message):
            ops.quantise_kv_write(*arguments, *pages)


def row_sampling(batch: int, **changes) -> ops.RowSampling:
    fields = {
        "temperatures": torch.ones(batch, dtype=torch.float64),
        "top_k": torch.zeros(batch, dtype=torch.int32),
        "top_p": torch.ones(batch, dtype=torch.float64),
        "min_p": torch.zeros(batch, dtype=torch.float64),
        "seeds": torch.arange(batch),
        "steps": torch.zeros(batch, dtype=torch.int64),
    }
    return ops.RowSampling(**{**fields, **changes})


def test_sampling_obeys_masks_and_refuses_what_does_not_fit():
    logits = normal(4, 40)
    mask = torch.tensor([[0, 1 << 3]], dtype=torch.int32).expand(4, -1)
    tokens, log_probs = ops.sample(logits, mask, row_sampling(4))
    assert tokens.tolist() == [35] * 4
    torch.testing.assert_close(log_probs, torch.log_softmax(logits, -1)[:, 35])
    for arguments, error, message in (
        ((logits.half(), mask, row_sampling(4)), DTypeError, "logits must be"),
        ((logits, mask[:, :1], row_sampling(4)), ShapeError, "mask must be"),
        ((logits, mask, row_sampling(3)), ShapeError, "temperatures must be"),
        ((logits, mask, row_sampling(4, top_k=torch.zeros(4))), DTypeError, "top_k must be"),
    ):
        with pytest.raises(error, match=message):
            ops.sample(*arguments)


def test_the_operators_can_be_traced():
    case = attention_case([(1, 20)], head_dim=64)
    q, _, _, *batch = case.arguments()
    pages = written(case, 8)
    parts = (pages[0].codes, pages[1].codes, pages[0].scales, pages[1].scales)
    torch.library.opcheck(
        torch.ops.exl2_rag.paged_attention.default,
        (q, *parts, *flatten(ops.PagedBatch(*batch), ops.Scoring(1.0))),
        test_utils=("test_schema", "test_faketensor"),
    )
    rows = row_sampling(3)
    parameters = [getattr(rows, name) for name in ops.RowSampling.__slots__]
    torch.library.opcheck(
        torch.ops.exl2_rag.sample.default,
        (normal(3, 9), None, *parameters),
        test_utils=("test_schema", "test_faketensor"),
    )
