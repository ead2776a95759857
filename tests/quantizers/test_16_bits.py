"""16 bits: only uniform quantizers have them, for activations; their codes and zero points need more than a byte."""

import attrs
import pytest
import torch
from support.quantizers import OBSERVERS, QUANTIZERS, bitwise_equal, frozen_on, tensor
from support.registered import made

from spdfq.errors import ComponentError, DataError
from spdfq.quantizers import UniformQuantizer
from spdfq.quantizers.packing import pack

WIDE = UniformQuantizer(bits=16)
SYMMETRIC = UniformQuantizer(bits=16, symmetric=True)
CHANNELS = UniformQuantizer(bits=16, granularity="channel", axis=-1)


def values(rows=500):
    return torch.randn(rows, 6, generator=torch.Generator().manual_seed(0)) + 0.5


def test_the_step_and_the_zero_point_are_those_of_65536_codes():
    quantizer = frozen_on(tensor([-1.0, 3.0]), WIDE)
    assert quantizer.levels == 65536
    assert float(quantizer.scale) == pytest.approx(4 / 65535)
    assert (int(quantizer.zero_point), quantizer.zero_point.dtype) == (16384, torch.int32)
    assert quantizer.codes(tensor([-5.0, -1.0, 0.0, 3.0, 5.0])).tolist() == [0, 0, 16384, 65535, 65535]
    assert quantizer.codes(tensor([0.0])).dtype == torch.int32
    middle = frozen_on(tensor([-1.0, 3.0]), SYMMETRIC)
    assert int(middle.zero_point) == 32768
    assert float(middle.scale) == pytest.approx(3 / 32767)
    assert middle.codes(tensor([-3.0, 3.0])).tolist() == [1, 65535]


@pytest.mark.parametrize("quantizer", [WIDE, SYMMETRIC, CHANNELS], ids=["tensor", "symmetric", "channel"])
def test_the_error_is_at_most_half_a_step(quantizer):
    x = values()
    quantizer = frozen_on(x, quantizer)
    assert bool(((quantizer(x) - x).abs() <= 0.501 * quantizer.scale).all())


@pytest.mark.parametrize("quantizer", [WIDE, SYMMETRIC, CHANNELS], ids=["tensor", "symmetric", "channel"])
def test_stored_tensors_give_the_same_quantizer(quantizer):
    x = values()
    first, again = frozen_on(x, quantizer), attrs.evolve(quantizer)
    again.restore({name: stored.clone() for name, stored in first.tensors().items()})
    assert bitwise_equal(again(3 * x), first(3 * x))
    assert torch.equal(again.codes(x), first.codes(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_table_of_two_byte_floats_gives_what_the_formula_gives(dtype):
    quantizer = frozen_on(values(), WIDE)
    x = torch.randn(600, 1000, generator=torch.Generator().manual_seed(1)).to(dtype)
    leaf, parts = x.clone().requires_grad_(), x.clone().requires_grad_()
    whole, pieces = quantizer(leaf), torch.cat([quantizer(part) for part in parts.split(50)])
    assert torch.equal(whole, pieces)
    whole.sum().backward()
    pieces.sum().backward()
    assert torch.equal(leaf.grad, parts.grad)


@pytest.mark.parametrize("name", OBSERVERS)
@pytest.mark.parametrize("quantizer", [WIDE, CHANNELS], ids=["tensor", "channel"])
def test_every_observer_finds_a_range(name, quantizer):
    x = values(4000)
    quantizer = frozen_on(x, quantizer, made("observer", name))
    assert float((quantizer(x) - x).square().mean()) < 1e-3


def test_a_stored_zero_point_of_another_type_or_beyond_the_codes_is_refused():
    scale = torch.tensor(1.0)
    with pytest.raises(DataError, match=r"stored zero_point must be torch.int32 of 0 dimensions, not torch.uint8"):
        attrs.evolve(WIDE).restore({"scale": scale, "zero_point": torch.tensor(3, dtype=torch.uint8)})
    with pytest.raises(DataError, match=r"stored zero_point must be torch.uint8 of 0 dimensions, not torch.int32"):
        UniformQuantizer(bits=8).restore({"scale": scale, "zero_point": torch.tensor(3, dtype=torch.int32)})
    for number in (-1, 65536):
        with pytest.raises(DataError, match=r"stored zero_point must lie in 0 to 65535 at 16 bits"):
            attrs.evolve(WIDE).restore({"scale": scale, "zero_point": torch.tensor(number, dtype=torch.int32)})


@pytest.mark.parametrize("bits", [-16, 0, 1, 9, 10, 12, 15, 17, 24, 32])
def test_other_widths_are_refused(bits):
    with pytest.raises(ComponentError, match=f"bits must be a whole number from 2 to 8, or 16 .*, not {bits}$"):
        UniformQuantizer(bits=bits)


@pytest.mark.parametrize("name", sorted(set(QUANTIZERS) - {"uniform"}))
def test_other_quantizers_do_not_have_16_bits(name):
    with pytest.raises(ComponentError) as raised:
        QUANTIZERS[name](bits=16)
    wanted = "bits must be a whole number from 2 to 8, not 16; only the quantizer 'uniform' takes 16"
    assert str(raised.value) == f"{QUANTIZERS[name].__name__}.bits: {wanted}"


def test_codes_of_16_bits_are_not_packed():
    with pytest.raises(DataError, match="codes are packed at 1 to 8 bits, not 16"):
        pack(frozen_on(values(), WIDE).codes(values()), 16)
