"""Distillation of the whole network: the quantized model learns the teacher's outputs for the synthetic images."""

import math
import time
from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from attrs import define, field, frozen, validators
from torch import Tensor, nn

from spdfq.backends.base import NEITHER, Calibration, Step, check_calibrated_by
from spdfq.backends.blocks import BlockCall, block_calls, block_names
from spdfq.backends.divergence import divergence
from spdfq.backends.learning.activation_scales import learnable_activation_scales
from spdfq.backends.learning.batches import batch_rows, drop_generator
from spdfq.backends.learning.qdrop import QDrop
from spdfq.backends.learning.shares import Share
from spdfq.backends.learning.training import SAVE_SECONDS, LearningRates, Training, adam, take_step, trainable
from spdfq.errors import ModelError, NonFiniteError, SpdfqError
from spdfq.quantized.model import QuantizedModel
from spdfq.quantized.sites import SOFTMAX, WEIGHT
from spdfq.quantized.visiting import Visit, unchanged, visit_sites
from spdfq.quantizers import Quantizer, learned_scales
from spdfq.registry import steps
from spdfq.runtime import Advance
from spdfq.runtime.shared_modules import own_hooks

_CHECK_EVERY = 10
_NO_MAPS = "distill: structure compares attention maps; this model has none; set structure = 0"
# the constants of structural similarity for values in 0..1
_C1, _C2 = 0.01**2, 0.03**2


@steps.register("distill", paper="arXiv:2407.20021")
@define(kw_only=True)
class Distill(Step):
    """Train the whole quantized model towards the teacher: KL divergence of the logits, block outputs, attention maps.

    For a teacher without a head, the relative squared difference of the features replaces the divergence. Adam with
    cosine decay and a straight-through gradient. ``structure`` is MimiQ's head-wise term (arXiv 2407.20021): one minus
    the structural similarity of the teacher's and the student's attention maps, head by head.

    Args:
        iterations: optimiser steps.
        lr: learning rate of Adam, with cosine decay to zero.
        batch: images in one step; all of them if there are fewer.
        features: weight of the blocks' outputs: the squared difference, relative to the square of the teacher's output,
            averaged over blocks.
        structure: weight of the attention maps.
        learned: ``weights``, the quantized ones, or ``all`` parameters of the network.
        drop: share of the activations that each step leaves in float (QDrop, arXiv 2203.05740).
        scale_lr: learning rate of the activations' scales (LSQ, arXiv 1902.08153; 4e-5 in QDrop); 0 does not change
            them.
    """

    calibrates: ClassVar[frozenset[str]] = NEITHER
    changes_weights: ClassVar[bool] = True
    shared: ClassVar[bool] = True

    iterations: int = field(default=500, validator=validators.ge(1))
    lr: float = field(default=1e-5, validator=validators.gt(0.0))
    batch: int = field(default=32, validator=validators.ge(1))
    features: float = field(default=0.0, validator=validators.ge(0.0))
    structure: float = field(default=0.0, validator=validators.ge(0.0))
    learned: Literal["weights", "all"] = "weights"
    drop: float = field(default=0.0, validator=[validators.ge(0.0), validators.lt(1.0)])
    scale_lr: float = field(default=0.0, validator=validators.ge(0.0))

    def check(self, model: QuantizedModel, before: Sequence[Step]) -> None:
        """Refuses ranges that were not chosen before, a loss that the model cannot have, and nothing to learn."""
        super().check(model, before)
        check_calibrated_by(before, model)
        if self.features:
            block_names(model)
        if self.structure and not any(site.kind == SOFTMAX for site in model.sites.values()):
            raise ModelError(_NO_MAPS)
        if not (self.scale_lr and any(step.replaces_quantizers for step in before)):  # the run knows those quantizers
            self._learned(model)

    def run(self, model: QuantizedModel, calibration: Calibration) -> None:
        """Trains the model; a killed run continues from its last stored state.

        Raises:
            ModelError: ``features`` is set and the model has no blocks, or ``structure`` is set and it has no attention
                maps.
            NonFiniteError: the loss is not finite.
            SpdfqError: a site was not calibrated, or there is nothing to learn.
        """
        model.check_calibrated()
        calibration.runtime.ranks.equalise(model.tensors().values())
        named, scaled = self._learned(model)
        path, key = calibration.state_file("distill"), calibration.state_key(self)
        with (
            calibration.teacher.frozen() as float_network,
            learned_scales(scaled.values()) as scales,
            trainable(named.values()),
            calibration.runtime.progress("distilling", self.iterations) as advance,
        ):
            by_name = dict(zip(scaled, scales, strict=True))
            optimizer = adam((list(named.values()), self.lr), (scales, self.scale_lr))
            training = Training({**named, **by_name}, optimizer, key=key)
            if path:
                training.resume(path, calibration.runtime.ranks)
            calls = block_calls(float_network, block_names(model), calibration.images[:1]) if self.features else []
            pair = _TeacherAndStudent(float_network, model, QDrop(model, self.drop), calls, bool(self.structure))
            advance(training.iteration)
            targets = _Targets(pair, calibration.images, self.batch)
            _Loop(self, calibration, pair, targets, training, advance).run()

    def _learned(self, model: QuantizedModel) -> tuple[dict[str, Tensor], dict[str, Quantizer]]:
        """The parameters to learn, and the quantizers of the scales to learn, by name.

        Raises:
            SpdfqError: there are neither.
        """
        every: dict[str, Tensor] = dict(model.network.named_parameters())
        named = every if self.learned == "all" else {name: every[name] for name in model.weight_names()}
        scaled = learnable_activation_scales(model, "") if self.scale_lr else {}
        if not named and not scaled:
            raise SpdfqError("distill: no quantized weight to learn; set learned = 'all' or scale_lr, or leave it out")
        return named, scaled

    def loss(self, student: "ForwardResult", teacher: "ForwardResult", headless: bool = False) -> Tensor:
        """The sum of the weighted terms; see `divergence` for ``headless``."""
        loss = divergence(student.logits, teacher.logits, headless).mean()
        if self.features:
            loss = loss + self.features * torch.stack(list(map(relative_error, student.blocks, teacher.blocks))).mean()
        if self.structure:
            if not teacher.maps:
                raise ModelError(_NO_MAPS)
            similarities = [map_similarity(*maps) for maps in zip(student.maps, teacher.maps, strict=True)]
            loss = loss + self.structure * (1 - torch.stack(similarities).mean())
        return loss


@frozen(eq=False)
class ForwardResult:
    """What the loss needs of one forward pass.

    Args:
        logits: ``[B, C]``.
        blocks: the output of each block.
        maps: attention probabilities ``[..., N, K]``.
    """

    logits: Tensor
    blocks: list[Tensor]
    maps: list[Tensor]

    def joined(self, share: Share) -> "ForwardResult":
        """The results for the whole batch, from those of a share."""
        (logits,) = share.joined([self.logits])
        return ForwardResult(logits, list(share.joined(self.blocks)), list(share.joined(self.maps)))


def relative_error(output: Tensor, target: Tensor) -> Tensor:
    """``‖output - target‖² / ‖target‖²``."""
    return (output.float() - target.float()).square().sum() / target.float().square().sum().clamp(min=1e-12)


def map_similarity(ours: Tensor, theirs: Tensor) -> Tensor:
    """Mean structural similarity of attention maps ``[..., N, K]``; each row is one window (MimiQ, 2407.20021).

    Rows are scaled to 0..1 first; C1 = 0.01², C2 = 0.03².
    """
    first, second = _scaled_rows(ours), _scaled_rows(theirs)
    means = first.mean(-1), second.mean(-1)
    centred = first - means[0].unsqueeze(-1), second - means[1].unsqueeze(-1)
    variances = centred[0].square().mean(-1), centred[1].square().mean(-1)
    covariance = (centred[0] * centred[1]).mean(-1)
    luminance = (2 * means[0] * means[1] + _C1) / (means[0].square() + means[1].square() + _C1)
    return (luminance * (2 * covariance + _C2) / (variances[0] + variances[1] + _C2)).mean()


def _scaled_rows(maps: Tensor) -> Tensor:
    """Attention maps with each row scaled to 0..1."""
    maps = maps.float()
    low, high = maps.amin(-1, keepdim=True), maps.amax(-1, keepdim=True)
    return (maps - low) / (high - low).clamp(min=1e-8)


@define(eq=False)
class _TeacherAndStudent:
    teacher: nn.Module
    model: QuantizedModel
    activations: QDrop
    calls: list[BlockCall]
    needs_maps: bool

    def of_student(self, images: Tensor) -> ForwardResult:
        return self._forward(self.model.network, images, self._quantized)

    @torch.no_grad()
    def of_teacher(self, images: Tensor) -> ForwardResult:
        return self._forward(self.teacher, images, unchanged)

    def _quantized(self, name: str, kind: str, tensor: Tensor) -> Tensor:
        return self.model.quantized(name, kind, tensor) if kind == WEIGHT else self.activations(name, kind, tensor)

    def _forward(self, network: nn.Module, images: Tensor, visit: Visit) -> ForwardResult:
        maps: list[Tensor] = []
        blocks: list[Tensor] = []

        def collect_maps(name: str, kind: str, tensor: Tensor) -> Tensor:
            if self.needs_maps and kind == SOFTMAX:
                maps.append(tensor)
            return visit(name, kind, tensor)

        outputs = own_hooks(call.on_output(network, blocks.extend) for call in self.calls)
        with outputs, visit_sites(network, collect_maps, points=self.model.points):
            return ForwardResult(network(images), blocks, maps)


@define(eq=False)
class _Targets:
    """The teacher's results for the images of each step, computed once where they can be kept.

    Logits of all images are kept. Block outputs and attention maps are large: they are kept only if every step uses all
    images, and computed in each step otherwise.
    """

    pair: _TeacherAndStudent
    images: Tensor
    batch: int
    _whole: ForwardResult | None = field(default=None, init=False)
    _logits: Tensor | None = field(default=None, init=False)

    def of(self, share: Share) -> ForwardResult:
        """The results for the images of the whole batch; a slice means all of them."""
        if isinstance(share.rows, slice):
            self._whole = self._whole or self.pair.of_teacher(self.images)
            return self._whole
        if self.pair.calls or self.pair.needs_maps:
            return self.pair.of_teacher(self.images[share.own]).joined(share)
        if self._logits is None:
            parts = self.images.split(self.batch)
            self._logits = torch.cat([self.pair.of_teacher(part).logits for part in parts])
        return ForwardResult(self._logits[share.rows], [], [])


@define(eq=False)
class _Loop:
    """The optimiser steps, with progress and the stored state."""

    spec: Distill
    calibration: Calibration
    pair: _TeacherAndStudent
    targets: _Targets
    training: Training
    advance: Advance
    saved: float = field(factory=lambda: time.monotonic(), init=False)

    @torch.enable_grad()
    def run(self) -> None:
        optimizer, iterations = self.training.optimizer, self.spec.iterations
        rates = LearningRates(optimizer)
        while self.training.iteration < iterations:
            rates.scale(0.5 * (1 + math.cos(math.pi * self.training.iteration / iterations)))
            share = self._share()
            loss = self._loss(share)
            take_step(optimizer, loss, share)
            self.training.iteration += 1
            if self.training.iteration % _CHECK_EVERY == 0 or self.training.iteration == iterations:
                self._report(float(loss.detach()))

    @property
    def _purpose(self) -> tuple[str | int, ...]:
        return "distill", self.calibration.index

    def _share(self) -> Share:
        rows = batch_rows(self.calibration, self.spec.batch, self.training.iteration, *self._purpose)
        return Share.of(self.calibration.runtime.ranks, rows, self.calibration.images)

    def _loss(self, share: Share) -> Tensor:
        generator = drop_generator(self.calibration, self.training.iteration, *self._purpose)
        self.pair.activations.seed(generator, share)
        with self.calibration.runtime.autocast():
            student = self.pair.of_student(self.calibration.images[share.own]).joined(share)
            teacher = self.targets.of(share)
        return self.spec.loss(student, teacher, self.calibration.teacher.headless)

    def _report(self, loss: float) -> None:
        done = self.training.iteration
        if not math.isfinite(loss):
            raise NonFiniteError(
                f"distill: the loss is not finite in iteration {done - 1}; try a lower lr, or "
                "runtime.precision='float32'"
            )
        self.advance((done - 1) % _CHECK_EVERY + 1, loss=loss)
        path = self.calibration.state_file("distill") if self.calibration.runtime.ranks.leads else None
        if path and (done == self.spec.iterations or time.monotonic() - self.saved >= SAVE_SECONDS):
            self.training.save(path)
            self.saved = time.monotonic()
