"""Patch similarity entropy (PSE): the diversity of token similarities, the objective of PSAQ-ViT."""

import math
from typing import ClassVar

import torch
import torch.nn.functional as F
from attrs import define
from torch import Tensor

from spdfq.attention import ATTENTION_OUTPUTS
from spdfq.losses.base import Loss, LossInputs, at_least_float32
from spdfq.registry import losses

_BANDWIDTH = 0.01
_POINTS = 10
_FLOOR = 1e-4


def patch_similarity_entropy(features: Tensor) -> Tensor:
    """Differential entropy of the cosine similarities of all token pairs, mean over images (arXiv 2203.02250).

    A Gaussian kernel density (bandwidth 0.01) is evaluated at 10 points spread over the batch's range of similarities,
    1e-4 is added, and ``−∫p log p`` taken by the trapezoid rule.

    Args:
        features: ``[B, N, D]``, heads already merged, class token dropped.

    Returns:
        A scalar, in nats.
    """
    unit = F.normalize(at_least_float32(features), dim=-1)
    similarity = (unit @ unit.mT).flatten(1)
    low, high = similarity.detach().aminmax()
    points = torch.linspace(0, 1, _POINTS, device=unit.device, dtype=unit.dtype) * (high - low) + low
    norm = 1 / (_BANDWIDTH * math.sqrt(2 * math.pi))
    # one point at a time: the [B, 10, N²] tensor of a single broadcast is what makes the public code slow
    density = [norm * (-0.5 * ((point - similarity) / _BANDWIDTH).square()).exp().mean(-1) for point in points]
    p = torch.stack(density, -1) + _FLOOR
    return torch.trapezoid(-p * p.log(), points, dim=-1).mean()


@losses.register("patch_similarity_entropy", paper="arXiv:2203.02250")
@define(kw_only=True)
class PatchSimilarityEntropyLoss(Loss):
    """Negative patch similarity entropy of attention outputs, summed over blocks: minimising it diversifies patches.

    Args:
        weight: factor of this loss.
    """

    needs: ClassVar[frozenset[str]] = frozenset({ATTENTION_OUTPUTS})

    def __call__(self, inputs: LossInputs) -> Tensor:
        """The loss of a group."""
        prefix = inputs.attention.prefix
        merged = [outputs.float().mean(1)[:, prefix:] for outputs in inputs.attention.attention_outputs]
        return -torch.stack([patch_similarity_entropy(features) for features in merged]).sum()
