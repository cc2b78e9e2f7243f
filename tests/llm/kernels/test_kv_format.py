"""The format of quantised pages: exact where it must be, and how much it loses."""

from __future__ import annotations

import pytest
import torch

from exl2_rag.errors import DTypeError, ShapeError
from exl2_rag.llm.kernels import kv_format
from exl2_rag.llm.kernels.kv_format import QuantisedPages
from tests.llm.kernels.samples import normal


def relative_error(x: torch.Tensor, bits: int) -> float:
    codes, scales = kv_format.quantise(kv_format.rotate(x), bits)
    restored = kv_format.rotate(kv_format.dequantise(codes, scales, bits))
    return float((restored - x).norm() / x.norm())


@pytest.mark.parametrize("head_dim", [32, 64, 80, 96, 128, 192, 256])
def test_rotation_is_its_own_inverse_and_keeps_dot_products(head_dim):
    x, y = normal(7, 3, head_dim), normal(7, 3, head_dim, seed=1)
    torch.testing.assert_close(kv_format.rotate(kv_format.rotate(x)), x, atol=1e-5, rtol=1e-5)
    kept = (kv_format.rotate(x) * kv_format.rotate(y)).sum(-1)
    torch.testing.assert_close(kept, (x * y).sum(-1), atol=1e-4, rtol=1e-4)
    if head_dim == 32:  # against the matrix written out
        signs = [[1 - 2 * (bin(row & column).count("1") % 2) for column in range(32)] for row in range(32)]
        matrix = torch.tensor(signs, dtype=torch.float32) / 32**0.5
        torch.testing.assert_close(kv_format.rotate(x), x @ matrix, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("bits", kv_format.CACHE_BITS)
def test_packing_is_undone_by_unpacking(bits):
    codes = torch.randint(0, 1 << bits, (2, 3, 96), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    packed = kv_format.pack_codes(codes, bits)
    assert packed.shape == (2, 3, 96 * bits // 8)
    assert torch.equal(kv_format.unpack_codes(packed, bits), codes)


def test_codes_lie_where_the_drawing_says():
    codes = torch.zeros(32, dtype=torch.uint8)
    codes[:8] = torch.tensor([1, 2, 3, 4, 5, 6, 7, 8])
    # Words of 32 bits, lowest byte first: 0, 2, 4, 6 in the lower half, 1, 3, 5, 7 in the upper.
    assert kv_format.pack_codes(codes, 4)[:4].tolist() == [0x31, 0x75, 0x42, 0x86]
    codes[:8] += torch.tensor([16, 32, 48, 0, 16, 0, 0, 48], dtype=torch.uint8)
    packed = kv_format.pack_codes(codes, 6)
    assert packed[:4].tolist() == [0x31, 0x75, 0x42, 0x86]
    assert packed[16:18].tolist() == [0b00_01_11_01, 0b11_00_00_10]


@pytest.mark.parametrize(("bits", "limit"), [(8, 0.006), (6, 0.022), (4, 0.09)])
def test_little_is_lost_of_normal_numbers_and_no_more_with_outliers(bits, limit):
    x = normal(512, 128)
    assert 0.8 * limit < relative_error(x, bits) < limit
    x[:, [3, 40, 41, 100]] *= 15
    assert relative_error(x, bits) < limit


def test_the_largest_number_of_a_group_is_kept_exactly():
    x = torch.zeros(1, 64)
    x[0, 5], x[0, 6], x[0, 40] = -4.0, 3.0, 2.5
    for bits in kv_format.CACHE_BITS:
        codes, scales = kv_format.quantise(x, bits)
        restored = kv_format.dequantise(codes, scales, bits)
        assert restored[0, 5] == -4.0
        assert restored[0, 40] == 2.5
        assert restored[0, :5].abs().sum() == 0


def test_zeros_stay_zero():
    pages = QuantisedPages.zeros(2, 16, 2, 64, bits=4, device=torch.device("cpu"))
    assert not kv_format.dequantise_pages(pages).any()
    codes, scales = kv_format.quantise(torch.zeros(3, 64), 4)
    assert not kv_format.dequantise(codes, scales, 4).any()
    assert (pages.bits, pages.head_dim, pages.nbytes) == (4, 64, 2 * 16 * 2 * (32 + 4))


def test_pages_that_are_none_are_refused():
    cpu = torch.device("cpu")
    for bits, head_dim in ((5, 64), (4, 80)):
        with pytest.raises(ShapeError, match="4, 6 or 8 bits"):
            QuantisedPages.zeros(1, 16, 1, head_dim, bits=bits, device=cpu)
    good = QuantisedPages.zeros(1, 16, 1, 64, bits=4, device=cpu)
    for bad, error in (
        (QuantisedPages(good.codes.int(), good.scales), DTypeError),
        (QuantisedPages(good.codes, good.scales.float()), DTypeError),
        (QuantisedPages(good.codes[:, :8], good.scales), ShapeError),
        (QuantisedPages(good.codes[..., :20], good.scales), ShapeError),
        (
            QuantisedPages(good.codes.transpose(0, 1).contiguous().transpose(0, 1).expand(3, -1, -1, -1), good.scales),
            ShapeError,
        ),
    ):
        with pytest.raises(error):
            bad.check("op", "k_pages")
