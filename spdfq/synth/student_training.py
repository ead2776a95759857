"""Training of a quantized student along with the images: the images raise its error, and it learns to lower it."""

from collections.abc import Callable
from typing import Protocol

import torch
from attrs import define, field, frozen, validators
from torch import Tensor, nn

from spdfq.errors import DataError, SpdfqError
from spdfq.losses.teacher_student import teacher_student_discrepancy
from spdfq.recipe.structure import Checked
from spdfq.synth.group_state import strip_prefix

_WEIGHTS, _MOMENTS = "state.", "optimizer."


@frozen(kw_only=True)
class StudentTraining(Checked):
    """How the quantized student of an adversarial synthesis is trained (PSAQ-ViT V2, arXiv 2209.05687).

    The recipe's ``[quantization]`` decides which tensors of the student are quantized. Its steps run until every
    quantizer has a range; later steps are left for the final model. After each step of the images, Adam makes one step
    on the student's quantized weights, which lowers the mean absolute difference of the logits. None of these numbers
    is published.

    Args:
        lr: learning rate of the student's weights.
        every: interval, in steps of the images, at which the student is trained.
        recalibrate: interval, in iterations, at which its ranges are chosen again on the current images.
    """

    lr: float = field(default=4e-5, validator=[validators.gt(0.0), validators.lt(1.0)])
    every: int = field(default=1, validator=validators.ge(1))
    recalibrate: int = field(default=100, validator=validators.ge(1))


class Student(Protocol):
    """A quantized copy of the teacher, made by a back-end.

    ``module`` takes images and returns logits. ``network``, inside it, has the teacher's module names.
    """

    module: nn.Module
    network: nn.Module

    def weights(self) -> dict[str, nn.Parameter]:
        """The parameters that may be trained, by name."""

    def tensors(self) -> dict[str, Tensor]:
        """All tensors that training or calibration change, by name and not copied."""

    def calibrate(self, images: Tensor) -> None:
        """Choose all ranges again, on images ``[B, C, h, w]``."""


StudentFactory = Callable[[Tensor], Student]
"""Makes a student that is calibrated on images ``[B, C, h, w]``."""


@define(eq=False)
class StudentTrainer:
    """The student of one group and its optimizer. The student is made when it is first needed.

    Args:
        spec: how it is trained.
        make: makes it.
    """

    spec: StudentTraining
    make: StudentFactory
    _student: Student | None = field(default=None, init=False)
    _optimizer: torch.optim.Optimizer | None = field(default=None, init=False)
    _stored: dict[str, Tensor] = field(factory=dict, init=False)

    @property
    def student(self) -> Student:
        """The student. Call `ready` before."""
        assert self._student is not None
        return self._student

    def ready(self, images: Tensor, iteration: int) -> Student:
        """The student at the beginning of an iteration, made or recalibrated on the images if it is time.

        Raises:
            SpdfqError: the student has no quantized weights, so there is nothing to train.
            DataError: the stored student belongs to another back-end.
        """
        images = images.detach()
        if self._student is None:
            self._student = self._made(images)
            self._optimizer = torch.optim.Adam(self._student.weights().values(), lr=self.spec.lr)
            self._load_stored(self._student, self._optimizer)
        if iteration and iteration % self.spec.recalibrate == 0:
            self._student.calibrate(images)
        return self._student

    def _made(self, images: Tensor) -> Student:
        student = self.make(images)
        if not student.weights():
            raise SpdfqError(
                "synthesis.student: [quantization] leaves all weights in float, so the student has nothing to learn; "
                "quantize some weights"
            )
        return student

    def due(self, iteration: int) -> bool:
        """Whether the student is trained in this iteration."""
        return iteration % self.spec.every == self.spec.every - 1

    def step(self, logits: Callable[[], Tensor], teacher: Tensor) -> None:
        """Make one step that brings the student's logits closer to the teacher's.

        Args:
            logits: runs the student and returns its logits ``[B, K]``.
            teacher: the teacher's logits ``[B, K]``.
        """
        assert self._optimizer is not None
        weights = list(self.student.weights().values())
        for weight in weights:
            weight.requires_grad_(True)
        try:
            loss = teacher_student_discrepancy(teacher, logits())
            gradients = torch.autograd.grad(loss, weights, allow_unused=True, materialize_grads=True)
        finally:
            for weight in weights:
                weight.requires_grad_(False)
        for weight, gradient in zip(weights, gradients, strict=True):
            weight.grad = gradient
        self._optimizer.step()
        for weight in weights:
            weight.grad = None

    def tensors(self) -> dict[str, Tensor]:
        """What must be stored: the student's state, and the moments of its optimizer."""
        if self._student is None or self._optimizer is None:
            return self._stored
        # cloned, because tied parameters share one storage, which a file refuses to store under two names
        state = {f"{_WEIGHTS}{name}": value.clone() for name, value in self._student.tensors().items()}
        moments = {
            f"{_MOMENTS}{name}.{key}": value
            for name, weight in self._student.weights().items()
            for key, value in self._optimizer.state[weight].items()
        }
        return state | moments

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Keep what `tensors` returned until the student is made.

        Raises:
            DataError: no student was stored.
        """
        if not tensors:
            raise DataError("there is no student in it")
        self._stored = dict(tensors)

    def _load_stored(self, student: Student, optimizer: torch.optim.Optimizer) -> None:
        if not self._stored:
            return
        stored = strip_prefix(_WEIGHTS, self._stored)
        own = student.tensors()
        wrong = [name for name in own.keys() | stored.keys() if _shape(own, name) != _shape(stored, name)]
        if wrong:
            raise DataError(f"the student of an interrupted run has another {min(wrong)}; use --fresh")
        with torch.no_grad():
            for name, tensor in own.items():
                tensor.copy_(stored[name])
        moments = strip_prefix(_MOMENTS, self._stored)
        for name, weight in student.weights().items():
            optimizer.state[weight] = {
                key: value if key == "step" else value.to(weight.device)
                for key, value in strip_prefix(f"{name}.", moments).items()
            }
        self._stored = {}


def _shape(tensors: dict[str, Tensor], name: str) -> tuple[int, ...] | None:
    return tuple(tensors[name].shape) if name in tensors else None
