"""Distillation of the whole network: the quantized model learns the teacher's outputs on the synthetic images."""

import math
import time
from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from attrs import define, field, frozen, validators
from torch import Tensor, nn

from spdfq.backends.base import NEITHER, Calibration, Step, check_calibrated_by
from spdfq.backends.learning.activations import Activations, scaled_activations
from spdfq.backends.learning.blocks import BlockCall, block_calls, block_names
from spdfq.backends.learning.divergence import divergence
from spdfq.backends.learning.epochs import batch_rows, noise
from spdfq.backends.learning.training import SAVE_SECONDS, Training, adam, learning, take_step
from spdfq.errors import ModelError, NonFiniteError, SpdfqError
from spdfq.quantized.model import QuantizedModel
from spdfq.quantized.products import SOFTMAX, WEIGHT, Visit, products
from spdfq.quantizers import learned_scales
from spdfq.registry import steps
from spdfq.runtime import Advance

_CHECK_EVERY = 10
_C1, _C2 = 0.01**2, 0.03**2


@steps.register("distill", paper="arXiv:2407.20021")
@define(kw_only=True)
class Distill(Step):
    """Train the whole quantized model towards the teacher: KL divergence of the logits, block outputs, attention maps.

    Of a teacher without a head, the relative squared difference of the features instead of the divergence. Adam with
    cosine decay and a straight-through gradient. ``structure`` is MimiQ's head-wise term (arXiv 2407.20021), one minus
    the structural similarity of the teacher's and the student's attention maps, head by head.

    Args:
        iterations: optimiser steps.
        lr: of Adam, with cosine decay to zero.
        batch: images in one step; all of them where there are fewer.
        features: weight of the blocks' outputs: squared difference over the teacher's own square, mean over blocks.
        structure: weight of the attention maps.
        learned: ``weights``, the quantized ones, or ``all`` parameters of the network.
        drop: share of the activations that each step leaves in float (QDrop, arXiv 2203.05740).
        scale_lr: learning rate of the activations' scales (LSQ, arXiv 1902.08153; 4e-5 in QDrop); 0 keeps them.
    """

    calibrates: ClassVar[frozenset[str]] = NEITHER

    iterations: int = field(default=500, validator=validators.ge(1))
    lr: float = field(default=1e-5, validator=validators.gt(0.0))
    batch: int = field(default=32, validator=validators.ge(1))
    features: float = field(default=0.0, validator=validators.ge(0.0))
    structure: float = field(default=0.0, validator=validators.ge(0.0))
    learned: Literal["weights", "all"] = "weights"
    drop: float = field(default=0.0, validator=[validators.ge(0.0), validators.lt(1.0)])
    scale_lr: float = field(default=0.0, validator=validators.ge(0.0))

    def check(self, model: QuantizedModel, before: Sequence[Step]) -> None:
        """Refuse to come before calibration."""
        check_calibrated_by(before, model)

    def run(self, model: QuantizedModel, calibration: Calibration) -> None:
        """Train; a killed run goes on from its last stored state.

        Raises:
            ModelError: ``features`` are asked for and the model has no blocks, or ``structure`` and it has no maps.
            NonFiniteError: the loss is not finite.
            SpdfqError: a site was not calibrated, or there is nothing to learn.
        """
        model.check_calibrated()
        scaled = scaled_activations(model, "") if self.scale_lr else {}
        named, path = self._parameters(model), calibration.state_file("distill")
        if not named and not scaled:
            raise SpdfqError("distill: no quantized weight to learn; set learned = 'all' or scale_lr, or leave it out")
        with (
            calibration.teacher.frozen() as float_network,
            learned_scales(scaled.values()) as scales,
            learning(named.values()),
            calibration.runtime.progress("distilling", self.iterations) as advance,
        ):
            own = dict(zip(scaled, scales, strict=True))
            training = Training({**named, **own}, adam((list(named.values()), self.lr), (scales, self.scale_lr)))
            if path and path.exists():
                training.restore(path)
            calls = block_calls(float_network, block_names(model), calibration.images[:1]) if self.features else []
            pair = _Pair(float_network, model, Activations(model, self.drop), calls, bool(self.structure))
            advance(training.iteration)
            _Loop(self, calibration, pair, training, advance).run()

    def _parameters(self, model: QuantizedModel) -> dict[str, Tensor]:
        named: dict[str, Tensor] = dict(model.network.named_parameters())
        return named if self.learned == "all" else {name: named[name] for name in model.weight_names()}

    def loss(self, student: "Seen", teacher: "Seen", headless: bool = False) -> Tensor:
        """The sum of the weighted terms; see `divergence` for ``headless``."""
        loss = divergence(student.logits, teacher.logits, headless).mean()
        if self.features:
            loss = loss + self.features * torch.stack(list(map(relative_error, student.blocks, teacher.blocks))).mean()
        if self.structure:
            if not teacher.maps:
                raise ModelError("distill: structure compares attention maps; this model has none; set structure = 0")
            similar = [map_similarity(*maps) for maps in zip(student.maps, teacher.maps, strict=True)]
            loss = loss + self.structure * (1 - torch.stack(similar).mean())
        return loss


@frozen(eq=False)
class Seen:
    """What one forward pass shows.

    Args:
        logits: ``[B, C]``.
        blocks: output of each block.
        maps: attention probabilities ``[..., N, K]``.
    """

    logits: Tensor
    blocks: list[Tensor]
    maps: list[Tensor]


def relative_error(output: Tensor, target: Tensor) -> Tensor:
    """``‖output - target‖² / ‖target‖²``."""
    return (output.float() - target.float()).square().sum() / target.float().square().sum().clamp(min=1e-12)


def map_similarity(ours: Tensor, theirs: Tensor) -> Tensor:
    """Mean structural similarity of attention maps ``[..., N, K]``, each row in one window (MimiQ, 2407.20021).

    Rows are brought to 0..1 first; C1 = 0.01², C2 = 0.03².
    """
    first, second = _stretched(ours), _stretched(theirs)
    means = first.mean(-1), second.mean(-1)
    centred = first - means[0].unsqueeze(-1), second - means[1].unsqueeze(-1)
    variances = centred[0].square().mean(-1), centred[1].square().mean(-1)
    covariance = (centred[0] * centred[1]).mean(-1)
    luminance = (2 * means[0] * means[1] + _C1) / (means[0].square() + means[1].square() + _C1)
    return (luminance * (2 * covariance + _C2) / (variances[0] + variances[1] + _C2)).mean()


def _stretched(maps: Tensor) -> Tensor:
    maps = maps.float()
    low, high = maps.amin(-1, keepdim=True), maps.amax(-1, keepdim=True)
    return (maps - low) / (high - low).clamp(min=1e-8)


@define(eq=False)
class _Pair:
    """The teacher and the model that learns."""

    teacher: nn.Module
    model: QuantizedModel
    activations: Activations
    calls: list[BlockCall]
    maps: bool

    def student(self, images: Tensor) -> Seen:
        return self._seen(self.model.network, images, self._operand)

    @torch.no_grad()
    def wanted(self, images: Tensor) -> Seen:
        return self._seen(self.teacher, images, lambda name, kind, tensor: tensor)

    def _operand(self, name: str, kind: str, tensor: Tensor) -> Tensor:
        return self.model.quantized(name, kind, tensor) if kind == WEIGHT else self.activations(name, kind, tensor)

    def _seen(self, network: nn.Module, images: Tensor, operand: Visit) -> Seen:
        maps: list[Tensor] = []
        blocks: list[Tensor] = []

        def visit(name: str, kind: str, tensor: Tensor) -> Tensor:
            if self.maps and kind == SOFTMAX:
                maps.append(tensor)
            return operand(name, kind, tensor)

        handles = [call.watch(network, blocks.extend) for call in self.calls]
        try:
            with products(network, visit, points=self.model.points):
                return Seen(network(images), blocks, maps)
        finally:
            for handle in handles:
                handle.remove()


@define(eq=False)
class _Loop:
    """The optimiser steps, with what is stored and shown on the way."""

    spec: Distill
    calibration: Calibration
    pair: _Pair
    training: Training
    advance: Advance
    saved: float = field(factory=lambda: time.monotonic(), init=False)

    @torch.enable_grad()
    def run(self) -> None:
        optimizer, iterations = self.training.optimizer, self.spec.iterations
        rates = [float(group["lr"]) for group in optimizer.param_groups]
        while self.training.iteration < iterations:
            factor = 0.5 * (1 + math.cos(math.pi * self.training.iteration / iterations))
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * factor
            loss = self._loss()
            take_step(optimizer, loss)
            self.training.iteration += 1
            if self.training.iteration % _CHECK_EVERY == 0 or self.training.iteration == iterations:
                self._check(float(loss.detach()))

    def _loss(self) -> Tensor:
        purpose = ("distill", self.calibration.index)
        images = self.calibration.images[
            batch_rows(self.calibration, self.spec.batch, self.training.iteration, *purpose)
        ]
        self.pair.activations.seed(noise(self.calibration, self.training.iteration, *purpose))
        with self.calibration.runtime.autocast():
            student, teacher = self.pair.student(images), self.pair.wanted(images)
        return self.spec.loss(student, teacher, self.calibration.teacher.headless)

    def _check(self, loss: float) -> None:
        done = self.training.iteration
        if not math.isfinite(loss):
            raise NonFiniteError(
                f"distill: the loss is not finite in iteration {done - 1}; try a lower lr, or "
                "runtime.precision='float32'"
            )
        self.advance((done - 1) % _CHECK_EVERY + 1, loss=loss)
        path = self.calibration.state_file("distill")
        if path and (done == self.spec.iterations or time.monotonic() - self.saved >= SAVE_SECONDS):
            self.training.save(path)
            self.saved = time.monotonic()
