"""Optimisers of the pixels, and schedules of their learning rate."""

import math
from typing import Any

import torch
from attrs import field, frozen, validators
from torch import Tensor

from spdfq.registry import optimizers, schedules


def _betas(_: Any, __: Any, value: tuple[float, float]) -> None:
    if not all(0 <= beta < 1 for beta in value):
        raise ValueError(f"each must be at least 0 and below 1, got {list(value)}")


@optimizers.register("adam", paper="arXiv:1412.6980")
@frozen(kw_only=True)
class Adam:
    """Adam, or AdamW where there is weight decay.

    Args:
        lr: learning rate in normalised pixel units.
        betas: decay of the first and second moment.
        weight_decay: decoupled weight decay.
    """

    lr: float = field(default=0.2, validator=[validators.gt(0.0), validators.lt(math.inf)])
    betas: tuple[float, float] = field(default=(0.5, 0.9), validator=_betas)
    weight_decay: float = field(default=0.0, validator=[validators.ge(0.0), validators.lt(math.inf)])

    def build(self, images: Tensor) -> torch.optim.Optimizer:
        """An optimiser of one tensor."""
        return torch.optim.AdamW([images], lr=self.lr, betas=self.betas, weight_decay=self.weight_decay, foreach=False)


@schedules.register("constant")
@frozen(kw_only=True)
class Constant:
    """The same learning rate throughout."""

    def factor(self, iteration: int, iterations: int) -> float:
        """Factor of the learning rate."""
        return 1.0


@schedules.register("warmup_cosine", paper="arXiv:2203.02250")
@frozen(kw_only=True)
class WarmupCosine:
    """Rounds of linear warm-up and cosine decay to zero.

    Args:
        rounds: how often it starts again (2 in PSAQ-ViT).
        warmup: share of a round that warms up (100 of 500 iterations in PSAQ-ViT).
    """

    rounds: int = field(default=1, validator=validators.ge(1))
    warmup: float = field(default=0.2, validator=[validators.ge(0.0), validators.lt(1.0)])

    def factor(self, iteration: int, iterations: int) -> float:
        """Factor of the learning rate."""
        length = iterations / self.rounds
        done = (iteration + 0.5) % length / length
        if done < self.warmup:
            return done / self.warmup
        return 0.5 * (1 + math.cos(math.pi * (done - self.warmup) / (1 - self.warmup)))
