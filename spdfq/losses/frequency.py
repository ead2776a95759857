"""Frequency consistency: the logits of an image's high and low frequencies must agree (FDD)."""

from typing import Any

import torch
from attrs import define, field
from einops import rearrange
from torch import Tensor

from spdfq.losses.base import Loss, LossInputs, at_least_float32
from spdfq.registry import losses
from spdfq.runtime.arguments import check_alike, check_number, check_tensor


def frequency_split(images: Tensor, radius: float) -> tuple[Tensor, Tensor]:
    """Split images into low and high frequencies, whose sum is the images.

    Args:
        images: ``[B, C, h, w]``.
        radius: radius of the disc of low frequencies, as a share of the highest frequency along an axis; 0 keeps only
            the mean.

    Returns:
        Low and high frequencies, float32, ``[B, C, h, w]`` each.

    Raises:
        SpdfqError: another shape, or a radius that is no number of at least 0.
    """
    check_tensor("images", images, "B, C, h, w")
    check_number("radius", radius, 0)
    images = at_least_float32(images)
    height, width = images.shape[-2:]
    down = rearrange(torch.fft.fftfreq(height, dtype=torch.float32, device=images.device), "h -> h 1")
    right = torch.fft.rfftfreq(width, dtype=torch.float32, device=images.device)
    inside = 2 * (down.square() + right.square()).sqrt() <= radius  # in cycles per pixel, at most 0.5
    low = torch.fft.irfft2(torch.fft.rfft2(images) * inside, s=(height, width))
    return low, images - low


def frequency_consistency(high: Tensor, low: Tensor) -> Tensor:
    """``KL(high ‖ low)`` between the outputs on the high and on the low frequencies, mean over images.

    Args:
        high: logits ``[B, K]`` of the high frequencies.
        low: logits ``[B, K]`` of the low frequencies.

    Returns:
        A scalar, in nats.

    Raises:
        SpdfqError: another shape.
    """
    check_alike("high", high, "low", low, "B, K")
    high, low = at_least_float32(high).log_softmax(-1), at_least_float32(low).log_softmax(-1)
    return (high.exp() * (high - low)).sum(-1).mean()


def _radii(_: Any, __: Any, value: tuple[float, ...]) -> None:
    if not value or not all(0 < radius < 2**0.5 for radius in value):
        raise ValueError(f"expected numbers above 0 and below 1.41, one for each stage, got {list(value)}")


@losses.register("frequency_consistency")
@define(kw_only=True)
class FrequencyConsistencyLoss(Loss):
    """Divergence of the model's output on high frequencies from its output on low frequencies (FDD, PRCV 2023).

    The teacher sees two more views of each image: its low and its high frequencies. The run is divided into stages of
    equal length, with one radius each. (Nan and Chao, doi 10.1007/978-981-99-8543-2_17.)

    Args:
        weight: factor of this loss (0.5 in FDD).
        radii: radius of the low frequencies in each stage, as a share of the highest frequency along an axis (the paper
            has five stages; its radii are unpublished).
    """

    radii: tuple[float, ...] = field(default=(0.1, 0.2, 0.3, 0.4, 0.5), validator=_radii)

    def __call__(self, inputs: LossInputs) -> Tensor:
        """The loss of a group."""
        forward = self.given(inputs, "forward")
        stage = inputs.iteration * len(self.radii) // inputs.iterations
        logits = forward(torch.cat(frequency_split(inputs.images, self.radii[stage])))
        low, high = logits.chunk(2)
        return frequency_consistency(high, low)
