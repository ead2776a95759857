"""The images of each optimiser step."""

import torch
from support.backends import RUNTIME, images
from support.second_device import second_device, transfers

from spdfq.backends import Calibration
from spdfq.backends.learning.batches import batch_rows

COUNT, BATCH = 5, 2


def orders(*purpose):
    """The orders of the first two epochs."""
    return [torch.randperm(COUNT, generator=RUNTIME.generator(*purpose, epoch)) for epoch in range(2)]


def test_the_order_of_an_epoch_is_copied_to_the_device_once():
    rows, seen = [], []
    with second_device() as device:
        calibration = Calibration(teacher=None, images=images(COUNT).to(device), runtime=RUNTIME)
        for iteration in range(6):
            with transfers() as events:
                chosen = batch_rows(calibration, BATCH, iteration, "copied once")
            assert chosen.device == calibration.images.device
            rows.append(chosen.cpu())
            seen.append(dict(events))
    copied = {"copy to the device": 1}
    assert seen == [copied, {}, {}, copied, {}, {}]
    assert torch.equal(torch.cat(rows), torch.cat(orders("copied once")))


def test_steps_of_two_purposes_may_alternate():
    calibration = Calibration(teacher=None, images=images(COUNT), runtime=RUNTIME)
    rows = [[batch_rows(calibration, BATCH, step, "block", index) for index in (0, 1)] for step in range(6)]
    for index, found in enumerate(zip(*rows, strict=True)):
        assert torch.equal(torch.cat(found), torch.cat(orders("block", index)))
    assert not torch.equal(*orders("block", 0))
