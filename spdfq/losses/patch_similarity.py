"""Patch similarity entropy (PSE): the diversity of the similarities between tokens (PSAQ-ViT)."""

import math
from collections.abc import Iterator
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from attrs import define
from einops import rearrange, repeat
from torch import Tensor

from spdfq.attention import ATTENTION_OUTPUTS
from spdfq.errors import SpdfqError
from spdfq.losses.base import Loss, LossInputs, at_least_float32
from spdfq.losses.chunks import chunk_length
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
    return _entropies(features.unsqueeze(0), images).sum()


def _entropies(features: Tensor, images: int) -> Tensor:
    """`patch_similarity_entropy` of several blocks of the same shape at once, ``[l]``.

    Args:
        features: ``[l, B*windows, n, d]``.
        images: B.
    """
    entropies: Tensor = _PairEntropy.apply(F.normalize(at_least_float32(features), dim=-1), images)
    return entropies


class _PairEntropy(torch.autograd.Function):
    """Entropies of the products of all pairs of unit vectors, one for each block; a few windows or rows at a time."""

    @staticmethod
    def forward(ctx: Any, unit: Tensor, images: int) -> Tensor:
        similarities = _Similarities(unit, images)
        points = similarities.points()
        density = similarities.density(points) + _FLOOR
        widths = points.diff() / 2
        trapezoid = (F.pad(widths, (0, 1)) + F.pad(widths, (1, 0))).unsqueeze(1) / images
        ctx.save_for_backward(unit, points, -(density.log() + 1) * trapezoid)
        return -(density * density.log() * trapezoid).sum((1, 2))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        unit, points, by_density = ctx.saved_tensors
        by_density = by_density * gradient.view(-1, 1, 1)
        return _Similarities(unit, by_density.shape[1]).gradient(points, by_density), None


class _Similarities:
    """Cosine similarities of all token pairs within each window, computed in chunks of windows or of query rows.

    Args:
        unit: ``[l, B*windows, n, d]`` vectors of length 1; the similarities of a block share a range.
        images: B.
    """

    def __init__(self, unit: Tensor, images: int) -> None:
        self.blocks, windows, self.tokens, _ = unit.shape
        self.unit, self.images, self.windows = unit.flatten(0, 1), images, windows // images
        row = self.tokens * _POINTS
        self.together = chunk_length(self.tokens * row, unit.device)
        self.rows = min(self.tokens, chunk_length(row, unit.device))
        self.height = 1 / (_BANDWIDTH * math.sqrt(2 * math.pi) * self.windows * self.tokens**2)

    def chunks(self, *of_windows: Tensor) -> Iterator[tuple[Tensor, ...]]:
        """Similarities ``[windows, 1, pairs]``, keys ``[windows, n, d]``, and the entries of the same windows."""
        for keys, *entries in zip(*(x.split(self.together) for x in (self.unit, *of_windows)), strict=True):
            for queries in keys.split(self.rows, dim=1):
                yield (queries @ keys.mT).flatten(1).unsqueeze(1), keys, *entries

    def points(self) -> Tensor:
        """``[l, points]`` at which the densities of a block are evaluated."""
        ends = torch.cat([torch.cat(similarity.aminmax(dim=-1), 1) for similarity, _ in self.chunks()])
        low, high = ends.view(self.blocks, -1, 2).unbind(-1)
        low, high = low.amin(1, keepdim=True), high.amax(1, keepdim=True)
        return torch.linspace(0, 1, _POINTS, device=low.device, dtype=low.dtype) * (high - low) + low

    def density(self, points: Tensor) -> Tensor:
        """``[l, B, points]`` density of the similarities of each image."""
        chunks = self.chunks(self._at(points))
        kernels = torch.cat([_kernel(similarity - at).sum(-1) for similarity, _, at in chunks])
        kernels = rearrange(kernels, "(l b pairs) points -> l b pairs points", l=self.blocks, b=self.images)
        return kernels.sum(2) * self.height

    def gradient(self, points: Tensor, by_density: Tensor) -> Tensor:
        """The gradient with respect to the unit vectors, from that with respect to the density ``[l, B, points]``."""
        # a token takes part in a pair as a query and as a key, with the same gradient
        factors = by_density * (-2 * self.height / _BANDWIDTH**2)
        factors = repeat(factors, "l b points -> (l b windows) 1 points", windows=self.windows)
        parts = []
        for similarity, keys, at, factor in self.chunks(self._at(points), factors):
            distance = similarity - at
            by_pair = factor @ _kernel(distance.clone()).mul_(distance)
            parts.append((by_pair.view(len(keys), -1, self.tokens) @ keys).flatten(0, 1))
        return rearrange(torch.cat(parts), "(l windows n) d -> l windows n d", l=self.blocks, n=self.tokens)

    def _at(self, points: Tensor) -> Tensor:
        """``[l*B*windows, points, 1]``: the points of each window's block."""
        return repeat(points, "l points -> (l windows) points 1", windows=self.images * self.windows)


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
        alike: dict[torch.Size, list[Tensor]] = {}
        for outputs in record.attention_outputs:
            alike.setdefault(outputs.shape, []).append(outputs.mean(1, dtype=torch.float32))
        stacked = (torch.stack(blocks)[:, :, dropped:] for blocks in alike.values())
        return -torch.cat([_entropies(features, len(inputs.images)) for features in stacked]).sum()
