"""Sums that are cut off: what the emulation does, and that the bounds of tests on a GPU follow from it."""

import pytest
import torch

from tests.similarity.test_at_size import OUTPUTS, SPLIT
from tools.precision.tensor_cores import cut_off_product, draw, errors


@pytest.mark.parametrize(
    ("products", "total"),
    [
        ([1, 2**-23], 1 + 2**-23),
        ([1, 2**-24], 1),  # half of the last bit
        ([1, 1.5 * 2**-23], 1 + 2**-23),  # not rounded to the nearest
        ([-1, -1.5 * 2**-23], -1 - 2**-23),  # towards zero
        ([1, *[2**-25] * 4], 1 + 2**-23),  # two bits more are kept while they are added
        ([1, *[2**-26] * 15], 1),  # and no third
        ([1, *[0] * 15, *[2**-25] * 4], 1 + 2**-23),  # the sum so far is a summand like others
        ([1, *[2**-25] * 3, *[0] * 12, 2**-25], 1),  # and is cut off after each block
        ([1.5, 1.5], 3),
        ([0], 0),
        ([2**-100, 2**-101], 1.5 * 2**-100),
    ],
)
def test_what_is_kept_of_a_sum(products, total):
    left = torch.tensor([products], dtype=torch.float64)
    assert torch.equal(left, left.bfloat16().double())  # they are factors as well, of 1
    assert cut_off_product(left.bfloat16(), torch.ones_like(left, dtype=torch.bfloat16)).item() == total


def test_rows_and_columns_are_where_a_product_has_them():
    left, right = draw(21, 40, torch.bfloat16)
    torch.testing.assert_close(cut_off_product(left, right), left.double() @ right.double().T, rtol=0, atol=2e-7)


@pytest.mark.parametrize(("form", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_bounds_of_rows_of_16_bits_leave_room_for_the_cut(form, dtype):
    exact, cut = errors(768, form, dtype, B=1024, anchors=16)
    assert exact == 0
    assert OUTPUTS[torch.float32] / 4 < cut < OUTPUTS[dtype]


def test_split_adds_small_products_first():
    exact, cut = errors(512, "split", torch.float32, B=1024, anchors=16)
    _, reverse = errors(512, "split", torch.float32, B=1024, anchors=16, reverse=True)
    assert cut < 1.5 * exact
    assert cut < SPLIT < reverse
