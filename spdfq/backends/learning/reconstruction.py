"""Reconstruction block by block: the base class of the steps, and the loop that they share.

One block after the other learns until its quantized output comes close to the teacher's. The steps differ in what is
learned of a block (`BlockLearner`) and in how the error of its output is measured (`Reconstruction.distance`).
"""

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import ClassVar, Literal

import torch
from attrs import define, field, frozen, validators
from einops import rearrange
from torch import Tensor, nn

from spdfq.backends.base import NEITHER, Calibration, Step, check_calibrated_by
from spdfq.backends.blocks import BlockCall, Hidden, block_calls, block_names
from spdfq.backends.finished_parts import FinishedParts
from spdfq.backends.learning.activation_scales import learnable_activation_scales
from spdfq.backends.learning.batches import batch_rows, drop_generator
from spdfq.backends.learning.fisher import squared_gradients
from spdfq.backends.learning.qdrop import QDrop
from spdfq.backends.learning.shares import Share
from spdfq.backends.learning.training import SAVE_SECONDS, LearningRates, Training, adam, take_step, trainable
from spdfq.backends.names import some_of
from spdfq.backends.propagation import Propagation, of_images
from spdfq.errors import ComponentError, NonFiniteError, SpdfqError
from spdfq.quantized.model import QuantizedModel
from spdfq.quantized.sites import WEIGHT
from spdfq.quantized.visiting import Visit
from spdfq.quantizers import Quantizer, learned_scales
from spdfq.runtime import Advance
from spdfq.runtime.ranks import Ranks

_CHECK_EVERY = 10


def channels_last(hidden: Hidden, width: int) -> Hidden:
    """The hidden states with their ``width`` channels on the last axis; convolutional maps have them on axis 1."""
    return tuple(
        rearrange(tensor, "b c h w -> b h w c")
        if tensor.ndim == 4 and tensor.shape[1] == width != tensor.shape[-1]
        else tensor
        for tensor in hidden
    )


def squared_errors(output: Hidden, target: Hidden, importance: Hidden | None) -> list[Tensor]:
    """The squared difference of each tensor in float32, each value times its importance."""
    errors = [(ours.float() - theirs.float()).square() for ours, theirs in zip(output, target, strict=True)]
    if importance:
        errors = [error * weight for error, weight in zip(errors, importance, strict=True)]
    return errors


class BlockLearner:
    """Base class of what is learned of a block.

    Args:
        parameters: leaf tensors that are trained.
        changes: names, in the network's state dict, of the tensors that `finish` changes.
    """

    parameters: list[Tensor]
    changes: list[str]

    def weight(self, name: str, weight: Tensor) -> Tensor:
        """The tensor that is multiplied instead of a weight."""
        raise ComponentError(f"{type(self).__name__} does not define weight")

    def penalty(self, share: float) -> Tensor | float:
        """A term that is added to the error when ``share`` (0 to 1) of the iterations are done."""
        return 0.0

    def finish(self) -> None:
        """Writes what was learned into the network."""


@define(kw_only=True)
class Reconstruction(Step, ABC):
    """Base class of the steps that learn block by block.

    Args:
        iterations: optimiser steps of each block.
        lr: learning rate of Adam.
        batch: images in one step; all of them if there are fewer.
        inputs: what enters the quantized block: the output of the ``quantized`` blocks before it, or that of the
            ``teacher``'s (unpublished).
        drop: share of the activations, and of the values that enter the block, that each step leaves in float (QDrop,
            arXiv 2203.05740, with 0.5).
        fisher: weigh the error of each value by the squared gradient of the divergence from the teacher (BRECQ,
            arXiv 2102.05426).
        scale_lr: learning rate of the activations' scales (LSQ, arXiv 1902.08153; 4e-5 in QDrop); 0 does not change
            them.
    """

    calibrates: ClassVar[frozenset[str]] = NEITHER
    changes_weights: ClassVar[bool] = True
    shared: ClassVar[bool] = True

    name: ClassVar[str]
    iterations: int = field(default=100, validator=validators.ge(1))
    lr: float = field(default=4e-5, validator=validators.gt(0.0))
    batch: int = field(default=32, validator=validators.ge(1))
    inputs: Literal["quantized", "teacher"] = "quantized"
    drop: float = field(default=0.0, validator=[validators.ge(0.0), validators.lt(1.0)])
    fisher: bool = False
    scale_lr: float = field(default=0.0, validator=validators.ge(0.0))

    @abstractmethod
    def learner(self, model: QuantizedModel, block: str) -> BlockLearner:
        """What is learned of a block."""

    @abstractmethod
    def distance(self, output: Hidden, target: Hidden, importance: Hidden | None) -> Tensor:
        """The error of a block's output, a scalar; channels are on the last axis, ``importance`` weighs the values."""

    def rate(self, share: float) -> float:
        """Factor of the learning rate when ``share`` (0 to 1) of the iterations are done: a cosine to zero."""
        return 0.5 * (1 + math.cos(math.pi * share))

    def scale_rate(self, scale: Tensor) -> float:
        """The learning rate of a scale."""
        return self.scale_lr

    def quantized(self, model: QuantizedModel) -> Visit:
        """Quantizes the sites of the blocks before the one that learns."""
        return model.quantized

    def check(self, model: QuantizedModel, before: Sequence[Step]) -> None:
        """Refuses ranges that were not chosen before, a model without blocks, and blocks with nothing to learn."""
        super().check(model, before)
        check_calibrated_by(before, model)
        blocks = block_names(model)
        if not (self.scale_lr and any(step.replaces_quantizers for step in before)):  # the run knows those quantizers
            self._idle_blocks(model, blocks)

    def learns(self, model: QuantizedModel, block: str) -> bool:
        """Whether anything of a block is learned: a quantized weight, or the scale of an activation."""
        scales = learnable_activation_scales(model, f"{block}.") if self.scale_lr else {}
        return bool(scales or model.weight_names(f"{block}."))

    def _idle_blocks(self, model: QuantizedModel, blocks: list[str]) -> list[str]:
        """The blocks of which nothing is learned.

        Raises:
            SpdfqError: these are all of them.
        """
        idle = [block for block in blocks if not self.learns(model, block)]
        if len(idle) == len(blocks):
            raise SpdfqError(f"{self.name}: no quantized weight in the blocks to learn; set scale_lr, or leave it out")
        return idle

    def _note_unlearned(self, model: QuantizedModel, blocks: list[str]) -> None:
        """Notes the blocks of which nothing is learned, and the quantized weights outside of blocks."""
        inside = tuple(f"{block}." for block in blocks)
        if idle := self._idle_blocks(model, blocks):
            model.note(self.name, [f"{some_of(idle)}: nothing to learn, no weight is quantized"])
        if outside := [name for name in model.weight_names() if not name.startswith(inside)]:
            model.note(self.name, [f"{some_of(outside)}: not learned, outside of the blocks"])

    def run(self, model: QuantizedModel, calibration: Calibration) -> None:
        """Reconstructs every block; blocks that a killed run finished are read from its state file.

        Raises:
            ModelError: the model has no blocks that can be called alone.
            NonFiniteError: the error of a block is not finite.
            DataError: a state file is damaged, or of other work.
            SpdfqError: a site was not calibrated, or there is nothing to learn.
        """
        model.check_calibrated()
        blocks = block_names(model)
        self._note_unlearned(model, blocks)
        calibration.runtime.ranks.equalise(model.tensors().values())
        finished = FinishedParts.of(model, calibration, self, self.name)
        with calibration.teacher.frozen() as float_network:
            calls = block_calls(float_network, blocks, calibration.images[:1])
            teacher = Propagation(float_network, calibration.images, self.batch)
            student = Propagation(model.network, calibration.images, self.batch)
            with calibration.runtime.progress("reconstructing", len(calls) * self.iterations) as advance:
                for job in self.jobs(float_network, calls, model, calibration, advance):
                    job.run(teacher, student, finished)

    def jobs(
        self,
        network: nn.Module,
        calls: list[BlockCall],
        model: QuantizedModel,
        calibration: Calibration,
        advance: Advance,
    ) -> Iterable["BlockReconstruction"]:
        """The reconstruction of each block, in order; ``network`` is the float network."""
        return (BlockReconstruction(self, call, model, calibration, advance) for call in calls)


@frozen(eq=False)
class BlockData:
    """What a block learns from, all for the same images.

    Args:
        inputs: what enters the quantized block.
        teacher_inputs: what enters the teacher's block.
        targets: the output of the teacher's block.
        importance: weight of each value of the output; ``None`` for equal weights.
    """

    inputs: Hidden
    teacher_inputs: Hidden
    targets: Hidden
    importance: Hidden | None = None


@define(eq=False)
class BlockReconstruction:
    """The reconstruction of one block."""

    spec: Reconstruction
    call: BlockCall
    model: QuantizedModel
    calibration: Calibration
    advance: Advance
    learner: BlockLearner = field(init=False)
    width: int = field(init=False)
    activations: QDrop = field(init=False)
    scaled: dict[str, Quantizer] = field(init=False)
    path: Path | None = field(init=False)
    trained_on: Tensor | None = field(default=None, init=False)  # indices of the images; None for all

    def __attrs_post_init__(self) -> None:
        # the state of the block's training; it exists only until the block is finished
        self.path = self.calibration.state_file(f"{self.spec.name}-{self.call.name}")
        self.learner = self.spec.learner(self.model, self.call.name)
        weights = self.model.weight_names(f"{self.call.name}.")
        self.width = len(self.model.weight(weights[-1])) if weights else 0  # number of channels of the output
        self.activations = QDrop(self.model, self.spec.drop)
        scaled = self.spec.scale_lr > 0
        self.scaled = learnable_activation_scales(self.model, f"{self.call.name}.") if scaled else {}

    @property
    def changes(self) -> list[str]:
        """Names of the tensors, as in `QuantizedModel.tensors`, that the reconstruction changes."""
        return [*self.learner.changes, *self.scaled]

    def run(self, teacher: Propagation, student: Propagation, finished: FinishedParts) -> Hidden:
        """Trains the block, or restores it if a killed run has finished it; returns what it hands to later blocks.

        A block with nothing to learn stays as it is.

        Images pass through restored blocks too, so a resumed run computes the same numbers in the same order.
        """
        teacher_inputs = teacher.inputs_of(self.call)
        targets = teacher.through(self.call, teacher_inputs)
        inputs, changes = teacher_inputs, self.changes
        if self.spec.inputs == "quantized":
            with self.model.visiting(self.spec.quantized(self.model)):
                inputs = student.inputs_of(self.call)
        if not changes or finished.restore(changes):
            self.advance(self.spec.iterations)
        else:
            self.train(BlockData(inputs, teacher_inputs, targets, self._importance(teacher.network)))
            tensors = self.model.tensors()
            self.ranks.equalise(tensors[name] for name in changes)
            finished.keep(changes)
            if self.path and self.ranks.leads:
                self.path.unlink(missing_ok=True)
        if self.spec.inputs == "teacher":
            return targets
        with self.model.visiting(self.spec.quantized(self.model)):
            return student.through(self.call, inputs)

    def _importance(self, teacher: nn.Module) -> Hidden | None:
        if not self.spec.fisher:
            return None
        return squared_gradients(
            teacher,
            self.model,
            self.call,
            self.calibration.images,
            self.spec.batch,
            self.spec.quantized(self.model),
            self.calibration.teacher.headless,
        )

    def train(self, data: BlockData) -> None:
        """Trains the block."""
        with (
            learned_scales(self.scaled.values()),
            trainable(self.learner.parameters),
            self.model.visiting(self.visit),
        ):
            self.optimise(data)
        self.learner.finish()

    def visit(self, name: str, kind: str, tensor: Tensor) -> Tensor:
        """The tensor that is used at a site of the block while it learns."""
        return self.learner.weight(name, tensor) if kind == WEIGHT else self.activations(name, kind, tensor)

    @torch.enable_grad()
    def optimise(self, data: BlockData) -> None:
        """The optimiser steps, from the stored state of a killed run if there is one.

        The tensors to learn must be trainable, and the sites must be visited by `visit`.
        """
        training, iterations = self.training(), self.spec.iterations
        rates, saved = LearningRates(training.optimizer), time.monotonic()
        self._restore(training)
        for iteration in range(training.iteration, iterations):
            done, share = iteration / iterations, self._share(iteration)
            rates.scale(self.spec.rate(done))
            error, penalty = self._error(data, share, iteration), self.learner.penalty(done)
            loss = error + penalty * share.weight_of_common
            take_step(training.optimizer, loss, share)
            if iteration % _CHECK_EVERY == _CHECK_EVERY - 1 or iteration == iterations - 1:
                self._report(iteration, float(error.detach()), float(loss.detach()))
                if self.path and self.ranks.leads and time.monotonic() - saved >= SAVE_SECONDS:
                    training.iteration, saved = iteration + 1, time.monotonic()
                    training.save(self.path)

    def _share(self, iteration: int) -> Share:
        """The images of an optimiser step."""
        rows = batch_rows(self.calibration, self.spec.batch, iteration, *self.purpose, among=self.trained_on)
        return Share.of(self.ranks, rows, self.calibration.images)

    def _error(self, data: BlockData, share: Share, iteration: int) -> Tensor:
        """The error of the block's output on the images of an optimiser step."""
        images = len(self.calibration.images)
        inputs = of_images(data.inputs, images, share.own)
        if self.spec.drop:
            self.activations.seed(drop_generator(self.calibration, iteration, *self.purpose), share)
            inputs = self.activations.mixed_inputs(of_images(data.teacher_inputs, images, share.own), inputs)
        with self.calibration.runtime.autocast():
            output = self.call.run(self.model.network, inputs)
        return self.error(output, data, share, iteration)

    def error(self, output: Hidden, data: BlockData, share: Share, iteration: int) -> Tensor:
        """The error of the whole batch, from the block's ``output`` for the images of a share."""
        images = len(self.calibration.images)
        targets = of_images(data.targets, images, share.rows)
        importance = data.importance and channels_last(of_images(data.importance, images, share.rows), self.width)
        found = channels_last(share.joined(output), self.width)
        return self.spec.distance(found, channels_last(targets, self.width), importance)

    @property
    def ranks(self) -> Ranks:
        """The processes that learn together."""
        return self.calibration.runtime.ranks

    @property
    def purpose(self) -> tuple[str | int, ...]:
        """Of the seeds."""
        return self.spec.name, self.calibration.index, self.call.name

    def training(self) -> Training:
        """The tensors to learn and their optimiser."""
        scales = {name: quantizer.tensors()["scale"] for name, quantizer in self.scaled.items()}
        rates = [([scale], self.spec.scale_rate(scale)) for scale in scales.values()]
        optimizer = adam((self.learner.parameters, self.spec.lr), *rates)
        named = {f"learned.{index}": parameter for index, parameter in enumerate(self.learner.parameters)}
        return Training({**named, **scales}, optimizer, key=self.calibration.state_key(self.spec))

    def _restore(self, training: Training) -> None:
        """Restores the state that a killed run stored in the middle of the block."""
        if self.path:
            training.resume(self.path, self.ranks)
        if training.iteration:
            self.advance(training.iteration)

    def _report(self, iteration: int, error: float, loss: float) -> None:
        if not math.isfinite(loss):
            raise NonFiniteError(
                f"{self.spec.name}: the error of {self.call.name} is not finite in iteration {iteration}; try a lower "
                "lr, or runtime.precision='float32'"
            )
        self.advance(iteration % _CHECK_EVERY + 1, error=error)
