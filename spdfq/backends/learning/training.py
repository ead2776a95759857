"""What all steps that learn by gradients share: trainable tensors, optimiser steps, and a stored training state."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from attrs import define
from torch import Tensor

from spdfq.backends.learning.shares import Share
from spdfq.errors import DataError
from spdfq.runtime.files import read_tensors, write_tensors
from spdfq.runtime.ranks import Ranks
from spdfq.runtime.state_key import check_state_key

SAVE_SECONDS = 10.0
_REMEDY = "delete it, or use --fresh"


@contextmanager
def trainable(parameters: Iterable[Tensor]) -> Iterator[None]:
    """Inside the ``with`` block, the tensors collect gradients; afterwards they do not."""
    leaves = list(parameters)
    for leaf in leaves:
        leaf.requires_grad_(True)
    try:
        yield
    finally:
        for leaf in leaves:
            leaf.requires_grad_(False)
            leaf.grad = None


def take_step(optimizer: torch.optim.Optimizer, loss: Tensor, share: Share) -> None:
    """One optimiser step; the gradient of a tensor that the loss does not depend on is zero.

    Args:
        optimizer: of the tensors to learn.
        loss: of the whole batch; its gradient is that of this process's share.
        share: of the batch.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
    for parameter, gradient in zip(parameters, share.summed(gradients), strict=True):
        parameter.grad = gradient
    optimizer.step()


def adam(*groups: tuple[list[Tensor], float]) -> torch.optim.Adam:
    """Adam for groups of tensors, each with its learning rate; empty groups are left out."""
    return torch.optim.Adam([{"params": leaves, "lr": lr} for leaves, lr in groups if leaves])


class LearningRates:
    """The learning rates of an optimiser's groups, all scaled by the same factor.

    Args:
        optimizer: its present rates belong to the factor 1.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._groups = optimizer.param_groups
        self._rates = [float(group["lr"]) for group in self._groups]

    def scale(self, factor: float) -> None:
        """Sets all rates to ``factor`` times their first values."""
        for group, rate in zip(self._groups, self._rates, strict=True):
            group["lr"] = rate * factor


@define(eq=False)
class Training:
    """Tensors that Adam trains, with a state that can be stored and restored bit for bit.

    Args:
        named: the trained tensors by name.
        optimizer: an Adam of all of them.
        iteration: the next iteration.
        key: a hash of what the training depends on, which its file holds.
    """

    named: dict[str, Tensor]
    optimizer: torch.optim.Adam
    iteration: int = 0
    key: str = ""

    def save(self, path: Path) -> None:
        """Stores the state so that a crash leaves either the old file or the new one."""
        stored = dict(self.named)
        for name, leaf in self.named.items():
            stored |= {f"{name}:{key}": value for key, value in self.optimizer.state[leaf].items()}
        write_tensors(path, stored, {"iteration": str(self.iteration), "key": self.key})

    @torch.no_grad()
    def restore(self, path: Path) -> None:
        """Restores the state that `save` stored.

        Raises:
            DataError: the file is damaged, or of other work.
        """
        stored, metadata = read_tensors(path, _REMEDY)
        moments = {name: self._moments(stored, name) for name in self.named}
        if not metadata.get("iteration", "").isdecimal() or len(stored) != sum(1 + len(m) for m in moments.values()):
            raise DataError(f"{path}: holds another training; {_REMEDY}")
        check_state_key(path, metadata, self.key)
        for name, leaf in self.named.items():
            if name not in stored or stored[name].shape != leaf.shape:
                raise DataError(f"{path}: holds another {name}; {_REMEDY}")
            leaf.copy_(stored[name])
            self.optimizer.state[leaf] = {
                key: value if key == "step" else value.to(leaf.device) for key, value in moments[name].items()
            }
        self.iteration = int(metadata["iteration"])

    def resume(self, path: Path, ranks: Ranks) -> None:
        """Restores the stored state in every process, if rank 0 finds one."""
        if ranks.first(path.exists):
            self.restore(path)
            ranks.wait()  # before rank 0 writes the next state

    @staticmethod
    def _moments(stored: dict[str, Tensor], name: str) -> dict[str, Tensor]:
        prefix = f"{name}:"
        return {key.removeprefix(prefix): value for key, value in stored.items() if key.startswith(prefix)}
