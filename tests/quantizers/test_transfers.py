"""While a network learns, a quantizer neither copies to or from the device nor waits for it."""

import pytest
import torch
from support.quantizers import bitwise_equal, data, every_kind, frozen_on
from support.second_device import second_device, transfers

from spdfq.quantizers import Log2Quantizer, learned_scales


@pytest.mark.parametrize("learned", [False, True])
@every_kind
def test_nothing_is_copied_after_the_first_step(fresh, learned):
    seen = []
    with second_device() as device:
        x = data(fresh).to(device)
        quantizer = frozen_on(x, fresh)
        x.requires_grad_()
        with learned_scales([quantizer] if learned else []):
            for _ in range(3):
                with transfers() as events, torch.no_grad():
                    quantizer.tensors()["scale"].mul_(0.99 if learned else 1.0)
                    with torch.enable_grad():
                        quantizer(x).sum().backward()
                seen.append(dict(events))
    assert seen[1:] == [{}, {}]


def test_a_logarithm_that_was_used_elsewhere_follows_its_model():
    quantizer = frozen_on(torch.rand(5), Log2Quantizer())
    x = torch.rand(50)
    plain = quantizer(x)
    with second_device() as device:
        quantizer.to(device)
        assert bitwise_equal(quantizer(x.to(device)).cpu(), plain)
