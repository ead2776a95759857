"""Optimizers of the pixels."""

import math
from typing import Any

import torch
from attrs import field, frozen, validators
from torch import Tensor

from spdfq.errors import ComponentError, SpdfqError
from spdfq.recipe.structure import Checked
from spdfq.registry import optimizers
from spdfq.runtime.arguments import check_tensor

LEARNING_RATE = (validators.gt(0.0), validators.lt(math.inf))


def _betas(_: Any, __: Any, value: tuple[float, float]) -> None:
    if not all(0 <= beta < 1 for beta in value):
        raise ValueError(f"each must be at least 0 and below 1, got {list(value)}")


def check_pixels(images: Tensor) -> None:
    """Refuse what an optimizer cannot change, or would leave as it is."""
    check_tensor("images", images, "B, C, H, W")
    if not images.is_leaf or not images.requires_grad:
        raise SpdfqError("images must be a leaf that requires a gradient; give images.detach().requires_grad_()")


@frozen(kw_only=True)
class Optimizer(Checked):
    """Base class of optimizers. A subclass defines `build`.

    Args:
        lr: learning rate in normalised pixel units, before the schedule's factor.
    """

    lr: float = field(default=0.2, validator=list(LEARNING_RATE))

    def start(self, noise: Tensor) -> Tensor:
        """The images before the first step, made from white noise ``[B, C, H, W]``; the noise itself by default."""
        return noise

    def build(self, images: Tensor) -> torch.optim.Optimizer:
        """A torch optimizer of one tensor. The loop sets its learning rate before each step.

        Args:
            images: ``[B, C, H, W]``, a leaf that requires a gradient.

        Raises:
            SpdfqError: anything else; its pixels would never change.
        """
        raise ComponentError(f"{type(self).__name__} does not define build")


@optimizers.register("adam", paper="arXiv:1412.6980")
@frozen(kw_only=True)
class Adam(Optimizer):
    """Adam.

    Args:
        lr: learning rate in normalised pixel units.
        betas: decay of the first and second moment.
    """

    betas: tuple[float, float] = field(default=(0.5, 0.9), validator=_betas)

    def build(self, images: Tensor) -> torch.optim.Optimizer:
        """A torch optimizer of one tensor."""
        check_pixels(images)
        return torch.optim.Adam([images], lr=self.lr, betas=self.betas, foreach=False)


@optimizers.register("adamw", paper="arXiv:1711.05101")
@frozen(kw_only=True)
class AdamW(Optimizer):
    """Adam with decoupled weight decay.

    Args:
        lr: learning rate in normalised pixel units.
        betas: decay of the first and second moment.
        weight_decay: in each step, pixels shrink by the learning rate times this (1e-6 in MimiQ).
    """

    lr: float = field(default=0.1, validator=list(LEARNING_RATE))
    betas: tuple[float, float] = field(default=(0.9, 0.999), validator=_betas)
    weight_decay: float = field(default=1e-6, validator=[validators.ge(0.0), validators.lt(math.inf)])

    def build(self, images: Tensor) -> torch.optim.Optimizer:
        """A torch optimizer of one tensor."""
        check_pixels(images)
        return torch.optim.AdamW([images], lr=self.lr, betas=self.betas, weight_decay=self.weight_decay, foreach=False)
