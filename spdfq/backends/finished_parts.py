"""Keeps the results of the finished parts of a long step in a file, so that a killed run can continue."""

from collections.abc import Iterable
from pathlib import Path

import torch
from attrs import define, field
from torch import Tensor

from spdfq.backends.base import Calibration, Step
from spdfq.errors import DataError
from spdfq.quantized.model import QuantizedModel
from spdfq.runtime.files import read_tensors, write_tensors
from spdfq.runtime.state_key import check_state_key


@define(eq=False)
class FinishedParts:
    """The tensors of a quantized model that the finished parts of a step (blocks, layers) have changed.

    Args:
        model: owns the tensors; `QuantizedModel.tensors` names them.
        path: the file; ``None`` keeps nothing.
        key: a hash of what the tensors depend on, which the file holds.
        writes: whether this process writes the file; the first of several does.
    """

    model: QuantizedModel
    path: Path | None
    key: str = ""
    writes: bool = True
    _tensors: dict[str, Tensor] = field(factory=dict, init=False)

    @classmethod
    def of(cls, model: QuantizedModel, calibration: Calibration, step: Step, name: str) -> "FinishedParts":
        """The parts of a step that a killed run finished, or none; ``name`` is that of the file.

        Raises:
            DataError: the file is damaged, or of other work.
        """
        ranks = calibration.runtime.ranks
        found = cls(model, calibration.state_file(name), calibration.state_key(step), ranks.leads)
        if found.path and ranks.first(found.path.exists):
            found._tensors, metadata = read_tensors(found.path, "delete it, or use --fresh")
            check_state_key(found.path, metadata, found.key)
            ranks.wait()  # before rank 0 writes the next state
        return found

    @torch.no_grad()
    def restore(self, names: Iterable[str]) -> bool:
        """Restores the tensors of a part of the step if that part was finished, and returns whether it was.

        Raises:
            DataError: the stored tensors are those of another model.
        """
        names = list(names)
        if not self._tensors.keys() >= set(names):
            return False
        state = self.model.tensors()
        for name in names:
            if self._tensors[name].shape != state[name].shape:
                raise DataError(f"the state of an interrupted run has another {name}; delete it, or use --fresh")
            state[name].copy_(self._tensors[name])
        return True

    def keep(self, names: Iterable[str]) -> None:
        """Stores the present values of the tensors of a finished part."""
        state = self.model.tensors()
        self._tensors |= {name: state[name].clone() for name in names}
        if self.path and self.writes:
            write_tensors(self.path, self._tensors, {"key": self.key})
