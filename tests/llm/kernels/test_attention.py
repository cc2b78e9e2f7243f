"""paged_attention: against torch's own attention, against the reference, and row by row."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from exl2_rag.errors import DTypeError, ShapeError
from exl2_rag.llm.kernels import ops, reference
from tests.llm.kernels.samples import (
    AWKWARD,
    AttentionCase,
    assert_close,
    attention_call,
    attention_case,
    quantised_pages,
    share_pages,
    write_arguments,
)

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
RAGGED = [(1, 70), (5, 5), (0, 3), (17, 129), (1, 1), (33, 200)]


def by_torch(case: AttentionCase, window: int = 0) -> torch.Tensor:
    """Each sequence through scaled_dot_product_attention in float64, with a mask written out."""
    outputs = []
    for index, (keys, values) in enumerate(zip(case.keys, case.values, strict=True)):
        first, last = case.query_starts[index].item(), case.query_starts[index + 1].item()
        q = case.q[first:last].double().transpose(0, 1)
        repeats = q.shape[0] // keys.shape[1]
        k = keys.double().repeat_interleave(repeats, 1).transpose(0, 1)
        v = values.double().repeat_interleave(repeats, 1).transpose(0, 1)
        mask = torch.zeros(last - first, len(keys), dtype=torch.bool)
        for row in range(last - first):
            position = len(keys) - (last - first) + row
            start = max(0, position + 1 - window) if window else 0
            mask[row, start : position + 1] = True
        out = F.scaled_dot_product_attention(q[None], k[None], v[None], attn_mask=mask, scale=0.2)[0]
        outputs.append(out.transpose(0, 1))
    return torch.cat(outputs).float()


def run(case: AttentionCase, implementation=ops.paged_attention, window: int = 0) -> torch.Tensor:
    return implementation(*attention_call(*case.arguments(), sliding_window=window))


@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_over_a_ragged_batch_is_torchs(native_level, dtype):
    case = attention_case(RAGGED, dtype=dtype)
    assert_close("paged_attention", run(case), by_torch(case))


@pytest.mark.parametrize("window", [0, 1, 2, 7, 63, 64, 65, 500])
def test_the_reference_is_torchs_with_and_without_a_window(window):
    case = attention_case(RAGGED)
    assert_close("paged_attention", run(case, reference.paged_attention, window), by_torch(case, window))


@pytest.mark.parametrize("size", AWKWARD)
def test_attention_agrees_with_the_reference_at_awkward_lengths(native_level, size):
    for lengths in ([(size, size)], [(1, size)], [(size, size + 70), (1, 3)]):
        case = attention_case(lengths, page_size=8, seed=size)
        assert_close("paged_attention", run(case), run(case, reference.paged_attention))


@pytest.mark.parametrize("head_dim", [1, 4, 8, 20, 32, 33, 64, 80, 128, 256])
def test_attention_takes_any_head_size(native_level, head_dim):
    case = attention_case([(3, 50), (1, 9)], head_dim=head_dim)
    assert_close("paged_attention", run(case), run(case, reference.paged_attention))


@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (2, 1), (7, 1), (6, 3), (8, 8), (32, 4)])
def test_query_heads_share_key_heads_in_groups(native_level, heads, kv_heads):
    case = attention_case([(5, 40), (1, 70)], heads=heads, kv_heads=kv_heads, head_dim=16)
    assert_close("paged_attention", run(case), by_torch(case))


@pytest.mark.parametrize("window", [1, 2, 15, 16, 63, 64, 65, 128, 1000])
def test_a_query_sees_exactly_the_last_keys_of_its_window(native_level, window):
    case = attention_case([(1, 130), (40, 150), (3, 3)])
    assert_close("paged_attention", run(case, window=window), by_torch(case, window))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [0, 50])
def test_a_row_is_the_same_alone_in_slices_and_in_any_batch(native_level, dtype, window):
    case = attention_case(RAGGED, dtype=dtype)
    together = run(case, window=window)
    for sequence, (count, _) in enumerate(RAGGED):
        start = case.query_starts[sequence].item()
        slices = [(row, row + 1) for row in range(count)] + [(0, count // 2), (count // 2, count), (0, count)]
        for first, last in slices:
            part = case.alone(sequence, first, last)
            alone = ops.paged_attention(*attention_call(*part, sliding_window=window))
            assert torch.equal(alone, together[start + first : start + last])


def test_neither_page_size_nor_page_order_changes_the_result(native_level):
    outputs = []
    for page_size in (16, 64, 8):
        case = attention_case([(20, 120)], page_size=page_size)
        fixed = attention_case([(20, 120)], page_size=16, seed=5)
        for token in range(120):  # the same keys and values, wherever the pages are
            page = case.page_table[0, token // page_size]
            case.k_pages[page, token % page_size] = fixed.keys[0][token]
            case.v_pages[page, token % page_size] = fixed.values[0][token]
        case.q = fixed.q
        outputs.append(run(case))
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[0], outputs[2])


@pytest.mark.usefixtures("native_kernels", "restore_threads")
def test_attention_is_the_same_for_any_number_of_threads():
    case = attention_case([(60, 200), (40, 300), (1, 100)], heads=8)
    outputs = []
    for threads in (1, 2, 4):
        ops.set_num_threads(threads)
        outputs.append(run(case))
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[0], outputs[2])


def test_large_scores_neither_overflow_nor_vanish(native_level):
    case = attention_case([(4, 90)])
    case.q *= 300
    # Scores of some hundreds have float32 steps of 3e-5, which is what the weights may be off by.
    torch.testing.assert_close(run(case), run(case, reference.paged_attention), atol=1e-4, rtol=1e-3)


def test_keys_of_other_sequences_are_never_read(native_level):
    # All pages that a sequence does not own hold NaN (see attention_case), and so do the rows after its end.
    assert run(attention_case([(1, 17), (2, 18)])).isfinite().all()


@pytest.mark.parametrize("implementation", [ops.paged_attention, reference.paged_attention])
@pytest.mark.parametrize(
    ("name", "index", "value"),
    [
        ("page_table", (0, 1), 99),
        ("page_table", (0, 0), -1),
        ("context_lens", 0, 4),
        ("context_lens", 0, 33),
        ("query_starts", 1, 9),
        ("query_starts", 2, 5),
    ],
)
def test_lengths_and_pages_out_of_range_are_refused(implementation, name, index, value):
    case = attention_case([(5, 20), (1, 2)])
    getattr(case, name)[index] = value
    with pytest.raises(ShapeError, match="paged_attention"):
        run(case, implementation)


def test_tensors_that_do_not_fit_are_refused():
    case = attention_case([(5, 20)])
    q, k, v, table, starts, lens = case.arguments()
    for arguments, error, message in (
        ((q[:, :3], k, v, table, starts, lens), ShapeError, "multiple of the key heads of the pages"),
        ((q[..., :31], k, v, table, starts, lens), ShapeError, "D the same"),
        ((q, k, v.half(), table, starts, lens), DTypeError, "alike"),
        ((q, k, v, table.long(), starts, lens), DTypeError, "page_table must be int32"),
        ((q, k, v, table, starts[:1], lens), ShapeError, r"query_starts \[B \+ 1\]"),
    ):
        with pytest.raises(error, match=message):
            ops.paged_attention(*attention_call(*arguments))
    with pytest.raises(ShapeError, match="sliding_window"):
        run(case, window=-1)


# ---- shared prefixes, quantised pages, softcap and sinks -------------------------------------------------------------

BITS = {"q8": 8, "q6": 6, "q4": 4}
KINDS = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16, **BITS}


def call_of(case: AttentionCase, kind: str, **options) -> tuple:
    """The case's call, over pages of any kind."""
    q, k_pages, v_pages, *batch = case.arguments()
    if kind in BITS:
        k_pages, v_pages = (quantised_pages(pages, BITS[kind]) for pages in (k_pages, v_pages))
    return attention_call(q, k_pages, v_pages, *batch, **options)


def case_of(kind: str, lengths: list[tuple[int, int]], **options) -> AttentionCase:
    return attention_case(lengths, dtype=KINDS[kind] if kind not in BITS else torch.float32, **options)


@pytest.mark.parametrize("window", [0, 200])
@pytest.mark.parametrize("kind", KINDS)
def test_sharing_a_prefix_changes_no_bit(native_level, kind, window):
    lengths = [(1, 250), (1, 241), (2, 300), (0, 260), (1, 30), (1, 200), (1, 200), (1, 240), (20, 250), (1, 300)]
    case = case_of(kind, lengths, heads=8, head_dim=32, page_size=8)
    # The third group shares less than a tile; the fourth ends within one, and one of its sequences is a slice.
    groups = share_pages(case.page_table, [4, 1, 2, 3, 0], [30, 0, 7, 28, 0])
    options = {"sliding_window": window, "softcap": 2.0 * (window > 0)}
    apart = ops.paged_attention(*call_of(case, kind, **options))
    assert torch.equal(ops.paged_attention(*call_of(case, kind, **groups, **options)), apart)
    assert_close("paged_attention", apart, reference.paged_attention(*call_of(case, kind, **groups, **options)))


@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 1), (5, 1), (8, 8), (64, 2)])
def test_any_number_of_lines_shares_a_prefix(native_level, heads, kv_heads):
    case = attention_case([(1, 140 + 3 * n) for n in range(11)], heads=heads, kv_heads=kv_heads)
    groups = share_pages(case.page_table, [11], [8])
    apart = run(case)
    assert torch.equal(ops.paged_attention(*attention_call(*case.arguments(), **groups)), apart)
    assert_close("paged_attention", apart, run(case, reference.paged_attention))


@pytest.mark.parametrize("head_dim", [32, 96, 128])
@pytest.mark.parametrize("kind", BITS)
def test_attention_reads_quantised_pages_as_the_reference_does(native_level, kind, head_dim):
    case = attention_case(RAGGED, head_dim=head_dim)
    call = call_of(case, kind)
    assert_close("paged_attention", ops.paged_attention(*call), reference.paged_attention(*call))


@pytest.mark.parametrize("softcap", [0.5, 30.0])
@pytest.mark.parametrize("with_sinks", [False, True])
def test_softcap_and_sinks_are_as_in_the_reference(native_level, softcap, with_sinks):
    case = attention_case(RAGGED)
    sinks = torch.tensor([-50.0, 0.0, 2.0, 50.0]) if with_sinks else None
    call = attention_call(*case.arguments(), softcap=softcap, sinks=sinks, softmax_scale=0.7)
    assert_close("paged_attention", ops.paged_attention(*call), reference.paged_attention(*call))


def test_a_sink_takes_part_where_a_window_hides_nothing_and_everything(native_level):
    case = attention_case([(3, 200)])
    for sink in (-1e4, 1e4):
        call = attention_call(*case.arguments(), sliding_window=1, sinks=torch.full((4,), sink))
        wanted = case.values[0][-3:].repeat_interleave(2, dim=1) if sink < 0 else torch.zeros(3, 4, 32)
        assert_close("paged_attention", ops.paged_attention(*call), wanted)


@pytest.mark.parametrize("implementation", [ops.paged_attention, reference.paged_attention])
@pytest.mark.parametrize(
    ("starts", "prefix", "message"),
    [
        ([0, 2, 3], [4, 0], "do not share 4"),
        ([0, 2, 3], [-1, 0], "do not share -1"),
        ([0, 2, 3], [99, 0], "do not share 99"),
        ([0, 2, 2], [1, 0], "group_starts must rise"),
        ([0, 3, 2], [1, 0], "group_starts must rise"),
        ([1, 2, 3], [0, 0], "group_starts must rise"),
        ([0, 2, 3], [3], r"group_prefix_pages \[NG\]"),
    ],
)
def test_groups_that_are_none_are_refused(implementation, starts, prefix, message):
    case = attention_case([(1, 70), (1, 60), (1, 20)])
    share_pages(case.page_table, [2, 1], [3, 0])
    groups = {
        "group_starts": torch.tensor(starts, dtype=torch.int32),
        "group_prefix_pages": torch.tensor(prefix, dtype=torch.int32),
    }
    if len(prefix) == 1 and implementation is reference.paged_attention:
        pytest.skip("shapes are checked before the reference is called")
    with pytest.raises(ShapeError, match=message):
        implementation(*attention_call(*case.arguments(), **groups))


def test_groups_without_their_pages_are_refused():
    case = attention_case([(1, 20)])
    with pytest.raises(ShapeError, match="go together"):
        ops.paged_attention(*attention_call(*case.arguments(), group_starts=torch.tensor([0, 1], dtype=torch.int32)))


@pytest.mark.parametrize(("head_dim", "rotary"), [(32, 32), (64, 32), (96, 96), (128, 128), (256, 64)])
@pytest.mark.parametrize("bits", BITS.values())
def test_codes_and_scales_are_the_formats_bit_for_bit(native_level, bits, head_dim, rotary):
    *inputs, k_pages, v_pages = write_arguments(33, bits=bits, head_dim=head_dim, rotary=rotary)
    *_, wanted_k, wanted_v = write_arguments(33, bits=bits, head_dim=head_dim, rotary=rotary)
    inputs[2] = inputs[2].clone()
    inputs[2][3] = 0.0
    inputs[2][4, 0], inputs[2][4, 0, 0] = 0.0, 1.0  # rotated: equal magnitudes
    inputs[2][5], inputs[2][6] = 1e9, 1e-7  # scales at both ends of float16
    wanted = reference.quantise_kv_write(*inputs, wanted_k, wanted_v)
    assert torch.equal(ops.quantise_kv_write(*inputs, k_pages, v_pages), wanted)
    for mine, theirs in ((k_pages, wanted_k), (v_pages, wanted_v)):
        assert torch.equal(mine.codes, theirs.codes)
        assert torch.equal(mine.scales, theirs.scales)
        assert mine.codes.any()
