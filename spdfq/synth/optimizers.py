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


@frozen(kw_only=True)
class Optimizer:
    """Base class of optimisers."""

    def start(self, noise: Tensor) -> Tensor:
        """What the images are before the first step, given white noise ``[B, C, H, W]``: that noise."""
        return noise

    def build(self, images: Tensor) -> torch.optim.Optimizer:
        """An optimiser of one tensor."""
        raise TypeError(f"{type(self).__name__} does not define build")


@optimizers.register("adam", paper="arXiv:1412.6980")
@frozen(kw_only=True)
class Adam(Optimizer):
    """Adam.

    Args:
        lr: learning rate in normalised pixel units.
        betas: decay of the first and second moment.
    """

    lr: float = field(default=0.2, validator=[validators.gt(0.0), validators.lt(math.inf)])
    betas: tuple[float, float] = field(default=(0.5, 0.9), validator=_betas)

    def build(self, images: Tensor) -> torch.optim.Optimizer:
        """An optimiser of one tensor."""
        return torch.optim.Adam([images], lr=self.lr, betas=self.betas, foreach=False)


@optimizers.register("adamw", paper="arXiv:1711.05101")
@frozen(kw_only=True)
class AdamW(Optimizer):
    """Adam with decoupled weight decay.

    Args:
        lr: learning rate in normalised pixel units.
        betas: decay of the first and second moment.
        weight_decay: share of the learning rate by which pixels shrink in a step (1e-6 in MimiQ).
    """

    lr: float = field(default=0.1, validator=[validators.gt(0.0), validators.lt(math.inf)])
    betas: tuple[float, float] = field(default=(0.9, 0.999), validator=_betas)
    weight_decay: float = field(default=1e-6, validator=[validators.ge(0.0), validators.lt(math.inf)])

    def build(self, images: Tensor) -> torch.optim.Optimizer:
        """An optimiser of one tensor."""
        return torch.optim.AdamW([images], lr=self.lr, betas=self.betas, weight_decay=self.weight_decay, foreach=False)


@frozen(kw_only=True)
class Schedule:
    """Base class of schedules."""

    def factor(self, iteration: int, iterations: int) -> float:
        """Factor of the learning rate, 0 to 1."""
        raise TypeError(f"{type(self).__name__} does not define factor")

    def restarts(self, iteration: int, iterations: int) -> bool:
        """Whether the optimiser forgets its moments before this iteration."""
        return False


@schedules.register("constant")
@frozen(kw_only=True)
class Constant(Schedule):
    """The same learning rate throughout."""

    def factor(self, iteration: int, iterations: int) -> float:
        """Factor of the learning rate."""
        return 1.0


@schedules.register("warmup_cosine", paper="arXiv:2203.02250")
@frozen(kw_only=True)
class WarmupCosine(Schedule):
    """Rounds of linear warm-up and cosine decay; in each the optimiser starts without moments.

    Args:
        rounds: how often it starts again (2 in PSAQ-ViT).
        warmup: share of a round that warms up (100 of 500 iterations in PSAQ-ViT).
        floor: share of the learning rate that the cosine ends at.
    """

    rounds: int = field(default=1, validator=validators.ge(1))
    warmup: float = field(default=0.2, validator=[validators.ge(0.0), validators.lt(1.0)])
    floor: float = field(default=0.0, validator=[validators.ge(0.0), validators.le(1.0)])

    def factor(self, iteration: int, iterations: int) -> float:
        """Factor of the learning rate."""
        done = (iteration + 0.5) * self.rounds / iterations % 1
        if done < self.warmup:
            return done / self.warmup
        falling = 0.5 * (1 + math.cos(math.pi * (done - self.warmup) / (1 - self.warmup)))
        return self.floor + (1 - self.floor) * falling

    def restarts(self, iteration: int, iterations: int) -> bool:
        """Whether a new round begins."""
        return iteration > 0 and self._round(iteration, iterations) > self._round(iteration - 1, iterations)

    def _round(self, iteration: int, iterations: int) -> int:
        return (2 * iteration + 1) * self.rounds // (2 * iterations)
