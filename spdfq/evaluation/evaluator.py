"""How a model is evaluated: by its logits if it has a classification head, by nearest neighbours if it has none."""

from pathlib import Path
from typing import Any, Protocol

from torch import nn

from spdfq.evaluation.accuracy import LogitsEvaluator
from spdfq.evaluation.neighbours import NeighboursEvaluator
from spdfq.evaluation.predictions import Predictions
from spdfq.runtime import Runtime
from spdfq.teacher import Teacher


class Evaluator(Protocol):
    """Measures a quantized model against its teacher. See `LogitsEvaluator` for arguments and errors."""

    def check(self, spec: Any, teacher: Teacher) -> None:
        """Check that an evaluation spec fits the teacher."""

    def reference(self, teacher: Teacher, spec: Any, runtime: Runtime, folder: Path | None = None) -> Predictions:
        """The teacher's predictions on the spec's dataset."""

    def load_reference(self, path: Path) -> Predictions:
        """Read a stored reference."""

    def measure(
        self, model: nn.Module, teacher: Teacher, spec: Any, runtime: Runtime, fp: Any, folder: Path | None = None
    ) -> dict[str, Any]:
        """The quantized model's metrics, and the teacher's for comparison, as plain data."""


def evaluator_for(teacher: Teacher) -> Evaluator:
    """The evaluator for a teacher. The source code that its numbers depend on starts at its class's module."""
    return NeighboursEvaluator() if teacher.headless else LogitsEvaluator()
