"""Images optimised from noise: the loop that all data-free methods share."""

from pathlib import Path
from typing import Any

import torch
from attrs import define, field, validators

from spdfq.attention import AttentionRecord, record_attention
from spdfq.errors import RecipeError, SpdfqError
from spdfq.recipe.structure import component, component_list, components
from spdfq.registry import losses as registered
from spdfq.registry import sources
from spdfq.runtime import Advance, Runtime
from spdfq.synth.augmentations import RandomResizedCrop
from spdfq.synth.base import Source, SyntheticImages
from spdfq.synth.loop import OWN_COLUMNS, Group
from spdfq.synth.moves import CROPS_ARE_NOT_FOLLOWED
from spdfq.synth.optimizers import Adam, WarmupCosine
from spdfq.synth.pruning import TokenPruning, find_layout
from spdfq.synth.samplers import MultiSemanticSampler, WholeImageSampler
from spdfq.synth.sources import noise
from spdfq.synth.student import StudentFactory, StudentTraining
from spdfq.synth.targets import NoTarget, OneHotTarget, SoftLabelTarget
from spdfq.teacher import Teacher

_RESERVED = {*OWN_COLUMNS, "steps"}


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
        pruning: leaves patches out of the forward passes as the run goes on; none where the section is missing.
        student: a quantized model that learns beside the images, for losses that compare the teacher with it; none
            where the section is missing.
    """

    group: int = field(default=32, validator=validators.ge(1))
    iterations: int = field(default=1000, validator=validators.ge(1))
    losses: dict[str, Any] = components("loss")
    sampler: Any = component("sampler", default=WholeImageSampler)
    target: Any = component("target", default=OneHotTarget)
    augmentations: tuple[Any, ...] = component_list("augmentation")
    optimizer: Any = component("optimizer", default=Adam)
    schedule: Any = component("schedule", default=WarmupCosine)
    pruning: TokenPruning | None = None
    student: StudentTraining | None = None

    def __attrs_post_init__(self) -> None:
        if not self.losses:
            raise ValueError("has no losses; add one, for example [synthesis.losses.soft_cross_entropy]")
        if taken := _RESERVED & set(self.losses):
            raise ValueError(f"losses.{min(taken)}: columns of losses.csv have that name; choose another")
        automatic = [name for name, loss in self.losses.items() if loss.weight == "auto"]
        label_weights = {name: loss.weight for name, loss in self.losses.items() if loss.label_loss}
        if wrong := [name for name in automatic if name in label_weights]:
            raise ValueError(f"losses.{wrong[0]}: a label loss is what 'auto' balances against; give it a number")
        if label_weights and isinstance(self.target, NoTarget):
            raise ValueError(f"losses.{min(label_weights)}: needs labels, but target is 'none'; set target = 'one_hot'")
        comparing = [name for name, loss in self.losses.items() if loss.needs_student]
        if comparing and not self.student:
            raise ValueError(f"losses.{comparing[0]}: compares with a student; add an empty [synthesis.student]")
        if self.student and not comparing:
            raise ValueError("student: no loss compares with it; add teacher_student_discrepancy, or leave it out")
        if automatic and not any(weight > 0 for weight in label_weights.values()):
            raise ValueError("weight = 'auto' balances against a label loss; add soft_cross_entropy or cross_entropy")

    def advice(self) -> list[str]:
        """Combinations that run but are known to lose accuracy, to cost time for nothing, or to change nothing."""
        lines = []
        if self.pruning and (late := [at for at in self.pruning.at if at >= self.iterations]):
            lines.append(f"pruning.at: {late} is never reached in {self.iterations} iterations; lower it")
        if isinstance(self.sampler, MultiSemanticSampler) and isinstance(self.target, NoTarget):
            lines.append("multi_semantic crops have no use without labels; set sampler = 'whole_image'")
        elif isinstance(self.sampler, MultiSemanticSampler) and not isinstance(self.target, SoftLabelTarget):
            lines.append("multi_semantic without soft labels is known to lose accuracy; set target = 'soft_label'")
        return lines

    def check(self, teacher: Teacher) -> None:
        """Refuse what needs classes where the teacher has none, and attention that cannot be recorded or pruned."""
        if teacher.headless:
            self._check_labels(teacher)
        self._check_attention(teacher)

    def _check_labels(self, teacher: Teacher) -> None:
        why = f"but {teacher.name} has no head (num_classes = 0)"
        without = ", ".join(name for name in registered.names() if not registered.get(name).label_loss)
        problems = [
            f"synthesis.losses.{name}: needs classes, {why}; take losses that need none ({without}), each with a "
            "number as its weight, or the model with its head"
            for name, loss in self.losses.items()
            if loss.label_loss
        ]
        if getattr(self.sampler, "needs_classes", True):
            problems.append(
                f"synthesis.sampler: draws a class for each crop, {why}; set sampler = 'whole_image', or take the "
                "model with its head"
            )
        if problems:
            raise RecipeError(problems)

    @torch.no_grad()
    def _check_attention(self, teacher: Teacher) -> None:
        image = noise(1, teacher, torch.Generator().manual_seed(0)).to(teacher.device)
        with teacher.frozen() as module, record_attention(module, self.needs) as record:
            module(image)
        if self.pruning:
            find_layout(teacher)
        self._check_losses(record)
        whole = any(len(row) == len(image) for row in record.class_attention)
        following = self.pruning or (whole and any(getattr(loss, "follow", False) for loss in self.losses.values()))
        if following and any(isinstance(each, RandomResizedCrop) for each in self.augmentations):
            raise RecipeError([CROPS_ARE_NOT_FOLLOWED])

    def _check_losses(self, record: AttentionRecord) -> None:
        problems = []
        for name, loss in self.losses.items():
            try:
                loss.check(record, pruned=self.pruning is not None)
            except SpdfqError as error:
                problems.append(f"synthesis.losses.{name}: {error}")
        if problems:
            raise RecipeError(problems)

    def synthesize(
        self, teacher: Teacher, runtime: Runtime, folder: Path | None = None, student: StudentFactory | None = None
    ) -> SyntheticImages:
        """Optimise the groups one after the other; finished and begun ones found in ``folder`` are taken up.

        Each group has a student of its own. Several ranks share the groups, and hand their results over in ``folder``.
        """
        self.check(teacher)
        starts, ranks = range(0, self.images, self.group), runtime.ranks
        if folder:
            folder.mkdir(parents=True, exist_ok=True)

        def run(index: int, advance: Advance) -> SyntheticImages:
            count = min(self.group, self.images - starts[index])
            return Group(self, teacher, runtime, index, count, student).run(advance, folder)

        own = ranks.share(range(len(starts)))
        with teacher.frozen(), runtime.progress("synthesising", len(own) * self.iterations) as advance:
            parts = {index: run(index, advance) for index in own}
            ranks.wait()
            others = [index for index in range(len(starts)) if index not in parts]
            parts |= {index: run(index, lambda *_, **__: None) for index in others}
        return _joined([parts[index] for index in range(len(starts))])

    @property
    def needs(self) -> frozenset[str]:
        """What the losses need to be recorded."""
        return frozenset().union(*(loss.needs for loss in self.losses.values()))

    @property
    def student_needs(self) -> frozenset[str]:
        """What they need to be recorded of the student."""
        return frozenset().union(*(loss.needs for loss in self.losses.values() if loss.needs_student))

    @property
    def needs_student(self) -> bool:
        """Whether a quantized student learns beside the images."""
        return self.student is not None


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
