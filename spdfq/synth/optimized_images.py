"""The source of optimised images: it checks the teacher, runs the groups and joins their results."""

from collections.abc import Sequence
from pathlib import Path

import torch
from attrs import define, evolve

from spdfq.attention import AttentionRecord, record_attention
from spdfq.errors import RecipeError, SpdfqError
from spdfq.registry import augmentations, losses, samplers, sources
from spdfq.runtime import Advance, Runtime
from spdfq.runtime.state_key import state_key
from spdfq.synth.base import SyntheticImages
from spdfq.synth.compiled import compiled_passes
from spdfq.synth.group import Group
from spdfq.synth.loop import run
from spdfq.synth.memory import groups_together
from spdfq.synth.pruning import find_token_layout
from spdfq.synth.settings import SynthesisSettings
from spdfq.synth.sources import noise
from spdfq.synth.student_training import StudentFactory
from spdfq.teacher import Teacher


@sources.register("optimize")
@define(kw_only=True)
class OptimizedImages(SynthesisSettings):
    """Images optimised from Gaussian noise so that the teacher's outputs and attention look natural."""

    def advice(self) -> list[str]:
        """Combinations that run, but waste time, have no effect or are known to lose accuracy."""
        lines = []
        if self.pruning and (late := [at for at in self.pruning.at if at >= self.iterations]):
            lines.append(f"pruning.at: {late} is never reached in {self.iterations} iterations; lower it")
        sampler = samplers.label(self.sampler)
        if self.sampler.needs_classes and not self.target.gives_labels:
            lines.append(f"{sampler} crops have no use without labels; set sampler = 'whole_image'")
        elif self.sampler.several_classes and not self.target.soft:
            lines.append(f"{sampler} without soft labels is known to lose accuracy; set target = 'soft_label'")
        return lines

    def check(self, teacher: Teacher) -> None:
        """Refuse a teacher that lacks the classes, the attention or the token layout that the settings need.

        Raises:
            RecipeError: every reason found.
            SpdfqError: the attention cannot be recorded, or the patches cannot be left out.
        """
        if teacher.headless:
            self._check_classes(teacher)
        self._check_attention(teacher)

    def _check_classes(self, teacher: Teacher) -> None:
        why = f"but {teacher.name} has no head (num_classes = 0)"
        without = ", ".join(name for name in losses.names() if not losses.get(name).label_loss)
        problems = [
            f"synthesis.losses.{name}: needs classes, {why}; use losses that need none ({without}), each with a "
            "number as its weight, or the model with its head"
            for name, loss in self.losses.items()
            if loss.label_loss
        ]
        if self.sampler.needs_classes:
            problems.append(
                f"synthesis.sampler: draws a class for each crop, {why}; set sampler = 'whole_image', or use the "
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
        # maps of windowed attention stay in place, so they do not mind what happens to the images
        whole = any(len(row) == len(image) for row in record.class_attention)
        if self.pruning or (whole and any(loss.follows_images for loss in self.losses.values())):
            self._check_followable()

    def _check_losses(self, record: AttentionRecord) -> None:
        problems = []
        for name, loss in self.losses.items():
            try:
                loss.check(record, pruned=self.pruning is not None)
            except SpdfqError as error:
                problems.append(f"synthesis.losses.{name}: {error}")
        if problems:
            raise RecipeError(problems)

    def _check_followable(self) -> None:
        names = sorted({augmentations.label(each) for each in self.augmentations if not each.followable})
        if names:
            raise RecipeError(
                [
                    "synthesis.augmentations: neither attention priors nor token pruning can follow "
                    f"{name}; leave it out, or set follow = false for the prior"
                    for name in names
                ]
            )

    def synthesize(
        self, teacher: Teacher, runtime: Runtime, folder: Path | None = None, student: StudentFactory | None = None
    ) -> SyntheticImages:
        """Optimise the groups, ``groups_per_pass`` at a time; each group has its own student.

        Several ranks share the groups and exchange results through files.

        Args:
            teacher: on the runtime's device.
            runtime: device, precision, seeds and progress.
            folder: where state is stored; finished and unfinished groups found there are continued.
            student: makes quantized students; needed if the settings have ``student``.

        Raises:
            SpdfqError: the teacher or the settings do not fit; see `check`.
            SpdfqError: ``runtime.compile`` is set, and the teacher cannot be compiled.
            NonFiniteError: a loss or a gradient.
            DataError: a state file is damaged, or of other work.
        """
        with runtime.own_modes():
            return self._synthesized(teacher, runtime, folder, student)

    def _synthesized(
        self, teacher: Teacher, runtime: Runtime, folder: Path | None, student: StudentFactory | None
    ) -> SyntheticImages:
        self.check(teacher)
        starts, ranks = range(0, self.images, self.group), runtime.ranks
        if folder:
            folder.mkdir(parents=True, exist_ok=True)
        key = self._state_key(teacher, runtime) if folder else ""

        def made(indices: Sequence[int], advance: Advance) -> dict[int, SyntheticImages]:
            """The results of the groups with these indices, some groups in each pass."""
            found: dict[int, SyntheticImages] = {}
            for first in range(0, len(indices), together):
                batch = indices[first : first + together]
                counts = [min(self.group, self.images - starts[index]) for index in batch]
                pairs = zip(batch, counts, strict=True)
                groups = [Group(self, teacher, runtime, *pair, student, compiled) for pair in pairs]
                for group in groups:
                    group.state.key = key
                found |= zip(batch, run(groups, advance, folder), strict=True)
            return found

        own = ranks.share(range(len(starts)))
        progress = runtime.progress("synthesising", len(own) * self.iterations)
        with teacher.frozen():
            together = groups_together(self, teacher, runtime)
            with compiled_passes(teacher, runtime) as compiled, progress as advance:
                parts = made(own, advance)
                ranks.wait()
                # the other ranks' groups are finished, so their results are read from the state files
                others = [index for index in range(len(starts)) if index not in parts]
                parts |= made(others, lambda *_, **__: None)
        return _joined([parts[index] for index in range(len(starts))])

    def _state_key(self, teacher: Teacher, runtime: Runtime) -> str:
        """A hash of what the state of a group depends on: not on how many groups there are, or share a pass."""
        settings = evolve(self, images=1, groups_per_pass=1)
        return state_key(settings, teacher.fingerprint(), runtime.seed, runtime.precision, runtime.compile)


def _joined(parts: list[SyntheticImages]) -> SyntheticImages:
    """The groups' results as one; the maps shown are those of the first group."""
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
