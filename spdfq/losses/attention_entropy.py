"""Attention entropy: how differently the tokens of an image attend (MaskAQ)."""

import math
from typing import ClassVar

import torch
import torch.nn.functional as F
from attrs import define, field, validators
from einops import rearrange
from torch import Tensor

from spdfq.attention import QUERIES_AND_KEYS
from spdfq.losses.base import Loss, LossInputs, at_least_float32
from spdfq.registry import losses
from spdfq.runtime.arguments import check_tensor

_FLOOR = 1e-8


def attention_entropy(rows: Tensor) -> Tensor:
    """Entropy of a Gaussian with the variance of the rows' cosine similarities, mean over images (arXiv 2606.04373).

    ``½ log(2πe (var + 1e-8))`` over all pairs of rows, including each row with itself.

    Args:
        rows: ``[B, R, K]``: R attention rows of each image.

    Returns:
        A scalar, in nats.

    Raises:
        SpdfqError: another shape.
    """
    check_tensor("rows", rows, "B, R, K")
    unit = F.normalize(at_least_float32(rows), dim=-1)
    variance = rearrange(unit @ unit.mT, "b q k -> b (q k)").var(-1, correction=0)
    return 0.5 * (math.log(2 * math.pi * math.e) + (variance + _FLOOR).log()).mean()


@losses.register("attention_entropy", paper="arXiv:2606.04373")
@define(kw_only=True)
class AttentionEntropyLoss(Loss):
    """Negative Gaussian entropy of the similarities of attention rows, mean over blocks.

    The rows are raw scores of patch tokens over patch tokens, mean over heads. Each window counts as an image.
    Minimising it makes tokens attend differently.

    Args:
        weight: factor of this loss.
        rows: how many random rows are compared; drawn in each iteration, and the same for all images of the group.
    """

    needs: ClassVar[frozenset[str]] = frozenset({QUERIES_AND_KEYS})

    rows: int = field(default=64, validator=validators.ge(2))

    def __call__(self, inputs: LossInputs) -> Tensor:
        """The loss of a group."""
        self.given(inputs, "draws")
        blocks = range(len(self.recorded(inputs).queries))
        return -torch.stack([attention_entropy(self._rows(inputs, block)) for block in blocks]).mean()

    def _rows(self, inputs: LossInputs, block: int) -> Tensor:
        """``[B, R, K]``. Up to a factor, the mean over heads is one product of the concatenated heads."""
        record = inputs.attention
        query, key = record.queries[block][:, :, record.prefix :], record.keys[block][:, :, record.prefix :]
        chosen = query[:, :, inputs.each(("rows", block), _some_rows, query.shape[-2], self.rows)]
        return _concatenated(chosen) @ _concatenated(key).mT


def _some_rows(generator: torch.Generator, _: int, tokens: int, rows: int) -> Tensor:
    return torch.randperm(tokens, generator=generator, device="cpu")[:rows]


def _concatenated(x: Tensor) -> Tensor:
    return rearrange(x.float(), "b heads n d -> b n (heads d)")
