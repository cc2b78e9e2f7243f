"""Attention over pages and the quantised cache: against the reference, bit by bit against itself, and with faults."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from exl2_rag.errors import KernelError, ShapeError
from exl2_rag.llm.kernels import cuda_attention, kv_format, reference_attention
from exl2_rag.llm.kernels.kv_format import QuantisedPages
from tests.cuda_emulation import EmulatedBackend
from tests.llm.kernels.cuda.conftest import place_of
from tests.llm.kernels.samples import (
    AttentionCase,
    attention_call,
    attention_case,
    normal,
    quantised_pages,
    share_pages,
    write_arguments,
)

RAGGED = [(1, 70), (5, 5), (0, 3), (17, 129), (1, 1), (3, 300)]
CONTEXTS = [1, 2, 3, 31, 32, 33, 129, 300]
KINDS = ["f32", "f16", "bf16", "q8", "q6", "q4"]
DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}


@dataclass
class Case:
    """A ragged batch over pages of any kind."""

    plain: AttentionCase
    q: Tensor
    k_pages: Tensor | QuantisedPages
    v_pages: Tensor | QuantisedPages

    def arguments(self) -> tuple:
        _, _, _, *rest = self.plain.arguments()
        return (self.q, self.k_pages, self.v_pages, *rest)

    def alone(self, sequence: int, first: int, last: int) -> tuple:
        _, _, _, *rest = self.plain.alone(sequence, first, last)
        start = int(self.plain.query_starts[sequence])
        return (self.q[start + first : start + last].clone(), self.k_pages, self.v_pages, *rest)


def make_case(kind: str, lengths: list[tuple[int, int]], *, exact: bool = True, **options) -> Case:
    dtype = DTYPES.get(kind, torch.float32)
    plain = attention_case(lengths, dtype=dtype, **options)
    k_pages, v_pages = plain.k_pages, plain.v_pages
    if kind.startswith("q"):
        k_pages, v_pages = quantised_pages(k_pages, int(kind[1:])), quantised_pages(v_pages, int(kind[1:]))
    return Case(plain, plain.q if exact else plain.q.half(), k_pages, v_pages)


def moved(device: torch.device, *arguments):
    """Tensors and pages on the device; other things as they are."""
    for one in arguments:
        if isinstance(one, QuantisedPages):
            yield QuantisedPages(one.codes.to(device), one.scales.to(device))
        else:
            yield one.to(device) if isinstance(one, Tensor) else one


def attend_to(backend, arguments: tuple, **options) -> Tensor:
    """On the backend's device and back."""
    device = place_of(backend)
    options = dict(zip(options, moved(device, *options.values()), strict=True))
    return cuda_attention.paged_attention(backend, *attention_call(*moved(device, *arguments), **options)).cpu()


def attend(backend, case: Case, **options) -> Tensor:
    return attend_to(backend, case.arguments(), **options)


def expected(case: Case, **options) -> Tensor:
    return reference_attention.paged_attention(*attention_call(*case.arguments(), **options))


def assert_near(actual: Tensor, wanted: Tensor, kind: str) -> None:
    """float16 queries: weights are rounded to float16. Others: queries and weights have 24, 22 or 16 bits."""
    exact = {"f32": 5e-6, "bf16": 5e-5}.get(kind, 2e-5)
    limit = 2e-3 if actual.dtype == torch.float16 else exact
    assert actual.dtype == wanted.dtype
    torch.testing.assert_close(actual.float(), wanted.float(), atol=limit, rtol=limit)


@pytest.mark.parametrize("exact", [True, False], ids=["q32", "q16"])
@pytest.mark.parametrize("kind", KINDS)
def test_attention_over_a_ragged_batch_is_as_the_reference(backend, kind, exact):
    case = make_case(kind, RAGGED, exact=exact, heads=8, kv_heads=2, head_dim=64)
    assert_near(attend(backend, case), expected(case), kind)


@pytest.mark.parametrize("exact", [True, False], ids=["q32", "q16"])
def test_attention_without_the_larger_tensor_instruction_is_as_the_reference(exact):
    case = make_case("f16", RAGGED, exact=exact, heads=8, kv_heads=2, head_dim=64)
    assert_near(attend(EmulatedBackend(75), case), expected(case), "f16")


@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("kind", ["f32", "f16", "q4"])
def test_attention_takes_awkward_lengths(backend, kind, context):
    for rows in {1, min(2, context), min(5, context)}:
        case = make_case(kind, [(rows, context), (1, context)], seed=context, head_dim=64)
        assert_near(attend(backend, case), expected(case), kind)


# Quantised pages have groups of 32.
HEADS = [(kind, dim) for kind in KINDS for dim in (32, 40, 64, 72, 80, 96, 128, 256) if kind in DTYPES or dim % 32 == 0]


@pytest.mark.parametrize(("kind", "head_dim"), HEADS)
def test_attention_takes_heads_of_any_size(backend, kind, head_dim):
    for exact in (True, False):
        case = make_case(kind, [(3, 50), (1, 9), (18, 70)], exact=exact, head_dim=head_dim)
        assert_near(attend(backend, case), expected(case), kind)


@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (2, 2), (8, 2), (7, 1), (14, 2), (8, 1), (20, 1), (70, 1)])
@pytest.mark.parametrize("kind", ["f32", "f16", "q8"])
def test_query_heads_share_key_heads_in_groups(backend, kind, heads, kv_heads):
    case = make_case(kind, [(2, 40), (1, 70), (5, 60)], heads=heads, kv_heads=kv_heads)
    assert_near(attend(backend, case), expected(case), kind)


@pytest.mark.parametrize("window", [1, 2, 31, 64, 65, 255, 256, 257, 300, 5000])
@pytest.mark.parametrize("kind", ["f32", "f16"])
def test_a_query_sees_exactly_the_last_keys_of_its_window(backend, kind, window):
    case = make_case(kind, [(1, 700), (40, 600), (3, 3)])
    options = {"sliding_window": window}
    assert_near(attend(backend, case, **options), expected(case, **options), kind)


@pytest.mark.parametrize("kind", ["f32", "f16", "q6"])
def test_softcap_and_sinks_are_as_the_reference(backend, kind):
    case = make_case(kind, RAGGED, heads=8, kv_heads=2, head_dim=32)
    for options in (
        {"softcap": 0.7},
        {"sinks": normal(8, seed=3)},
        {"softcap": 2.0, "sinks": normal(8), "sliding_window": 9},
    ):
        plain = expected(case)
        wanted = expected(case, **options)
        assert (wanted - plain).abs().max() > 1e-2
        assert_near(attend(backend, case, **options), wanted, kind)


@pytest.mark.parametrize("kind", ["f32", "f16", "bf16", "q4"])
@pytest.mark.parametrize("window", [0, 50])
def test_a_row_is_the_same_alone_in_slices_in_any_batch_and_taken_in_turn(backend, monkeypatch, kind, window):
    lengths = [(1, 70), (0, 3), (21, 129), (1, 1), (3, 600), (2, 30)]
    case = make_case(kind, lengths, exact=False, heads=8, kv_heads=2, head_dim=64)
    together = attend(backend, case, sliding_window=window)
    for sequence, (count, _) in enumerate(lengths):
        start = int(case.plain.query_starts[sequence])
        slices = [(0, 1), (count // 2, count), (0, count), (count - 1, count)]
        for first, last in {one for one in slices if count and one[0] < one[1]}:
            part = case.alone(sequence, first, last)
            alone = attend_to(backend, part, sliding_window=window)
            assert torch.equal(alone, together[start + first : start + last])
    monkeypatch.setattr(cuda_attention, "_WORKSPACE_BYTES", 0)
    monkeypatch.setattr(cuda_attention, "_LARGE_WORKSPACE_BYTES", 0)
    assert torch.equal(attend(backend, case, sliding_window=window), together)


@pytest.mark.parametrize("kind", ["f32", "f16", "q8"])
def test_units_taken_in_turn_fold_all_their_splits(backend, monkeypatch, kind):
    monkeypatch.setattr(cuda_attention, "_WORKSPACE_BYTES", 0)
    monkeypatch.setattr(cuda_attention, "_LARGE_WORKSPACE_BYTES", 0)
    case = make_case(kind, [(20, 900), (1, 600), (3, 800)], heads=4, kv_heads=2)
    for window in (0, 300):
        assert_near(attend(backend, case, sliding_window=window), expected(case, sliding_window=window), kind)


def test_bounds_that_the_caller_knows_change_nothing(backend):
    case = make_case("f16", [(1, 270), (2, 33)], exact=False)
    together = attend(backend, case)
    wide = torch.full((2, 400), -1, dtype=torch.int32)
    wide[:, : case.plain.page_table.shape[1]] = case.plain.page_table
    case.plain.page_table = wide
    assert torch.equal(attend(backend, case, max_context=270), together)
    case.plain.page_table = wide[:, :17]
    assert torch.equal(attend(backend, case), together)


def test_rows_beyond_the_last_sequence_are_zero(backend):
    # A captured graph of a larger batch: sequences without rows, and rows without a sequence.
    case = make_case("f16", [(1, 40), (1, 20), (0, 0), (0, 0)])
    together = attend(backend, case)
    case.q = torch.cat((case.q, case.q))
    padded = attend(backend, case)
    assert torch.equal(padded[:2], together)
    assert not padded[2:].any()


def test_a_key_that_stands_out_is_found_wherever_it_is(backend):
    for kind in ("f16", "q8", "q6", "q4"):
        for position in (0, 15, 16, 63, 64, 255, 256, 299):
            plain = attention_case([(1, 300)], heads=4, kv_heads=1, head_dim=64)
            needle = plain.page_table[0, position // 16], position % 16
            plain.k_pages[needle] = plain.q[0, 1] * 4
            plain.v_pages[needle] = 10.0
            k_pages, v_pages = plain.k_pages.half(), plain.v_pages.half()
            if kind != "f16":
                k_pages, v_pages = (quantised_pages(pages, int(kind[1:])) for pages in (plain.k_pages, plain.v_pages))
            # Queries of quantised pages come rotated, as quantise_kv_write gives them.
            q = plain.q if kind == "f16" else kv_format.rotate(plain.q)
            case = Case(plain, q, k_pages, v_pages)
            assert (attend(backend, case)[0, 1] - 10).abs().max() < 0.7


SHARED_PAGES = 40


def shared_case(kind: str, lengths: list[tuple[int, int]], groups: list[int], prefix_pages: list[int], **options):
    """A batch in which the sequences of a group start with the same pages."""
    case = make_case(kind, lengths, exact=options.pop("exact", False), **options)
    shared = share_pages(case.plain.page_table, groups, prefix_pages)
    return case, (shared["group_starts"], shared["group_prefix_pages"])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("window", [0, 400])
def test_sharing_a_prefix_changes_no_bit(backend, kind, window):
    lengths = [(1, 650), (1, 641), (2, 700), (1, 660), (1, 30), (1, 600), (1, 600), (1, 640), (20, 650), (1, 700)]
    case, (starts, prefix) = shared_case(kind, lengths, [4, 1, 2, 3], [SHARED_PAGES, 0, 15, 33], heads=8, head_dim=64)
    options = {"sliding_window": window}
    apart = attend(backend, case, **options)
    assert_near(apart, expected(case, **options), kind)
    for max_rest in (0, 650):
        shared = attend(
            backend, case, group_starts=starts, group_prefix_pages=prefix, max_rest=max_rest, max_context=700, **options
        )
        assert torch.equal(shared, apart)
    wanted = expected(case, group_starts=starts, group_prefix_pages=prefix, **options)
    assert torch.equal(wanted, expected(case, **options))


def test_shared_pages_are_read_once_for_their_group(backend):
    # The others' own copies of the shared pages may hold anything: the prefix pass reads the first's.
    lengths = [(1, 700), (1, 650), (1, 640)]
    case, (starts, prefix) = shared_case("f16", lengths, [3], [SHARED_PAGES])
    apart = attend(backend, case)
    case.plain.page_table[1:, :32] = -1000000  # whole splits: 512 keys
    shared = attend(backend, case, group_starts=starts, group_prefix_pages=prefix)
    assert torch.equal(shared, apart)


@pytest.mark.parametrize(
    ("starts", "prefix", "message"),
    [([0, 3], [99], "do not share 99"), ([0, 2], [1], "group_starts"), ([0, 3], [SHARED_PAGES + 1], "do not share")],
)
def test_groups_that_do_not_share_are_refused_by_the_reference(starts, prefix, message):
    case, _ = shared_case("f32", [(1, 700), (1, 650), (1, 690)], [3], [SHARED_PAGES])
    group_starts, prefix_pages = torch.tensor(starts, dtype=torch.int32), torch.tensor(prefix, dtype=torch.int32)
    with pytest.raises(ShapeError, match=message):
        expected(case, group_starts=group_starts, group_prefix_pages=prefix_pages)


@pytest.mark.parametrize("order", ["reverse", "shuffled"])
@pytest.mark.parametrize("kind", ["f32", "f16", "q6"])
def test_attention_does_not_depend_on_the_order_of_threads(kind, order):
    case = make_case(kind, [(1, 300), (20, 70)], exact=False, heads=8)
    forward = attend(EmulatedBackend(80), case)
    assert torch.equal(forward, attend(EmulatedBackend(80, order=order), case))


def test_a_wrong_fragment_layout_is_noticed():
    case = make_case("f16", [(1, 40)], head_dim=64)
    broken = attend(EmulatedBackend(80, defines={"EXL2_FAULT_MMA": 1}), case)
    with pytest.raises(AssertionError):
        assert_near(broken, expected(case), "f16")


def test_what_is_not_supported_is_refused():
    backend = EmulatedBackend(80)
    for case, error, message in (
        (make_case("f16", [(1, 9)], head_dim=36), ShapeError, "multiple of 8 numbers"),
        (make_case("f16", [(1, 9)], page_size=8), ShapeError, "multiple of 16 tokens"),
        (make_case("f16", [(1, 9)], head_dim=264), ShapeError, "up to 256"),
    ):
        with pytest.raises(error, match=message):
            attend(backend, case)
    with pytest.raises(KernelError, match="bfloat16 pages need"):
        attend(EmulatedBackend(75), make_case("bf16", [(1, 9)]))


# ---- writing quantised pages ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("bits", kv_format.CACHE_BITS)
@pytest.mark.parametrize(("head_dim", "rotary"), [(32, 32), (64, 32), (96, 96), (128, 128), (256, 64)])
def test_codes_scales_and_queries_equal_the_reference_bit_for_bit(target, bits, head_dim, rotary, dtype):
    for rows in (1, 3, 33):
        *inputs, k_pages, v_pages = write_arguments(rows, bits=bits, head_dim=head_dim, rotary=rotary, dtype=dtype)
        *_, wanted_k, wanted_v = write_arguments(rows, bits=bits, head_dim=head_dim, rotary=rotary, dtype=dtype)
        wanted = reference_attention.quantise_kv_write(*inputs, wanted_k, wanted_v)
        on_device = list(moved(target.device, *inputs, k_pages, v_pages))
        actual = cuda_attention.quantise_kv_write(target.backend, *on_device)
        assert torch.equal(actual.cpu(), wanted)
        for mine, theirs in zip(on_device[-2:], (wanted_k, wanted_v), strict=True):
            assert torch.equal(mine.codes.cpu(), theirs.codes)
            assert torch.equal(mine.scales.cpu(), theirs.scales)
            assert mine.codes.any()


def test_a_negative_slot_is_not_written():
    *inputs, k_pages, v_pages = write_arguments(3, bits=4, head_dim=32, rotary=32)
    inputs[6] = torch.tensor([-1, 17, -1])
    cuda_attention.quantise_kv_write(EmulatedBackend(80), *inputs, k_pages, v_pages)
    for pages in (k_pages, v_pages):
        written = pages.scales.flatten(0, 1).any(dim=-1).any(dim=-1)
        assert written.nonzero().flatten().tolist() == [17]


def test_ties_zeros_and_what_is_no_number_are_as_in_the_reference():
    *inputs, k_pages, v_pages = write_arguments(4, bits=4, head_dim=32, rotary=32)
    *_, wanted_k, wanted_v = write_arguments(4, bits=4, head_dim=32, rotary=32)
    inputs[2] = torch.zeros(4, 2, 32)
    inputs[2][1, 0, 0] = 1.0  # rotated: 32 equal magnitudes
    inputs[2][2, 0, 5] = float("nan")
    inputs[2][3] = 1e9
    reference_attention.quantise_kv_write(*inputs, wanted_k, wanted_v)
    cuda_attention.quantise_kv_write(EmulatedBackend(80), *inputs, k_pages, v_pages)
    assert torch.equal(v_pages.codes, wanted_v.codes)
    assert torch.equal(v_pages.scales.isnan(), wanted_v.scales.isnan())
    assert torch.equal(v_pages.scales.nan_to_num(), wanted_v.scales.nan_to_num())
    assert v_pages.scales.isnan().any()
