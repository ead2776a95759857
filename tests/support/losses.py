"""Random numbers and records of tiny models, for the tests of losses."""

import pytest
import torch

from spdfq.attention import record_attention
from spdfq.losses import LossInputs
from spdfq.runtime import Draws
from support.networks import build


def random(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def exactly(x):
    return pytest.approx(x, rel=1e-5)


def recorded(name, images, needs):
    """The loss inputs from a tiny model, with gradients to the images."""
    model = build(name).requires_grad_(False)
    with record_attention(model, needs) as record:
        logits = model(images)
    return LossInputs(images=images, logits=logits, attention=record, draws=Draws())


def pictures(count=3, seed=0):
    return random(count, 3, 32, 32, seed=seed)
