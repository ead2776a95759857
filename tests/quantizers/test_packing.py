"""Packed codes: exact round trips, exact sizes, the documented bit order, and refusals."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spdfq.errors import DataError
from spdfq.quantizers.packing import pack, unpack


@settings(deadline=None, max_examples=30)
@given(st.data(), st.integers(1, 8), st.lists(st.integers(0, 5), max_size=3))
def test_codes_survive_at_exactly_their_width(data, bits, shape):
    count = torch.Size(shape).numel()
    values = data.draw(st.lists(st.integers(0, 2**bits - 1), min_size=count, max_size=count))
    codes = torch.tensor(values, dtype=torch.uint8).reshape(shape)
    packed = pack(codes, bits)
    assert packed.dtype == torch.uint8
    assert list(packed.shape) == [(count * bits + 7) // 8]
    back = unpack(packed, bits, shape)
    assert back.dtype == torch.uint8
    assert torch.equal(back, codes)


@pytest.mark.parametrize(
    ("codes", "bits", "expected"),
    [
        ([0x1, 0x2, 0x3, 0x4], 4, [0x21, 0x43]),
        ([1, 0, 1, 1, 0, 0, 0, 0, 1], 1, [0b00001101, 0b1]),
        ([5, 6, 7], 3, [0b11_110_101, 0b1]),  # 101, then 110, then the low two of 111; its high bit opens byte two
        ([200, 7], 8, [200, 7]),
    ],
)
def test_first_code_lies_in_the_lowest_bits(codes, bits, expected):
    packed = pack(torch.tensor(codes, dtype=torch.uint8), bits)
    assert packed.tolist() == expected
    assert unpack(packed, bits, [len(codes)]).tolist() == codes


def test_a_strided_tensor_packs_in_its_logical_order():
    codes = torch.arange(12, dtype=torch.uint8).reshape(3, 4).T
    assert torch.equal(unpack(pack(codes, 4), 4, (4, 3)), codes)


@pytest.mark.parametrize("length", [1, 3])
def test_a_length_that_does_not_fit_is_refused(length):
    with pytest.raises(DataError, match="2 bytes"):
        unpack(torch.zeros(length, dtype=torch.uint8), 4, (2, 2))


def test_packed_must_be_flat_bytes():
    with pytest.raises(DataError):
        unpack(torch.zeros(2, dtype=torch.int32), 4, (4,))
    with pytest.raises(DataError):
        unpack(torch.zeros(1, 2, dtype=torch.uint8), 4, (4,))


def test_codes_too_large_or_of_another_type_are_refused():
    with pytest.raises(DataError, match="below 16"):
        pack(torch.tensor([16], dtype=torch.uint8), 4)
    with pytest.raises(DataError, match="int64"):
        pack(torch.tensor([1]), 4)


@pytest.mark.parametrize("bits", [0, 9])
def test_bits_out_of_range_are_refused(bits):
    codes = torch.zeros(1, dtype=torch.uint8)
    with pytest.raises(DataError, match="1 to 8"):
        pack(codes, bits)
    with pytest.raises(DataError, match="1 to 8"):
        unpack(codes, bits, (1,))
