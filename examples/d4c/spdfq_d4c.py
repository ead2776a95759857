"""D4C's contrast of foreground and background (arXiv 2511.15411) as a loss, for image classifiers."""

from typing import Any

import torch
from attrs import define, field, validators
from torch import Tensor
from torch.nn import functional as F

from spdfq.losses import Loss, LossInputs
from spdfq.registry import losses
from spdfq.synth import CropPlan


def directions(logits: Tensor) -> Tensor:
    """Logits `[..., K]`, centred over the classes and of length 1: their scalar products are cosines."""
    return F.normalize(logits - logits.mean(dim=-1, keepdim=True), dim=-1)


def foreground_contrast(foreground: Tensor, background: Tensor, classes: Tensor, temperature: float = 0.1) -> Tensor:
    """InfoNCE of foregrounds: the class of each is the positive, other classes and all backgrounds are negatives.

    D4C compares CLIP's image embeddings with its text embeddings of the classes. A classifier has no text encoder, so
    logits take the place of embeddings, and class k is the direction in which logit k alone rises.

    Args:
        foreground: logits `[B, K]` of the foregrounds.
        background: logits `[B, K]` of the backgrounds.
        classes: `[B]`, of the foregrounds.
        temperature: divides the cosines.

    Returns:
        A scalar, the mean over the foregrounds.
    """
    prototypes = torch.eye(foreground.shape[-1], device=foreground.device)
    candidates = torch.cat([directions(prototypes), directions(background)])
    return F.cross_entropy(directions(foreground) @ candidates.T / temperature, classes)


@losses.register("foreground_contrast", paper="arXiv:2511.15411")
@define(kw_only=True)
class ForegroundContrastLoss(Loss):
    """D4C's structural contrast: the foreground shows its class and resembles no background.

    The foreground is a box of the image, drawn once and resized to the input. The background is the image with the
    box blanked out, plus noise. Both are taken from the image before augmentations.

    Args:
        weight: factor of this loss.
        area: smallest and largest area of the box, as a share of the image (values of the public code).
        temperature: of the contrast (value of the public code).
        noise: standard deviation of the noise on the background, in normalised pixel units (value of the public code).
    """

    area: tuple[float, float] = field(default=(0.4, 0.7))
    temperature: float = field(default=0.1, validator=validators.gt(0.0))
    noise: float = field(default=0.1, validator=validators.ge(0.0))

    @area.validator
    def _check_area(self, attribute: Any, value: tuple[float, float]) -> None:
        if not 0 < value[0] <= value[1] < 1:
            raise ValueError(f"expected 0 < smallest <= largest < 1, got {value}")

    def __call__(self, inputs: LossInputs) -> Tensor:
        """The contrast of a group of images."""
        images = self.given(inputs, "originals")
        count, _, height, width = images.shape
        classes = self.given(inputs, "labels")[:count].int().argmax(dim=-1)
        plan = inputs.keep("boxes", lambda: self.boxes(count, (height, width), inputs.generator("boxes")))
        foreground = plan.views(images, (height, width))
        noise = torch.randn(images.shape, generator=inputs.generator("noise", inputs.iteration)).to(images)
        background = images * outside(plan, images) + self.noise * noise
        logits = self.given(inputs, "forward")(torch.cat([foreground, background]))
        return foreground_contrast(logits[:count], logits[count:], classes, self.temperature)

    def boxes(self, count: int, size: tuple[int, int], generator: torch.Generator) -> CropPlan:
        """One box for each image, with the aspect ratio of the image, at a random place."""
        smallest, largest = self.area
        area = smallest + (largest - smallest) * torch.rand(count, generator=generator)
        sides = torch.tensor(size)
        box = (area[:, None].sqrt() * sides).round().long().clamp(min=1)
        corner = (torch.rand(count, 2, generator=generator) * (sides - box + 1)).long()
        labels = torch.zeros(count, dtype=torch.long)
        return CropPlan(boxes=torch.cat([corner, box], dim=1), owners=torch.arange(count), labels=labels)


@losses.register("mean_squared_variation", paper="arXiv:2511.15411")
@define(kw_only=True)
class MeanSquaredVariationLoss(Loss):
    """D4C's total variation: the mean of squared differences of neighbouring pixels, down plus across.

    Args:
        weight: factor of this loss (0.1 in the public code).
    """

    def __call__(self, inputs: LossInputs) -> Tensor:
        """The variation of a group of images."""
        images = self.given(inputs, "originals")
        return images.diff(dim=-1).square().mean() + images.diff(dim=-2).square().mean()


def outside(plan: CropPlan, images: Tensor) -> Tensor:
    """`[B, 1, H, W]`: 0 in the box of each image, 1 elsewhere."""
    mask = torch.ones_like(images[:, :1])
    for image, (top, left, height, width) in zip(mask, plan.boxes.tolist(), strict=True):
        image[:, top : top + height, left : left + width] = 0
    return mask
