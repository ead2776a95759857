"""Patch similarity entropy (PSE): the diversity of token similarities, the objective of PSAQ-ViT."""

import math
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from attrs import define
from torch import Tensor

from spdfq.attention import ATTENTION_OUTPUTS
from spdfq.errors import SpdfqError
from spdfq.losses.base import Loss, LossInputs, at_least_float32
from spdfq.losses.chunks import row_chunks
from spdfq.registry import losses

_BANDWIDTH = 0.01
_POINTS = 10
_FLOOR = 1e-4
# e^-80 is nothing beside the floor, and spares the exponential its slow path of results that round to zero
_FAR = -80.0


def patch_similarity_entropy(features: Tensor, images: int | None = None) -> Tensor:
    """Differential entropy of the cosine similarities of all token pairs, mean over images (arXiv 2203.02250).

    A Gaussian kernel density (bandwidth 0.01) is evaluated at 10 points spread over the batch's range of similarities
    (taken as given: no gradient), 1e-4 is added, and ``−∫p log p`` taken by the trapezoid rule. No tensor of the size
    of all pairs is kept for the gradient, which computes the similarities again.

    Args:
        features: ``[B, N, D]``, heads already merged, class token dropped; ``[B n, N, D]``, image by image, where each
            image has n windows.
        images: B, where there are windows: the density of an image is that of the pairs inside all its windows.

    Returns:
        A scalar, in nats.

    Raises:
        SpdfqError: the windows are no multiple of the images.
    """
    images = len(features) if images is None else images
    if images < 1 or len(features) % images:
        raise SpdfqError(f"{len(features)} windows cannot be those of {images} images; fold windows into the batch")
    unit = F.normalize(at_least_float32(features), dim=-1)
    return _PairEntropy.apply(unit, images)


class _PairEntropy(torch.autograd.Function):
    """Entropy of the products of all pairs of unit vectors, a few query rows at a time."""

    @staticmethod
    def forward(ctx: Any, unit: Tensor, images: int) -> Tensor:
        similarities = _Similarities(unit, images)
        points = similarities.points()
        density = similarities.density(points) + _FLOOR
        widths = points.diff() / 2
        trapezoid = F.pad(widths, (0, 1)) + F.pad(widths, (1, 0))
        ctx.save_for_backward(unit, points, -(density.log() + 1) * trapezoid / images)
        return -(density * density.log() * trapezoid).sum() / images

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        unit, points, by_density = ctx.saved_tensors
        return _Similarities(unit, len(by_density)).gradient(points, by_density * gradient), None


class _Similarities:
    """Cosine similarities of the tokens ``[B n, N, D]`` of each window, never all of them at once."""

    def __init__(self, unit: Tensor, images: int) -> None:
        self.unit, self.images = unit, images
        windows, self.tokens, _ = unit.shape
        self.chunks = list(row_chunks(self.tokens, windows * self.tokens, unit.device))
        pairs = windows * self.tokens**2 / images
        self.height = 1 / (_BANDWIDTH * math.sqrt(2 * math.pi) * pairs)

    def of(self, rows: slice) -> Tensor:
        """``[B, pairs]`` of some query rows."""
        return (self.unit[:, rows] @ self.unit.mT).reshape(self.images, -1)

    def points(self) -> Tensor:
        """Where the density is evaluated."""
        ends = torch.stack([torch.stack(self.of(rows).aminmax()) for rows in self.chunks])
        low, high = ends[:, 0].min(), ends[:, 1].max()
        return torch.linspace(0, 1, _POINTS, device=ends.device, dtype=ends.dtype) * (high - low) + low

    def density(self, points: Tensor) -> Tensor:
        """``[B, points]``."""
        density = self.unit.new_zeros(self.images, len(points))
        for rows in self.chunks:
            similarity = self.of(rows)
            for index, point in enumerate(points):
                density[:, index] += _kernel(similarity - point).sum(-1)
        return density * self.height

    def gradient(self, points: Tensor, by_density: Tensor) -> Tensor:
        """With respect to the unit vectors, from that with respect to the density ``[B, points]``."""
        gradient = torch.empty_like(self.unit)
        by_kernel = by_density * (-self.height / _BANDWIDTH**2)
        for rows in self.chunks:
            similarity = self.of(rows)
            by_pair = torch.zeros_like(similarity)
            for index, point in enumerate(points):
                distance = similarity - point
                by_pair.addcmul_(_kernel(distance.clone()).mul_(distance), by_kernel[:, index, None])
            # each pair stands in two places, and so on both sides of the product
            gradient[:, rows] = 2 * by_pair.view(len(self.unit), -1, self.tokens) @ self.unit
        return gradient


def _kernel(distance: Tensor) -> Tensor:
    """``exp(−d²/2σ²)``, in place."""
    return distance.square_().mul_(-0.5 / _BANDWIDTH**2).clamp_(min=_FAR).exp_()


@losses.register("patch_similarity_entropy", paper="arXiv:2203.02250")
@define(kw_only=True)
class PatchSimilarityEntropyLoss(Loss):
    """Negative patch similarity entropy of attention outputs, summed over blocks: minimising it diversifies patches.

    Of windowed attention the pairs inside each window count, and an image's density is that of all its windows.

    Args:
        weight: factor of this loss.
        faithful: drop the first token also where it is no class token, as the public code does on Swin (the paper drops
            the class token).
    """

    needs: ClassVar[frozenset[str]] = frozenset({ATTENTION_OUTPUTS})

    faithful: bool = False

    def __call__(self, inputs: LossInputs) -> Tensor:
        """The loss of a group."""
        dropped = max(inputs.attention.prefix, int(self.faithful))
        merged = [outputs.float().mean(1)[:, dropped:] for outputs in inputs.attention.attention_outputs]
        return -torch.stack([patch_similarity_entropy(features, len(inputs.images)) for features in merged]).sum()
