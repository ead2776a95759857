"""What block-wise reconstruction is, whatever is learned: one block after the other comes back to the teacher's."""

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar, Literal

import torch
from attrs import define, field, validators
from torch import Tensor, nn

from spdfq.backends.base import NEITHER, Calibration, Step, check_calibrated_by
from spdfq.backends.learning.activations import Activations, scaled_activations
from spdfq.backends.learning.blocks import BlockCall, Hidden, block_calls, block_names
from spdfq.backends.learning.epochs import batch_rows, noise
from spdfq.backends.learning.fisher import squared_gradients
from spdfq.backends.learning.state import Finished
from spdfq.backends.learning.stream import Stream, rows
from spdfq.backends.learning.training import SAVE_SECONDS, Training, adam, learning, take_step
from spdfq.errors import NonFiniteError
from spdfq.quantized.model import QuantizedModel
from spdfq.quantized.products import WEIGHT, Visit
from spdfq.quantizers import Quantizer, learned_scales
from spdfq.runtime import Advance

_CHECK_EVERY = 10


def channels_last(hidden: Hidden, width: int) -> Hidden:
    """Maps ``[n, width, h, w]``, as convolutions have them, with the channels at the end like everything else."""
    return tuple(
        tensor.movedim(1, -1) if tensor.ndim == 4 and tensor.shape[1] == width != tensor.shape[-1] else tensor
        for tensor in hidden
    )


class Learner:
    """Base class of what is learned of a block.

    Args:
        parameters: leaf tensors that get a gradient while the block is reconstructed.
        changes: names, in the network's state dict, of what `finish` leaves changed.
    """

    parameters: list[Tensor]
    changes: list[str]

    def weight(self, name: str, weight: Tensor) -> Tensor:
        """What is multiplied instead of a weight."""
        raise TypeError(f"{type(self).__name__} does not define weight")

    def penalty(self, share: float) -> Tensor | float:
        """What is added to the error when ``share`` (0 to 1) of the iterations are done."""
        return 0.0

    def finish(self) -> None:
        """Write what was learned into the network."""


@define(kw_only=True)
class Reconstruction(Step, ABC):
    """Base of the steps that learn block by block.

    Args:
        iterations: optimiser steps of each block.
        lr: of Adam.
        batch: images in one step; all of them where there are fewer.
        inputs: what enters the quantized block: the ``quantized`` prefix's output, or the ``teacher``'s (unpublished).
        drop: share of the activations, and of what enters the block, that each step leaves in float (QDrop,
            arXiv 2203.05740, with 0.5).
        fisher: weigh the error at each value by its squared gradient of the divergence from the teacher (BRECQ,
            arXiv 2102.05426).
        scale_lr: learning rate of the activations' scales (LSQ, arXiv 1902.08153; 4e-5 in QDrop); 0 keeps them.
    """

    calibrates: ClassVar[frozenset[str]] = NEITHER

    name: ClassVar[str]
    iterations: int = field(default=100, validator=validators.ge(1))
    lr: float = field(default=4e-5, validator=validators.gt(0.0))
    batch: int = field(default=32, validator=validators.ge(1))
    inputs: Literal["quantized", "teacher"] = "quantized"
    drop: float = field(default=0.0, validator=[validators.ge(0.0), validators.lt(1.0)])
    fisher: bool = False
    scale_lr: float = field(default=0.0, validator=validators.ge(0.0))

    @abstractmethod
    def learner(self, model: QuantizedModel, block: str) -> Learner:
        """What is learned of a block."""

    @abstractmethod
    def distance(self, output: Hidden, target: Hidden, importance: Hidden | None) -> Tensor:
        """The error of a block's output, a scalar, channels on the last axis; ``importance`` weighs its values."""

    def rate(self, share: float) -> float:
        """Factor of the learning rate when ``share`` (0 to 1) of the iterations are done: a cosine to zero."""
        return 0.5 * (1 + math.cos(math.pi * share))

    def deployed(self, model: QuantizedModel) -> Visit:
        """How the blocks before are quantized."""
        return model.quantized

    def check(self, model: QuantizedModel, before: Sequence[Step]) -> None:
        """Refuse to come before calibration, and a model without blocks."""
        check_calibrated_by(before, model)
        block_names(model)

    def run(self, model: QuantizedModel, calibration: Calibration) -> None:
        """Reconstruct every block; blocks that a killed run finished are taken from its state file.

        Raises:
            ModelError: the model has no blocks that can be called alone.
            NonFiniteError: the error of a block is not finite.
            SpdfqError: a site was not calibrated.
        """
        model.check_calibrated()
        finished = Finished.of(model.network, calibration, self.name)
        with calibration.teacher.frozen() as float_network:
            calls = block_calls(float_network, block_names(model), calibration.images[:1])
            teacher = Stream(float_network, calibration.images, self.batch)
            student = Stream(model.network, calibration.images, self.batch)
            with calibration.runtime.progress("reconstructing", len(calls) * self.iterations) as advance:
                for call in calls:
                    Job(self, call, model, calibration, advance).run(teacher, student, finished)


@define(eq=False)
class Job:
    """The reconstruction of one block."""

    spec: Reconstruction
    call: BlockCall
    model: QuantizedModel
    calibration: Calibration
    advance: Advance
    learner: Learner = field(init=False)
    width: int = field(init=False)
    activations: Activations = field(init=False)
    scaled: dict[str, Quantizer] = field(init=False)
    path: Path | None = field(init=False)

    def __attrs_post_init__(self) -> None:
        self.path = self.calibration.state_file(f"{self.spec.name}-{self.call.name}")  # while the block is learned
        self.learner = self.spec.learner(self.model, self.call.name)
        weights = self.model.weight_names(f"{self.call.name}.")
        self.width = len(self.model.weight(weights[-1])) if weights else 0  # of what the block puts out
        self.activations = Activations(self.model, self.spec.drop)
        self.scaled = scaled_activations(self.model, f"{self.call.name}.") if self.spec.scale_lr else {}

    def run(self, teacher: Stream, student: Stream, finished: Finished) -> None:
        """Learn the block, or take it from a killed run.

        Finished blocks are passed through as well: a resumed run computes the same numbers in the same order.
        """
        entering = teacher.enter(self.call)
        target = teacher.leave(self.call, entering)
        hidden, changes = entering, [*self.learner.changes, *self.scaled]
        if self.spec.inputs == "quantized":
            with self.model.visiting(self.spec.deployed(self.model)):
                hidden = student.enter(self.call)
        if finished.restore(changes):
            self.advance(self.spec.iterations)
        else:
            self._learn(teacher.network, hidden, entering, target)
            finished.keep(changes)
            if self.path:
                self.path.unlink(missing_ok=True)
        if self.spec.inputs == "quantized":
            with self.model.visiting(self.spec.deployed(self.model)):
                student.leave(self.call, hidden)

    def _learn(self, teacher: nn.Module, hidden: Hidden, entering: Hidden, target: Hidden) -> None:
        importance = None
        if self.spec.fisher:
            importance = squared_gradients(
                teacher,
                self.model,
                self.call,
                self.calibration.images,
                self.spec.batch,
                self.spec.deployed(self.model),
                self.calibration.teacher.headless,
            )
        with (
            learned_scales(self.scaled.values()),
            learning(self.learner.parameters),
            self.model.visiting(self._operand),
        ):
            self._optimise(hidden, entering, target, importance)
        self.learner.finish()

    def _operand(self, name: str, kind: str, tensor: Tensor) -> Tensor:
        return self.learner.weight(name, tensor) if kind == WEIGHT else self.activations(name, kind, tensor)

    @torch.enable_grad()
    def _optimise(self, hidden: Hidden, entering: Hidden, target: Hidden, importance: Hidden | None) -> None:
        training, iterations, images = self._training(), self.spec.iterations, len(self.calibration.images)
        optimizer, saved = training.optimizer, time.monotonic()
        rates = [group["lr"] for group in optimizer.param_groups]
        if training.iteration:
            self.advance(training.iteration)
        for iteration in range(training.iteration, iterations):
            share = iteration / iterations
            chosen = batch_rows(self.calibration, self.spec.batch, iteration, *self._purpose)
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * self.spec.rate(share)
            given = rows(hidden, images, chosen)
            if self.spec.drop:
                self.activations.seed(noise(self.calibration, iteration, *self._purpose))
                given = self.activations.mixed(rows(entering, images, chosen), given)
            with self.calibration.runtime.autocast():
                output = self.call.run(self.model.network, given)
            wanted, weighed = rows(target, images, chosen), importance and rows(importance, images, chosen)
            error = self.spec.distance(
                channels_last(output, self.width),
                channels_last(wanted, self.width),
                weighed and channels_last(weighed, self.width),
            )
            loss = error + self.learner.penalty(share)
            take_step(optimizer, loss)
            if iteration % _CHECK_EVERY == _CHECK_EVERY - 1 or iteration == iterations - 1:
                self._report(iteration, float(error.detach()), float(loss.detach()))
                if self.path and time.monotonic() - saved >= SAVE_SECONDS:
                    training.iteration, saved = iteration + 1, time.monotonic()
                    training.save(self.path)

    @property
    def _purpose(self) -> tuple[str | int, ...]:
        return self.spec.name, self.calibration.index, self.call.name

    def _training(self) -> Training:
        """What is learned of the block, as far as a killed run came."""
        scales = {name: quantizer.tensors()["scale"] for name, quantizer in self.scaled.items()}
        optimizer = adam((self.learner.parameters, self.spec.lr), (list(scales.values()), self.spec.scale_lr))
        named = {f"learned.{index}": parameter for index, parameter in enumerate(self.learner.parameters)}
        training = Training({**named, **scales}, optimizer)
        if self.path and self.path.exists():
            training.restore(self.path)
        return training

    def _report(self, iteration: int, error: float, loss: float) -> None:
        if not math.isfinite(loss):
            raise NonFiniteError(
                f"{self.spec.name}: the error of {self.call.name} is not finite in iteration {iteration}; try a lower "
                "lr, or runtime.precision='float32'"
            )
        self.advance(iteration % _CHECK_EVERY + 1, error=error)
