from __future__ import annotations

import pytest
import torch

from exl2_rag.llm.kernels.codes import pack_codes, pack_nibbles, unpack_codes, unpack_nibbles, width_runs
from exl2_rag.llm.kernels.weights import EXL2_WIDTHS, Group, parse_groups
from tests.llm.kernels.samples import generator


@pytest.mark.parametrize("bits", EXL2_WIDTHS)
def test_codes_lie_in_a_plain_bit_string_down_each_column(bits):
    words = torch.randint(-(1 << 31), 1 << 31, (2 * bits, 3), generator=generator(bits)).to(torch.int32)
    codes = unpack_codes(words, bits)
    for column in range(3):
        string = sum((int(word) & 0xFFFFFFFF) << (32 * index) for index, word in enumerate(words[:, column]))
        expected = [(string >> (row * bits)) & ((1 << bits) - 1) for row in range(64)]
        assert codes[:, column].tolist() == expected


@pytest.mark.parametrize("bits", EXL2_WIDTHS)
def test_packing_undoes_unpacking(bits):
    words = torch.randint(-(1 << 31), 1 << 31, (3 * bits, 5), generator=generator(bits)).to(torch.int32)
    assert torch.equal(pack_codes(unpack_codes(words, bits), bits), words)


def test_nibbles_are_packed_lowest_first():
    assert unpack_nibbles(torch.tensor([[-0x789ABCDF]], dtype=torch.int32)).tolist() == [[1, 2, 3, 4, 5, 6, 7, 8]]
    values = torch.randint(0, 16, (3, 24), generator=generator(0))
    assert torch.equal(unpack_nibbles(pack_nibbles(values)).to(torch.int64), values)


def test_groups_take_their_rows_from_where_the_next_one_starts():
    assert parse_groups([8, 0, 5, 8, 4, 28], 44) == [Group(8, 0, 32), Group(5, 8, 128), Group(4, 28, 128)]


def test_groups_of_one_width_are_decoded_together():
    groups = parse_groups([4, 0, 4, 16, 3, 20], 26)
    assert width_runs(groups) == [(4, 0, 0, 160), (3, 20, 160, 64)]


@pytest.mark.parametrize(
    ("pairs", "packed_rows", "message"),
    [
        ([], 4, "one .* pair per group, it holds 0"),
        ([4, 0, 4], 4, "one .* pair per group, it holds 3"),
        ([7, 0], 7, "7 bits"),
        ([4, 4], 8, "starts at packed row 4 instead of 0"),
        ([4, 0, 4, 8, 4, 4], 12, "group 1 starts at packed row 8, but group 2 at 4: groups overlap"),
        ([4, 0, 4, 8], 8, "group 1 starts at packed row 8, but q_weight has 8 rows: groups overlap"),
        ([4, 0, 3, 5], 8, "5 packed rows of 4 bits"),
        ([3, 0, 4, 3], 7, "must not rise"),
    ],
)
def test_group_tables_that_cannot_be_true_are_refused(pairs, packed_rows, message):
    with pytest.raises(ValueError, match=message):
        parse_groups(pairs, packed_rows)
