"""Keeps the results of the finished parts of a long step in a file, so that a killed run can continue."""

from collections.abc import Iterable
from pathlib import Path

from attrs import define, field
from torch import Tensor, nn

from spdfq.backends.base import Calibration
from spdfq.errors import DataError
from spdfq.runtime.files import read_tensors, write_tensors


@define(eq=False)
class FinishedParts:
    """The tensors of a network that the finished parts of a step (blocks, layers) have changed.

    Args:
        network: owns the tensors; their names are those of its state dict.
        path: the file; ``None`` keeps nothing.
    """

    network: nn.Module
    path: Path | None
    _tensors: dict[str, Tensor] = field(factory=dict, init=False)

    @classmethod
    def of(cls, network: nn.Module, calibration: Calibration, step: str) -> "FinishedParts":
        """The parts that a killed run finished, or none.

        Raises:
            DataError: the file is damaged.
        """
        found = cls(network, calibration.state_file(step))
        if found.path and found.path.exists():
            found._tensors = read_tensors(found.path, "delete it, or use --fresh")[0]
        return found

    def restore(self, names: Iterable[str]) -> bool:
        """Restores the tensors of a part of the step if that part was finished, and returns whether it was.

        Raises:
            DataError: the stored tensors are those of another model.
        """
        names = list(names)
        if not self._tensors.keys() >= set(names):
            return False
        state = self.network.state_dict()
        for name in names:
            if self._tensors[name].shape != state[name].shape:
                raise DataError(f"the state of an interrupted run has another {name}; delete it, or use --fresh")
            state[name].copy_(self._tensors[name])
        return True

    def keep(self, names: Iterable[str]) -> None:
        """Stores the present values of the tensors of a finished part."""
        state = self.network.state_dict()
        self._tensors |= {name: state[name].clone() for name in names}
        if self.path:
            write_tensors(self.path, self._tensors)
