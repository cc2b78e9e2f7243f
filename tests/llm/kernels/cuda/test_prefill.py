"""Attention of long prompts through libraries: against the reference and beside our kernel in one batch."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from exl2_rag.llm.kernels import cuda_prefill, reference_attention
from exl2_rag.llm.kernels.cuda_attention import paged_attention
from exl2_rag.llm.kernels.paged_batch import PagedBatch, Scoring
from tests.cuda_emulation import EmulatedBackend
from tests.llm.kernels.cuda.conftest import place_of
from tests.llm.kernels.cuda.test_attention import assert_near, expected, make_case, moved
from tests.llm.kernels.samples import attention_call

MIXED = [(1, 70), (1, 33), (40, 129), (40, 40), (0, 5), (3, 20), (33, 65)]


def attend(case, *, min_rows: int = 32, backend=None, **options) -> torch.Tensor:
    backend = backend or EmulatedBackend(80)
    return cuda_prefill.paged_attention(
        backend,
        *attention_call(*moved(place_of(backend), *case.arguments()), **options),
        host_starts=case.plain.query_starts.tolist(),
        host_contexts=case.plain.context_lens.tolist(),
        min_rows=min_rows,
    ).cpu()


@pytest.mark.parametrize("kind", ["f32", "f16", "q8", "q4"])
def test_long_and_short_sequences_of_one_batch_are_as_the_reference(backend, kind):
    case = make_case(kind, MIXED, exact=kind == "f32", heads=6, kv_heads=3)
    assert_near(attend(case, backend=backend), expected(case), kind)


def test_no_more_is_gathered_than_the_bound_allows(monkeypatch):
    case = make_case("f16", MIXED, exact=False, heads=6, kv_heads=3)
    gathered = []
    gather = cuda_prefill._gather

    def record(pages, indices, first, last):
        gathered.append(last - first)
        return gather(pages, indices, first, last)

    monkeypatch.setattr(cuda_prefill, "_gather", record)
    monkeypatch.setattr(cuda_prefill, "SCRATCH_BYTES", 2 * 129 * 32 * 2 * 2)  # two key heads of the longest
    assert_near(attend(case), expected(case), "f16")
    assert gathered == [2, 2, 1, 1] + [3] * 4
    monkeypatch.setattr(cuda_prefill, "SCRATCH_BYTES", 1)
    assert_near(attend(case), expected(case), "f16")


@pytest.mark.parametrize(
    ("kind", "exact", "options"),
    [
        ("f16", False, {"sliding_window": 9}),
        ("f16", False, {"softcap": 2.0}),
        ("f16", False, {"sinks": torch.ones(4)}),
        ("bf16", False, {}),
        ("q4", True, {}),
    ],
)
def test_what_torch_cannot_is_left_to_the_kernel(kind, exact, options):
    case = make_case(kind, [(1, 70), (40, 129)], exact=exact)
    by_kernel = paged_attention(EmulatedBackend(80), *attention_call(*case.arguments(), **options))
    assert torch.equal(attend(case, **options), by_kernel)


def test_slices_below_the_bound_are_left_to_the_kernel():
    case = make_case("f16", [(1, 70), (31, 129)], exact=False)
    assert torch.equal(attend(case), paged_attention(EmulatedBackend(80), *attention_call(*case.arguments())))
    assert not torch.equal(attend(case, min_rows=31), attend(case))


@pytest.mark.parametrize("options", [{}, {"sliding_window": 50}, {"softcap": 2.0}])
def test_flash_attn_is_given_pages_and_lengths_where_it_is_installed(monkeypatch, options):
    calls = []

    def flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, *, softmax_scale, causal, window_size, softcap,
        block_table,
    ):  # fmt: skip
        """What the package documents: rows and keys end to end, causal from the bottom right, pages by a table."""
        assert causal
        assert block_table.min() >= 0
        contexts = cu_seqlens_k.diff()
        assert (max_seqlen_q, max_seqlen_k) == (int(cu_seqlens_q.diff().max()), int(contexts.max()))
        assert window_size == ((-1, -1) if "sliding_window" not in options else (49, 0))
        calls.append(len(contexts))
        batch = PagedBatch(block_table, cu_seqlens_q, contexts.to(torch.int32))
        scoring = Scoring(softmax_scale, sliding_window=window_size[0] + 1, softcap=softcap)
        return reference_attention.paged_attention(q, k, v, batch, scoring)

    monkeypatch.setattr(
        cuda_prefill, "_flash_attn", lambda: SimpleNamespace(flash_attn_varlen_func=flash_attn_varlen_func)
    )
    case = make_case("f16", MIXED, exact=False, page_size=256)
    assert_near(attend(case, **options), expected(case, **options), "f16")
    assert calls == [2, 1]
    small_pages = make_case("f16", MIXED, exact=False, page_size=128)
    assert_near(attend(small_pages), expected(small_pages), "f16")
    assert calls == [2, 1]
