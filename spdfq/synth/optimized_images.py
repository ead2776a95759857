"""Images optimised from noise: the loop that all data-free methods share."""

from pathlib import Path

import torch
from attrs import define

from spdfq.attention import AttentionRecord, record_attention
from spdfq.errors import RecipeError, SpdfqError
from spdfq.registry import losses as registered
from spdfq.registry import sources
from spdfq.runtime import Advance, Runtime
from spdfq.synth.augmentations import RandomResizedCrop
from spdfq.synth.base import SyntheticImages
from spdfq.synth.changes import CROPS_ARE_NOT_FOLLOWED
from spdfq.synth.group import Group
from spdfq.synth.pruning import find_token_layout
from spdfq.synth.samplers import MultiSemanticSampler
from spdfq.synth.settings import SynthesisSettings
from spdfq.synth.sources import noise
from spdfq.synth.student_training import StudentFactory
from spdfq.synth.targets import NoTarget, SoftLabelTarget
from spdfq.teacher import Teacher


@sources.register("optimize")
@define(kw_only=True)
class OptimizedImages(SynthesisSettings):
    """Images optimised from Gaussian noise so that the teacher's outputs and attention look natural."""

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
            find_token_layout(teacher)
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
