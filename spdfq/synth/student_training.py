"""A quantized student beside the images: they look for what tells it from the teacher, it learns to do without."""

from collections.abc import Callable
from typing import Protocol

import torch
from attrs import define, field, frozen, validators
from torch import Tensor, nn

from spdfq.errors import DataError, SpdfqError
from spdfq.losses.teacher_student import teacher_student_discrepancy
from spdfq.synth.group_state import strip_prefix

_WEIGHTS, _MOMENTS = "state.", "optimizer."


@frozen(kw_only=True)
class StudentTraining:
    """How the quantized student of an adversarial synthesis learns (PSAQ-ViT V2, arXiv 2209.05687).

    It is what the recipe's ``[quantization]`` places, calibrated by its steps up to the one after which every quantizer
    has its range; later steps are left for the real model. After each step of the images the student's quantized
    weights make a step of Adam against the mean absolute difference of the logits. None of these numbers is published.

    Args:
        lr: learning rate of the student's weights.
        every: the student learns after every so many steps of the images.
        recalibrate: its ranges are chosen anew, on the images as they are, every so many iterations.
    """

    lr: float = field(default=4e-5, validator=[validators.gt(0.0), validators.lt(1.0)])
    every: int = field(default=1, validator=validators.ge(1))
    recalibrate: int = field(default=100, validator=validators.ge(1))


class Student(Protocol):
    """A quantized copy of the teacher, as a back-end makes it.

    ``module`` takes images and gives logits; ``network`` inside it has the teacher's module names.
    """

    module: nn.Module
    network: nn.Module

    def weights(self) -> dict[str, nn.Parameter]:
        """What may be learned, by name."""

    def calibrate(self, images: Tensor) -> None:
        """Choose the ranges anew."""


StudentFactory = Callable[[Tensor], Student]
"""Makes a student that is calibrated on the images it is given, ``[B, C, h, w]``."""


@define(eq=False)
class StudentTrainer:
    """The student of one group; it is made when it is first needed.

    Args:
        spec: how it learns.
        make: makes it.
    """

    spec: StudentTraining
    make: StudentFactory
    _student: Student | None = field(default=None, init=False)
    _optimizer: torch.optim.Optimizer | None = field(default=None, init=False)
    _stored: dict[str, Tensor] = field(factory=dict, init=False)

    @property
    def student(self) -> Student:
        """The student, once it is `ready`."""
        assert self._student is not None
        return self._student

    def ready(self, images: Tensor, iteration: int) -> Student:
        """The student at the beginning of an iteration, calibrated on the images where it is time."""
        images = images.detach()
        if self._student is None:
            self._student = self._made(images)
            self._optimizer = torch.optim.Adam(self._student.weights().values(), lr=self.spec.lr)
            self._take_up(self._student, self._optimizer)
        if iteration and iteration % self.spec.recalibrate == 0:
            self._student.calibrate(images)
        return self._student

    def _made(self, images: Tensor) -> Student:
        student = self.make(images)
        if not student.weights():
            raise SpdfqError(
                "synthesis.student: [quantization] leaves all weights in float, so it has nothing to learn"
            )
        return student

    def due(self, iteration: int) -> bool:
        """Whether the student learns in this iteration."""
        return iteration % self.spec.every == self.spec.every - 1

    def learn(self, answer: Callable[[], Tensor], teacher: Tensor) -> None:
        """One step of the student towards the teacher's logits ``[B, K]``; ``answer()`` gives its own."""
        assert self._optimizer is not None
        weights = list(self.student.weights().values())
        for weight in weights:
            weight.requires_grad_(True)
        try:
            loss = teacher_student_discrepancy(teacher, answer())
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
        """What must be stored: everything of the student, and its optimiser's moments."""
        if self._student is None or self._optimizer is None:
            return self._stored
        # cloned: what a network ties together would be refused as one storage under two names
        state = {f"{_WEIGHTS}{name}": value.clone() for name, value in self._student.network.state_dict().items()}
        moments = {
            f"{_MOMENTS}{name}.{key}": value
            for name, weight in self._student.weights().items()
            for key, value in self._optimizer.state[weight].items()
        }
        return state | moments

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Take up what `tensors` gave, when the student is next needed.

        Raises:
            DataError: there is nothing of a student.
        """
        if not tensors:
            raise DataError("there is no student in it")
        self._stored = dict(tensors)

    def _take_up(self, student: Student, optimizer: torch.optim.Optimizer) -> None:
        if not self._stored:
            return
        state = strip_prefix(_WEIGHTS, self._stored)
        own = student.network.state_dict()
        wrong = [name for name in own.keys() | state.keys() if _shape(own, name) != _shape(state, name)]
        if wrong:
            raise DataError(f"the student of an interrupted run has another {min(wrong)}; use --fresh")
        student.network.load_state_dict(state)
        moments = strip_prefix(_MOMENTS, self._stored)
        for name, weight in student.weights().items():
            own_moments = strip_prefix(f"{name}.", moments)
            optimizer.state[weight] = {
                key: value if key == "step" else value.to(weight.device) for key, value in own_moments.items()
            }
        self._stored = {}


def _shape(tensors: dict[str, Tensor], name: str) -> tuple[int, ...] | None:
    return tuple(tensors[name].shape) if name in tensors else None
