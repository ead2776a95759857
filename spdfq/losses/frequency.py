"""Frequency consistency: what an image's details say must agree with what its outline says (FDD)."""

from typing import Any

import torch
from attrs import define, field
from torch import Tensor

from spdfq.errors import SpdfqError
from spdfq.losses.base import Loss, LossInputs, at_least_float32
from spdfq.registry import losses


def frequency_split(images: Tensor, radius: float) -> tuple[Tensor, Tensor]:
    """The low and the high frequencies of images; their sum is the images.

    Args:
        images: ``[B, C, h, w]``.
        radius: of the disc of low frequencies, as a share of the highest frequency along an axis; at 0 it is the mean.

    Returns:
        Two tensors ``[B, C, h, w]``.
    """
    images = at_least_float32(images)
    height, width = images.shape[-2:]
    down = torch.fft.fftfreq(height, device=images.device).unsqueeze(-1)
    right = torch.fft.rfftfreq(width, device=images.device)
    inside = 2 * (down.square() + right.square()).sqrt() <= radius  # in cycles per pixel, up to a half along an axis
    low = torch.fft.irfft2(torch.fft.rfft2(images) * inside, s=(height, width))
    return low, images - low


def frequency_consistency(high: Tensor, low: Tensor) -> Tensor:
    """``KL(high ‖ low)`` of what the model says of the high and of the low frequencies, mean over images.

    Args:
        high: logits ``[B, K]`` of the high frequencies.
        low: logits ``[B, K]`` of the low frequencies.

    Returns:
        A scalar, in nats.
    """
    high, low = at_least_float32(high).log_softmax(-1), at_least_float32(low).log_softmax(-1)
    return (high.exp() * (high - low)).sum(-1).mean()


def _radii(_: Any, __: Any, value: tuple[float, ...]) -> None:
    if not value or not all(0 < radius < 2**0.5 for radius in value):
        raise ValueError(f"expected numbers above 0 and below 1.41, one for each stage, got {list(value)}")


@losses.register("frequency_consistency")
@define(kw_only=True)
class FrequencyConsistencyLoss(Loss):
    """Divergence of the model's output on high frequencies from that on low ones (FDD, PRCV 2023).

    It forwards two more views of each image through the teacher: the low and the high frequencies. The iterations are
    shared evenly among stages of one radius each. (Nan and Chao, doi 10.1007/978-981-99-8543-2_17.)

    Args:
        weight: factor of this loss (0.5 in FDD).
        radii: of the low frequencies, as a share of the highest frequency along an axis, for each stage (five stages in
            the paper; the radii are unpublished).
    """

    radii: tuple[float, ...] = field(default=(0.1, 0.2, 0.3, 0.4, 0.5), validator=_radii)

    def __call__(self, inputs: LossInputs) -> Tensor:
        """The loss of a group."""
        if inputs.forward is None:
            raise SpdfqError("frequency_consistency: LossInputs.forward is missing; give the teacher's forward pass")
        stage = inputs.iteration * len(self.radii) // inputs.iterations
        logits = inputs.forward(torch.cat(frequency_split(inputs.images, self.radii[stage])))
        low, high = logits.chunk(2)
        return frequency_consistency(high, low)
