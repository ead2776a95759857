"""The unit of work: one group of images, its optimiser, crops, targets, automatic weights and state file."""

import os
from pathlib import Path
from typing import Any

import torch
from attrs import define, field
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from spdfq.errors import DataError
from spdfq.losses.base import Loss

BALANCE_ITERATIONS = 10


@define(eq=False)
class Balance:
    """Automatic loss weights: α = mean‖∇ label loss‖ / mean‖∇ loss‖ over the first iterations, then fixed.

    Args:
        losses: the losses by name.
    """

    losses: dict[str, Loss]
    norms: Tensor = field(init=False)

    def __attrs_post_init__(self) -> None:
        self.norms = torch.zeros(1 + len(self.automatic), dtype=torch.float64)

    @property
    def automatic(self) -> list[str]:
        """Names of the losses with ``weight = "auto"``."""
        return [name for name, loss in self.losses.items() if loss.weight == "auto"]

    def observe(self, terms: dict[str, Tensor], images: Tensor, iteration: int) -> None:
        """Measure the gradients, during the first iterations only."""
        if not self.automatic or iteration >= BALANCE_ITERATIONS:
            return
        reference = sum(terms[name] * self.losses[name].weight for name in terms if self.losses[name].label_loss)
        for slot, term in enumerate([reference, *(terms[name] for name in self.automatic)]):
            (gradient,) = torch.autograd.grad(term, images, retain_graph=True)
            self.norms[slot] += float(gradient.norm())

    def weight(self, name: str) -> float:
        """The weight of a loss now."""
        fixed = self.losses[name].weight
        if fixed != "auto":
            return float(fixed)
        own = float(self.norms[1 + self.automatic.index(name)])
        return float(self.norms[0]) / own if own > 0 else 0.0


@define(eq=False)
class GroupState:
    """What must be kept to take a group up again: images, moments, automatic weights, losses so far.

    Args:
        images: ``[B, C, H, W]``, the tensor that is optimised.
        optimizer: its optimiser.
        balance: its automatic weights.
        curve: ``[iterations, columns]``.
        iteration: the next iteration.
    """

    images: Tensor
    optimizer: torch.optim.Optimizer
    balance: Balance
    curve: Tensor
    iteration: int = 0

    def save(self, path: Path) -> None:
        """Write the state so that a crash leaves either the old file or the new one."""
        moments = {f"optimizer.{name}": value for name, value in self.optimizer.state[self.images].items()}
        tensors = {"images": self.images, "norms": self.balance.norms, "curve": self.curve, **moments}
        stored = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
        write_atomically(path, stored, {"iteration": str(self.iteration)})

    def restore(self, path: Path) -> None:
        """Take up what `save` wrote."""
        try:
            with safe_open(path, "pt") as stored:
                self.iteration = int(stored.metadata()["iteration"])
                tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
        except (SafetensorError, KeyError, TypeError) as error:
            raise DataError(f"{path}: damaged state of an interrupted run ({error}); delete it, or use --fresh") from None
        with torch.no_grad():
            self.images.copy_(tensors["images"])
            self.curve.copy_(tensors["curve"])
        self.balance.norms = tensors["norms"]
        moments = {name.removeprefix("optimizer."): value for name, value in tensors.items() if "optimizer." in name}
        self.optimizer.state[self.images] = {
            name: value if name == "step" else value.to(self.images.device) for name, value in moments.items()
        }


def write_atomically(path: Path, tensors: dict[str, Tensor], metadata: dict[str, Any]) -> None:
    """Write a safetensors file under a temporary name, sync it, and move it into place."""
    temporary = path.with_suffix(".tmp")
    save_file(tensors, temporary, metadata=metadata)
    with open(temporary, "rb") as handle:
        os.fsync(handle.fileno())
    os.replace(temporary, path)
