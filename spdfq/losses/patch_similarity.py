"""Patch similarity entropy (PSE): the diversity of the similarities between tokens (PSAQ-ViT)."""

import math
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from attrs import define
from einops import rearrange
from torch import Tensor

from spdfq.attention import ATTENTION_OUTPUTS
from spdfq.errors import SpdfqError
from spdfq.losses.base import Loss, LossInputs, at_least_float32
from spdfq.losses.chunks import row_chunks
from spdfq.registry import losses
from spdfq.runtime.arguments import check_tensor

_BANDWIDTH = 0.01
_POINTS = 10
_FLOOR = 1e-4
# e^-80 is negligible beside the floor; smaller results are subnormal, and computing them is slow
_FAR = -80.0


def patch_similarity_entropy(features: Tensor, images: int | None = None) -> Tensor:
    """Differential entropy of the cosine similarities of all token pairs, mean over images (arXiv 2203.02250).

    A Gaussian kernel density (bandwidth 0.01) is evaluated at 10 points, evenly spaced over the batch's range of
    similarities. The points have no gradient. After 1e-4 is added, ``−∫p log p`` is integrated by the trapezoid rule.
    The gradient computes the similarities again, so no tensor of the size of all pairs is kept for it.

    Args:
        features: ``[B, n, d]``, mean over heads, without the class token; ``[B*windows, n, d]``, image by image, for
            windowed attention.
        images: B; needed for windowed attention. The pairs inside all windows of an image make its density.

    Returns:
        A scalar, in nats.

    Raises:
        SpdfqError: another shape, or the number of windows is not a multiple of the number of images.
    """
    check_tensor("features", features, "B, n, d")
    images = len(features) if images is None else images
    if images < 1 or len(features) % images:
        raise SpdfqError(f"{len(features)} windows cannot belong to {images} images; fold windows into the batch")
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
    """Cosine similarities of all token pairs within each window, computed in chunks of query rows.

    Args:
        unit: ``[B*windows, n, d]`` vectors of length 1.
        images: B.
    """

    def __init__(self, unit: Tensor, images: int) -> None:
        self.unit, self.images = unit, images
        windows, self.tokens, _ = unit.shape
        self.windows = windows // images
        self.chunks = list(row_chunks(self.tokens, windows * self.tokens, unit.device))
        pairs = windows * self.tokens**2 / images
        self.height = 1 / (_BANDWIDTH * math.sqrt(2 * math.pi) * pairs)

    def of(self, rows: slice) -> Tensor:
        """``[B, pairs]``: the similarities of some query rows."""
        products = self.unit[:, rows] @ self.unit.mT
        return rearrange(products, "(b windows) q k -> b (windows q k)", b=self.images)

    def points(self) -> Tensor:
        """``[points]`` at which the density is evaluated."""
        ends = torch.stack([torch.stack(self.of(rows).aminmax()) for rows in self.chunks])
        low, high = ends[:, 0].min(), ends[:, 1].max()
        return torch.linspace(0, 1, _POINTS, device=ends.device, dtype=ends.dtype) * (high - low) + low

    def density(self, points: Tensor) -> Tensor:
        """``[B, points]`` density of the similarities of each image."""
        density = self.unit.new_zeros(self.images, len(points))
        for rows in self.chunks:
            similarity = self.of(rows)
            for index, point in enumerate(points):
                density[:, index] += _kernel(similarity - point).sum(-1)
        return density * self.height

    def gradient(self, points: Tensor, by_density: Tensor) -> Tensor:
        """The gradient with respect to the unit vectors, from that with respect to the density ``[B, points]``."""
        gradient = torch.empty_like(self.unit)
        by_kernel = by_density * (-self.height / _BANDWIDTH**2)
        for rows in self.chunks:
            similarity = self.of(rows)
            by_pair = torch.zeros_like(similarity)
            for index, point in enumerate(points):
                distance = similarity - point
                by_pair.addcmul_(_kernel(distance.clone()).mul_(distance), by_kernel[:, index, None])
            by_pair = rearrange(by_pair, "b (windows q k) -> (b windows) q k", windows=self.windows, k=self.tokens)
            # a token takes part in a pair as a query and as a key, with the same gradient
            gradient[:, rows] = 2 * by_pair @ self.unit
        return gradient


def _kernel(distance: Tensor) -> Tensor:
    """``exp(−d²/2σ²)``, in place."""
    return distance.square_().mul_(-0.5 / _BANDWIDTH**2).clamp_(min=_FAR).exp_()


@losses.register("patch_similarity_entropy", paper="arXiv:2203.02250")
@define(kw_only=True)
class PatchSimilarityEntropyLoss(Loss):
    """Negative patch similarity entropy of attention outputs, summed over blocks: makes patches more diverse.

    In windowed attention, the pairs inside all windows of an image make its density.

    Args:
        weight: factor of this loss.
        faithful: drop the first token even if it is not a class token, as the public code does on Swin (the paper drops
            the class token).
    """

    needs: ClassVar[frozenset[str]] = frozenset({ATTENTION_OUTPUTS})

    faithful: bool = False

    def __call__(self, inputs: LossInputs) -> Tensor:
        """The loss of a group."""
        record = self.recorded(inputs)
        dropped = max(record.prefix, int(self.faithful))
        merged = [outputs.float().mean(1)[:, dropped:] for outputs in record.attention_outputs]
        return -torch.stack([patch_similarity_entropy(features, len(inputs.images)) for features in merged]).sum()
