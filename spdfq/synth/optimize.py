"""Images optimised from noise: the loop that all data-free methods share."""

import time
from pathlib import Path
from typing import Any

import torch
from attrs import define, field, validators
from torch import Tensor

from spdfq.attention import AttentionRecord, record_attention
from spdfq.errors import NonFiniteError
from spdfq.losses.attention_prior import AttentionPriorLoss
from spdfq.losses.base import LossInputs
from spdfq.models import Teacher
from spdfq.registry import sources
from spdfq.runtime import Advance, Runtime
from spdfq.structure import component, component_list, components
from spdfq.synth.augmentations import Move
from spdfq.synth.base import Source, SyntheticImages
from spdfq.synth.group import Balance, GroupState
from spdfq.synth.optimizers import Adam, WarmupCosine
from spdfq.synth.samplers import CropPlan, MultiSemanticSampler, WholeImageSampler
from spdfq.synth.sources import noise
from spdfq.synth.targets import OneHotTarget, SoftLabelTarget

_CHECK_EVERY = 10
_SAVE_SECONDS = 5.0
_SHOWN_IMAGES = 4


@sources.register("optimize")
@define(kw_only=True)
class OptimizedImages(Source):
    """Images optimised from Gaussian noise so that the teacher's outputs and attention look natural.

    Args:
        images: how many images.
        group: images optimised together; everything batch-wide is defined over a group.
        iterations: optimiser steps of each group.
        losses: what is minimised; the key is the loss's name.
        sampler: which classes an image shows and where.
        target: distribution the outputs are pulled towards.
        augmentations: applied in order to the whole images in every iteration (crops stay as they are).
        optimizer: of the pixels.
        schedule: of the learning rate.
    """

    group: int = field(default=32, validator=validators.ge(1))
    iterations: int = field(default=1000, validator=validators.ge(1))
    losses: dict[str, Any] = components("loss")
    sampler: Any = component("sampler", default=WholeImageSampler)
    target: Any = component("target", default=OneHotTarget)
    augmentations: tuple[Any, ...] = component_list("augmentation")
    optimizer: Any = component("optimizer", default=Adam)
    schedule: Any = component("schedule", default=WarmupCosine)

    def __attrs_post_init__(self) -> None:
        if not self.losses:
            raise ValueError("has no losses; add one, for example [synthesis.losses.soft_cross_entropy]")
        automatic = any(loss.weight == "auto" for loss in self.losses.values())
        if automatic and not any(loss.label_loss for loss in self.losses.values()):
            raise ValueError("weight = 'auto' balances against a label loss; add soft_cross_entropy or cross_entropy")

    def advice(self) -> list[str]:
        """Combinations that run but are known to lose accuracy."""
        if isinstance(self.sampler, MultiSemanticSampler) and not isinstance(self.target, SoftLabelTarget):
            return ["multi_semantic without soft labels is known to lose accuracy; set target = 'soft_label'"]
        return []

    def synthesize(self, teacher: Teacher, runtime: Runtime, folder: Path | None = None) -> SyntheticImages:
        """Optimise the groups one after the other; finished and begun ones found in ``folder`` are taken up."""
        starts = range(0, self.images, self.group)
        with teacher.frozen(), runtime.progress("synthesising", len(starts) * self.iterations) as advance:
            parts = []
            for index, start in enumerate(starts):
                count = min(self.group, self.images - start)
                parts.append(_Group(self, teacher, runtime, index, count).run(advance, folder))
        return _joined(parts)

    @property
    def needs(self) -> frozenset[str]:
        """What the losses need to be recorded."""
        return frozenset().union(*(loss.needs for loss in self.losses.values()))


class _Group:
    """One group of images on its way through the iterations."""

    def __init__(self, spec: OptimizedImages, teacher: Teacher, runtime: Runtime, index: int, count: int) -> None:
        self.spec, self.teacher, self.runtime, self.index, self.count = spec, teacher, runtime, index, count
        self.size: tuple[int, int] = teacher.input_size[1:]
        self.columns = (*spec.losses, "total", "gradient")
        self.kept: dict[Any, Any] = {}
        self.plan: CropPlan = spec.sampler.sample(count, self.size, teacher.num_classes, self.generator("sampler"))
        self.labels, self.targets = self._labels_and_targets()
        self.state = self._begin()
        self.low, self.high = teacher.pixel_range(self.state.images)

    def generator(self, *purpose: str | int) -> torch.Generator:
        return self.runtime.generator("group", self.index, *purpose)

    def run(self, advance: Advance, folder: Path | None) -> SyntheticImages:
        """All iterations that are still to do, then the result."""
        path = folder / f"group-{self.index:05d}.safetensors" if folder else None
        if path and path.exists():
            self.state.restore(path)
            advance(self.state.iteration)
        saved = time.monotonic()
        for iteration in range(self.state.iteration, self.spec.iterations):
            self._step(iteration)
            self.state.iteration = iteration + 1
            last = iteration + 1 == self.spec.iterations
            if last or (iteration + 1) % _CHECK_EVERY == 0:
                self._check(iteration)
                advance(iteration % _CHECK_EVERY + 1, **self._latest(iteration))
                if path and (last or time.monotonic() - saved > _SAVE_SECONDS):
                    self.state.save(path)
                    saved = time.monotonic()
        return self._result()

    def _begin(self) -> GroupState:
        start = noise(self.count, self.teacher, self.generator("noise")).to(self.runtime.device)
        images = start.requires_grad_()
        curve = torch.zeros(self.spec.iterations, len(self.columns), device=images.device)
        return GroupState(images, self.spec.optimizer.build(images), Balance(self.spec.losses), curve)

    def _labels_and_targets(self) -> tuple[Tensor, Tensor]:
        """``[B+M, K]`` of the images and then of the crops."""
        classes = self.teacher.num_classes
        whole = self.plan.label_mask(self.count, classes)
        crops = torch.nn.functional.one_hot(self.plan.labels, classes).bool()
        mask = torch.cat([whole, crops])
        shown = [row.nonzero().flatten() for row in mask]
        targets = self.spec.target.sample(shown, classes, self.generator("target"))
        return mask.to(self.runtime.device), targets.to(self.runtime.device)

    def _step(self, iteration: int) -> None:
        state = self.state
        inputs = self._forward(iteration)
        terms = {name: loss(inputs) for name, loss in self.spec.losses.items()}
        state.balance.observe(terms, state.images, iteration)
        weighted = [term * state.balance.weight(name) for name, term in terms.items()]
        total = torch.stack(weighted).sum()
        (gradient,) = torch.autograd.grad(total, state.images)
        state.images.grad = gradient
        state.curve[iteration] = torch.stack([*terms.values(), total, gradient.norm()]).detach()
        for group in state.optimizer.param_groups:
            group["lr"] = self.spec.optimizer.lr * self.spec.schedule.factor(iteration, self.spec.iterations)
        state.optimizer.step()
        with torch.no_grad():
            state.images.copy_(torch.minimum(torch.maximum(state.images, self.low), self.high))

    def _forward(self, iteration: int) -> LossInputs:
        """One pass of the teacher over the moved images and, where they are due, the crops."""
        move = self._move(iteration)
        images = move.apply(self.state.images)
        crops = self.plan.due(iteration)
        views = torch.cat([images, self.plan.views(self.state.images, self.size)]) if crops else images
        with record_attention(self.teacher.module, self.spec.needs, rows=self.count) as record, self.runtime.autocast():
            logits = self.teacher.module(views).float()
        return self._inputs(images, logits, record, move)

    def _inputs(self, images: Tensor, logits: Tensor, record: AttentionRecord, move: Move) -> LossInputs:
        used = len(logits)
        return LossInputs(
            images=images,
            logits=logits,
            targets=self.targets[:used],
            labels=self.labels[:used],
            view_weights=self._view_weights()[:used],
            attention=record,
            flip=move.flip,
            shift=move.shift,
            generator=self.generator,
            kept=self.kept,
        )

    def _move(self, iteration: int) -> Move:
        move = Move()
        for index, augmentation in enumerate(self.spec.augmentations):
            move = move.then(augmentation.draw(self.generator("augmentation", index, iteration)))
        return move

    def _view_weights(self) -> Tensor:
        if "view_weights" not in self.kept:
            crops = torch.bincount(self.plan.owners, minlength=self.count)[self.plan.owners]
            weights = torch.cat([torch.ones(self.count), 1 / crops]) / self.count
            self.kept["view_weights"] = weights.to(self.runtime.device)
        return self.kept["view_weights"]

    def _check(self, iteration: int) -> None:
        """Refuse to go on, and to save, after a loss or gradient that is not finite."""
        first = iteration - iteration % _CHECK_EVERY
        wrong = (~self.state.curve[first : iteration + 1].isfinite()).nonzero()
        if len(wrong):
            row, column = wrong[0].tolist()
            raise NonFiniteError(
                f"synthesis: {self.columns[column]} is not finite in iteration {first + row} of group {self.index}; try "
                "a lower synthesis.optimizer.lr, a lower weight of that loss, or runtime.precision='float32'"
            )

    def _latest(self, iteration: int) -> dict[str, float]:
        return dict(zip(self.columns, self.state.curve[iteration].tolist(), strict=True))

    def _result(self) -> SyntheticImages:
        plan = self.plan
        result = SyntheticImages(
            images=self.state.images.detach().cpu(),
            boxes=plan.boxes,
            owners=plan.owners,
            labels=plan.labels,
            curves=self.state.curve.cpu().unsqueeze(0),
            columns=self.columns,
        )
        for loss in self.spec.losses.values():
            if isinstance(loss, AttentionPriorLoss) and self.index == 0:
                self._add_maps(result, loss)
        return result

    @torch.no_grad()
    def _add_maps(self, result: SyntheticImages, loss: AttentionPriorLoss) -> None:
        """The priors of the first images' first head beside the attention that was reached."""
        with record_attention(self.teacher.module, loss.needs) as record, self.runtime.autocast():
            self.teacher.module(self.state.images)
        inputs = self._inputs(self.state.images, torch.zeros(0, 1), record, Move())
        result.first_block = loss.start(len(record.class_attention))
        blocks = range(result.first_block, len(record.class_attention))
        result.prior = self._pictures([loss.maps(inputs, block) for block in blocks], record, blocks)
        result.reached = self._pictures([record.class_attention[block] for block in blocks], record, blocks)

    def _pictures(self, maps: list[Tensor], record: AttentionRecord, blocks: range) -> Tensor:
        """``[m, blocks, h, w]`` of the first head, windows put side by side, all blocks at the finest grid."""
        tiled = [_tiled(m[:, 0], record.grids[block], self.count) for m, block in zip(maps, blocks, strict=True)]
        finest = max((tuple(m.shape[-2:]) for m in tiled), key=lambda grid: grid[0] * grid[1])
        fitted = [torch.nn.functional.interpolate(m[:_SHOWN_IMAGES].unsqueeze(1), finest) for m in tiled]
        return torch.cat(fitted, 1).float().cpu()


def _tiled(maps: Tensor, grid: tuple[int, int], images: int) -> Tensor:
    """``[B*n*n, h*w]`` windows to ``[B, n*h, n*w]``."""
    side = round((len(maps) / images) ** 0.5)
    windows = maps.view(images, side, side, *grid)
    return windows.transpose(2, 3).reshape(images, side * grid[0], side * grid[1])


def _joined(parts: list[SyntheticImages]) -> SyntheticImages:
    first, offset = parts[0], 0
    owners = []
    for part in parts:
        owners.append(part.owners + offset)
        offset += len(part.images)
    return SyntheticImages(
        images=torch.cat([part.images for part in parts]),
        boxes=torch.cat([part.boxes for part in parts]),
        owners=torch.cat(owners),
        labels=torch.cat([part.labels for part in parts]),
        curves=torch.cat([part.curves for part in parts]),
        columns=first.columns,
        prior=first.prior,
        reached=first.reached,
        first_block=first.first_block,
    )
