"""What is stored of a group of images between iterations: pixels, moments, automatic weights and losses so far."""

from pathlib import Path
from typing import Protocol

import torch
from attrs import define, field
from torch import Tensor

from spdfq.errors import DataError
from spdfq.losses.base import Loss
from spdfq.runtime.files import read_tensors, write_tensors
from spdfq.runtime.state_key import check_state_key

BALANCE_ITERATIONS = 10
_REMEDY = "delete it or use --fresh; the group then starts again"
_MOMENTS = "optimizer."


class Resumable(Protocol):
    """Another part of a group that must survive an interruption."""

    def tensors(self) -> dict[str, Tensor]:
        """What must be stored."""

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Load what `tensors` returned; raise DataError if it does not fit."""


@define(eq=False)
class LossWeights:
    """The weights of the losses.

    An automatic weight is mean‖∇ label loss‖ / mean‖∇ loss‖ over the first `BALANCE_ITERATIONS` iterations. It is fixed
    afterwards.

    Args:
        losses: the losses by name.
        device: of the images; the norms of the gradients stay there, so that nobody waits for them.
    """

    losses: dict[str, Loss]
    device: torch.device = field(factory=lambda: torch.device("cpu"))
    norms: Tensor = field(init=False)

    def __attrs_post_init__(self) -> None:
        exact = torch.float32 if self.device.type == "mps" else torch.float64  # MPS has no float64
        self.norms = torch.zeros(1 + len(self.automatic), dtype=exact, device=self.device)

    @property
    def automatic(self) -> list[str]:
        """Names of the losses with ``weight = "auto"``."""
        return [name for name, loss in self.losses.items() if loss.weight == "auto"]

    def compared(self, terms: dict[str, Tensor], iteration: int) -> list[Tensor]:
        """The losses whose gradients are measured: the label losses as one, then each with an automatic weight.

        Empty without automatic weights and after the first iterations.
        """
        if not self.automatic or iteration >= BALANCE_ITERATIONS:
            return []
        labels = [terms[name] * float(loss.weight) for name, loss in self.losses.items() if loss.label_loss]
        return [torch.stack(labels).sum(), *(terms[name] for name in self.automatic)]

    def observe(self, index: int, gradient: Tensor) -> None:
        """Take the images' gradient of the loss at this index of `compared` into account."""
        self.norms[index] += gradient.norm()

    def weight(self, name: str) -> float | Tensor:
        """The current weight of a loss; an automatic one is a float32 scalar on the device."""
        fixed = self.losses[name].weight
        if fixed != "auto":
            return float(fixed)
        own = self.norms[1 + self.automatic.index(name)]
        return torch.where(own > 0, self.norms[0] / own, 0.0).float()


@define(eq=False)
class GroupState:
    """What must be stored to resume a group.

    Args:
        images: ``[B, C, H, W]``, the tensor that is optimised.
        optimizer: its optimizer.
        loss_weights: the weights of the losses.
        curve: ``[iterations, columns]``, the losses so far.
        iteration: the next iteration.
        others: other parts to store, by name; ``None`` if the group has no such part.
        key: a hash of what the state depends on, which the file holds.
    """

    images: Tensor
    optimizer: torch.optim.Optimizer
    loss_weights: LossWeights
    curve: Tensor
    iteration: int = 0
    others: dict[str, Resumable | None] = field(factory=dict)
    key: str = ""

    def save(self, path: Path) -> None:
        """Write the state. A crash leaves either the old file or the new one."""
        state = self.optimizer.state[self.images].items()
        moments = {f"{_MOMENTS}{name}": value for name, value in state if isinstance(value, Tensor)}
        stored = {name: other.tensors() for name, other in self.others.items() if other}
        others = {f"{name}.{key}": value for name, tensors in stored.items() for key, value in tensors.items()}
        metadata = {"iteration": str(self.iteration), "key": self.key}
        write_tensors(path, {**self._tensors(), **moments, **others}, metadata)

    def restore(self, path: Path) -> None:
        """Load what `save` wrote.

        Raises:
            DataError: the file is damaged, or belongs to another group or to other work.
        """
        tensors, metadata = read_tensors(path, _REMEDY)
        iteration = metadata.get("iteration", "")
        self._check(path, tensors, iteration)
        check_state_key(path, metadata, self.key)
        self.iteration = int(iteration)
        with torch.no_grad():
            for name, own in self._tensors().items():
                own.copy_(tensors[name])
        self.optimizer.state[self.images] = {
            name: value if name == "step" else value.to(self.images.device)
            for name, value in strip_prefix(_MOMENTS, tensors).items()
        }
        for name, other in self.others.items():
            try:
                if other:
                    other.restore(strip_prefix(f"{name}.", tensors))
            except DataError as error:
                raise DataError(f"{path}: {error}; {_REMEDY}") from None

    def _tensors(self) -> dict[str, Tensor]:
        return {"images": self.images, "norms": self.loss_weights.norms, "curve": self.curve}

    def _check(self, path: Path, tensors: dict[str, Tensor], iteration: str) -> None:
        """Raise if the file does not fit; `Tensor.copy_` would broadcast instead."""
        if not iteration.isdecimal() or int(iteration) > len(self.curve):
            raise DataError(
                f"{path}: iteration {iteration!r} does not fit a group of {len(self.curve)} iterations; {_REMEDY}"
            )
        for name, own in self._tensors().items():
            found = list(tensors[name].shape) if name in tensors else "nothing"
            if found != list(own.shape):
                raise DataError(f"{path}: {name} is {found}, expected {list(own.shape)}; {_REMEDY}")


def strip_prefix(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors whose names start with a prefix, under the rest of their names."""
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
