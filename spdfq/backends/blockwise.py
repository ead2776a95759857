"""Block-wise reconstruction: the weights of one block after the other learn to undo the quantization error."""

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from attrs import define, field, validators
from torch import Tensor, nn

from spdfq.backends.base import Calibration, Step
from spdfq.backends.blocks import BlockCall, Hidden, block_calls, block_names
from spdfq.backends.model import QuantizedModel
from spdfq.backends.stream import Stream, rows
from spdfq.errors import DataError, NonFiniteError
from spdfq.files import read_tensors, write_tensors
from spdfq.registry import steps
from spdfq.runtime import Advance

_CHECK_EVERY = 10


@steps.register("blockwise", paper="arXiv:2412.16553")
@define(kw_only=True)
class Blockwise(Step):
    """Reconstruct block by block: minimise the 2-norm of the difference to the teacher's block output.

    Adam on the block's quantized weights with a straight-through gradient; LayerNorm, scales and zero points stay as
    they are (SPDFQ, arXiv 2412.16553, section 3.4; I&S-ViT, arXiv 2311.10126).

    Args:
        iterations: optimiser steps of each block.
        lr: of Adam, with cosine decay to zero.
        batch: images in one step; all of them where there are fewer.
        inputs: what enters the quantized block: the ``quantized`` prefix's output, or the ``teacher``'s (unpublished).
        biases: learn the biases beside the weights (unpublished).
    """

    iterations: int = field(default=100, validator=validators.ge(1))
    lr: float = field(default=4e-5, validator=validators.gt(0.0))
    batch: int = field(default=32, validator=validators.ge(1))
    inputs: Literal["quantized", "teacher"] = "quantized"
    biases: bool = False

    def run(self, model: QuantizedModel, calibration: Calibration) -> None:
        """Reconstruct every block; blocks that a killed run finished are taken from its state file."""
        names = block_names(model)
        path = calibration.state_file("blockwise")
        learned = read_tensors(path, "delete it, or use --fresh")[0] if path and path.exists() else {}
        with calibration.teacher.frozen() as float_network:
            calls = block_calls(float_network, names, calibration.images[:1])
            teacher = Stream(float_network, calibration.images, self.batch)
            student = Stream(model.network, calibration.images, self.batch)
            with calibration.runtime.progress("reconstructing", len(calls) * self.iterations) as advance:
                for call in calls:
                    job = _Job(self, call, self._parameters(model, call.name), calibration, advance)
                    if job.run(model, teacher, student, learned) and path:
                        write_tensors(path, learned)

    def _parameters(self, model: QuantizedModel, block: str) -> dict[str, Tensor]:
        weights = [name for name in model.weight_names() if name.startswith(f"{block}.")]
        named = dict(model.network.named_parameters())
        biases = [name.removesuffix("weight") + "bias" for name in weights] if self.biases else []
        return {name: named[name] for name in [*weights, *biases] if name in named}


@define(eq=False)
class _Job:
    """The reconstruction of one block."""

    spec: Blockwise
    call: BlockCall
    parameters: dict[str, Tensor]
    calibration: Calibration
    advance: Advance

    def run(self, model: QuantizedModel, teacher: Stream, student: Stream, learned: dict[str, Tensor]) -> bool:
        """Whether there was something to learn that was not learned before; then ``learned`` has it.

        Finished blocks are passed through as well: a resumed run computes the same numbers in the same order.
        """
        hidden = teacher.enter(self.call)
        target = teacher.leave(self.call, hidden)
        new = bool(self.parameters.keys() - learned.keys())
        with model.quantizing():
            if self.spec.inputs == "quantized":
                hidden = student.enter(self.call)
            if new:
                with _learning(self.parameters.values()):
                    self._optimise(model.network, hidden, target)
                learned |= self.parameters
            else:
                _restore(self.parameters, learned)
                self.advance(self.spec.iterations)
            if self.spec.inputs == "quantized":
                student.leave(self.call, hidden)
        return new

    @torch.enable_grad()
    def _optimise(self, network: nn.Module, hidden: Hidden, target: Hidden) -> None:
        parameters, iterations, images = list(self.parameters.values()), self.spec.iterations, self.calibration.images
        optimizer = torch.optim.Adam(parameters, lr=self.spec.lr)
        for iteration in range(iterations):
            optimizer.param_groups[0]["lr"] = self.spec.lr * 0.5 * (1 + math.cos(math.pi * iteration / iterations))
            chosen = self._rows(len(images), iteration)
            with self.calibration.runtime.autocast():
                output = self.call.run(network, rows(hidden, len(images), chosen))
            loss = _distance(output, rows(target, len(images), chosen))
            gradients = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = gradient
            optimizer.step()
            if iteration % _CHECK_EVERY == _CHECK_EVERY - 1 or iteration == iterations - 1:
                self._report(iteration, float(loss.detach()))

    def _rows(self, count: int, iteration: int) -> Tensor | slice:
        """The images of a step: a part of this epoch's random order, the last part possibly smaller."""
        if count <= self.spec.batch:
            return slice(None)
        epoch, step = divmod(iteration, -(-count // self.spec.batch))
        purpose = ("blockwise", self.calibration.index, self.call.name, epoch)
        order = torch.randperm(count, generator=self.calibration.runtime.generator(*purpose))
        return order[step * self.spec.batch : (step + 1) * self.spec.batch].to(self.calibration.images.device)

    def _report(self, iteration: int, loss: float) -> None:
        if not math.isfinite(loss):
            raise NonFiniteError(
                f"blockwise: the error of {self.call.name} is not finite in iteration {iteration}; try a lower lr, or "
                "runtime.precision='float32'"
            )
        self.advance(iteration % _CHECK_EVERY + 1, error=loss)


def _distance(output: Hidden, target: Hidden) -> Tensor:
    """The 2-norm of the difference, over all tensors together."""
    errors = [(ours.float() - theirs.float()).norm() for ours, theirs in zip(output, target, strict=True)]
    return torch.stack(errors).norm()


@contextmanager
def _learning(parameters: Iterable[Tensor]) -> Iterator[None]:
    learning = list(parameters)
    for parameter in learning:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter in learning:
            parameter.requires_grad_(False)
            parameter.grad = None


@torch.no_grad()
def _restore(parameters: dict[str, Tensor], learned: dict[str, Tensor]) -> None:
    for name, parameter in parameters.items():
        if learned[name].shape != parameter.shape:
            raise DataError(f"the state of an interrupted run has another {name}; delete it, or use --fresh")
        parameter.copy_(learned[name])
