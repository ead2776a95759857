"""One group of images: what it draws, what the teacher sees of it, its losses, and the step of its optimizer."""

import torch
from attrs import frozen
from torch import Tensor

from spdfq.attention import AttentionRecord
from spdfq.errors import NonFiniteError, SpdfqError
from spdfq.losses.base import Loss, LossInputs
from spdfq.runtime import Draws, Runtime
from spdfq.synth.base import SyntheticImages
from spdfq.synth.changes import Change, Moment, apply_all, follow_all
from spdfq.synth.compiled import CompiledPasses
from spdfq.synth.crops import CropPlan
from spdfq.synth.forward import ForwardPasses, new_pruner
from spdfq.synth.group_state import GroupState, LossWeights
from spdfq.synth.settings import LOOP_COLUMNS, SynthesisSettings
from spdfq.synth.sources import noise
from spdfq.synth.student_training import Student, StudentFactory, StudentTrainer
from spdfq.synth.targets import label_mask
from spdfq.teacher import Teacher


@frozen(eq=False)
class Upcoming:
    """What an iteration draws at random, apart from its losses.

    Args:
        changes: of the augmentations.
        plan: the crops.
        redraws: how often their boxes were drawn again.
    """

    changes: tuple[Change, ...]
    plan: CropPlan
    redraws: int


@frozen(eq=False)
class Views:
    """What the teacher sees of a group in an iteration.

    Args:
        images: ``[B, C, h, w]``, augmented.
        crops: ``[M, C, h, w]``; ``None`` if they are not due.
        changes: what the augmentations did.
        tokens: ``[B, K]`` the patch tokens of the images that remain; ``None`` means all.
    """

    images: Tensor
    crops: Tensor | None
    changes: tuple[Change, ...]
    tokens: Tensor | None


class Group:
    """The unit of work: images that share an optimizer, crops, targets, automatic weights and a state file.

    Every random draw depends on the seed, the group's index, a purpose and the iteration alone. So `state` is all that
    must be stored to resume a group.

    Args:
        spec: the settings.
        teacher: frozen, in evaluation mode.
        runtime: device, precision and seeds.
        index: number of the group, counted from 0.
        count: B, number of images.
        student: makes the quantized student if the settings have one.
        compiled: the teacher's compiled passes, shared by all groups; ``None`` runs them as they are written.
    """

    def __init__(
        self,
        spec: SynthesisSettings,
        teacher: Teacher,
        runtime: Runtime,
        index: int,
        count: int,
        student: StudentFactory | None = None,
        compiled: CompiledPasses | None = None,
    ) -> None:
        self.spec, self.teacher, self.runtime, self.index, self.count = spec, teacher, runtime, index, count
        self.size: tuple[int, int] = teacher.input_size[1:]
        self.columns = (*spec.losses, *LOOP_COLUMNS)
        self.draws = Draws(runtime.seed, index)
        self.ahead: dict[int, Upcoming] = {}
        self.plan: CropPlan = spec.sampler.sample(count, self.size, teacher.num_classes, self.generator("sampler"))
        self.redraws = 0
        self.labels: Tensor | None = None
        self.targets: Tensor | None = None
        if spec.target.gives_labels and not teacher.headless:
            self.labels, self.targets = self._labels_and_targets()
        self.view_weights = self.plan.view_weights(count).to(runtime.device)
        self.state = self._new_state()
        self.pruner = new_pruner(spec.pruning, teacher, count)
        self.passes = ForwardPasses(teacher, runtime, self.pruner.layout if self.pruner else None, compiled)
        self.trainer = StudentTrainer(spec.student, _required(student)) if spec.student else None
        self.state.others = {"pruning": self.pruner, "student": self.trainer}
        self.low, self.high = teacher.pixel_range(self.state.images)

    def generator(self, *purpose: str | int) -> torch.Generator:
        """A fresh generator for a purpose of this group."""
        return self.draws.generator(*purpose)

    def draw_ahead(self, iterations: range) -> None:
        """Draw what these iterations draw at random, and copy it to the device."""
        self.draws.draw_ahead(iterations)
        images, plan, redraws = self.state.images, self.plan, self.redraws
        for iteration in iterations:
            wanted = iteration // plan.redraw if plan.redraw else 0
            if wanted != redraws:
                redraws = wanted
                plan = self.spec.sampler.redrawn(plan, self.size, self.generator("sampler", redraws))
            if plan.due(iteration):
                plan.place(images, self.size)
            changes = tuple(change.placed(images) for change in self._changes(iteration))
            self.ahead[iteration] = Upcoming(changes, plan, redraws)

    def views(self, iteration: int) -> Views:
        """What the teacher sees of this group in an iteration."""
        images, changes, tokens = self._augmented(iteration)
        self._take_plan(iteration)
        crops = self.plan.views(self.state.images, self.size) if self.plan.due(iteration) else None
        return Views(images, crops, changes, tokens)

    def inputs(self, views: Views, logits: Tensor, record: AttentionRecord, iteration: int) -> LossInputs:
        """The inputs of the losses of an iteration. The student passes the images here.

        Args:
            views: of this iteration.
            logits: ``[B+M, K]`` of the teacher, the images first; ``[B, K]`` without crops.
            record: of the teacher's attention to the images.
            iteration: counted from 0.
        """
        inputs = self._inputs(views.images, logits, record, iteration, views.changes, views.tokens)
        if self.trainer:
            student = self.trainer.ready(self.state.images, iteration)
            inputs.student_logits, inputs.student_attention = self._student_pass(student, views.images, views.tokens)
        return inputs

    def terms(self, inputs: LossInputs) -> dict[str, Tensor]:
        """The losses of an iteration."""
        return {name: _evaluated(name, loss, inputs) for name, loss in self.spec.losses.items()}

    def total(self, terms: dict[str, Tensor]) -> Tensor:
        """The weighted sum of the losses."""
        return torch.stack([term * self.state.loss_weights.weight(name) for name, term in terms.items()]).sum()

    def update(self, iteration: int, terms: dict[str, Tensor], total: Tensor, gradient: Tensor) -> None:
        """Finish an iteration: note the losses, step the optimizer, and train the student if it is due.

        Args:
            iteration: counted from 0.
            terms: the losses.
            total: their weighted sum.
            gradient: of ``total`` with respect to the images.
        """
        state = self.state
        state.images.grad = gradient
        state.curve[iteration] = torch.stack([*terms.values(), total, gradient.norm()]).detach()
        if self.spec.schedule.restarts(iteration, self.spec.iterations):
            state.optimizer.state.clear()
        for parameters in state.optimizer.param_groups:
            parameters["lr"] = self.spec.optimizer.lr * self.spec.schedule.factor(iteration, self.spec.iterations)
        finished = self.pruner.finished(state.images) if self.pruner else None
        before = state.images if finished is None else state.images.detach().clone()
        state.optimizer.step()
        with torch.no_grad():
            state.images.clamp_(self.low, self.high)
            if finished is not None:
                state.images.copy_(torch.where(finished, before, state.images))
        if self.trainer and self.trainer.due(iteration):
            self._train_student(self.trainer, iteration)
        del self.ahead[iteration]

    def check_finite(self, first: int) -> None:
        """Refuse losses and gradients since iteration ``first`` that are not finite.

        Raises:
            NonFiniteError: there is one.
        """
        wrong = (~self.state.curve[first : self.state.iteration].isfinite()).nonzero()
        if len(wrong):
            row, column = wrong[0].tolist()
            raise NonFiniteError(
                f"synthesis: {self.columns[column]} is not finite in iteration {first + row} of group {self.index}; "
                "try a lower synthesis.optimizer.lr, a lower weight of that loss, or runtime.precision='float32'"
            )

    def latest(self) -> dict[str, float]:
        """The latest losses, with the total first: a narrow terminal cuts the rest off."""
        values = dict(zip(self.columns, self.state.curve[self.state.iteration - 1].tolist(), strict=True))
        return {"total": values.pop("total"), **values}

    def result(self) -> SyntheticImages:
        """The images after the last iteration, and how they were made."""
        result = SyntheticImages(
            images=self.state.images.detach().cpu(), curves=self.state.curve.cpu().unsqueeze(0), columns=self.columns
        )
        self._take_plan(self.spec.iterations - 1)
        if self.labels is not None:
            result.boxes, result.owners, result.labels = self.plan.boxes, self.plan.owners, self.plan.labels
        shown = [name for name, loss in self.spec.losses.items() if loss.has_pictures]
        if shown and self.index == 0:
            self._add_pictures(result, shown[0])
        return result

    def _new_state(self) -> GroupState:
        drawn = noise(self.count, self.teacher, self.generator("noise")).to(self.runtime.device)
        images = self.spec.optimizer.start(drawn).requires_grad_()
        curve = torch.zeros(self.spec.iterations, len(self.columns), device=images.device, dtype=torch.float32)
        return GroupState(
            images, self.spec.optimizer.build(images), LossWeights(self.spec.losses, images.device), curve
        )

    def _labels_and_targets(self) -> tuple[Tensor, Tensor]:
        """Labels and targets ``[B+M, K]`` of the images and then of the crops."""
        classes, shown = self.teacher.num_classes, self.plan.view_classes(self.count)
        targets = self.spec.target.sample(shown, classes, self.generator("target"))
        return label_mask(shown, classes).to(self.runtime.device), targets.to(self.runtime.device)

    def _upcoming(self, iteration: int) -> Upcoming:
        """What was drawn for an iteration; it is drawn now if nobody drew it ahead."""
        if iteration not in self.ahead:
            self.draw_ahead(range(iteration, iteration + 1))
        return self.ahead[iteration]

    def _take_plan(self, iteration: int) -> None:
        upcoming = self._upcoming(iteration)
        self.plan, self.redraws = upcoming.plan, upcoming.redraws

    def _augmented(self, iteration: int) -> tuple[Tensor, tuple[Change, ...], Tensor | None]:
        """The augmented images of an iteration, the changes made to them, and the patch tokens that remain."""
        changes = self._upcoming(iteration).changes
        tokens = self.pruner.tokens(iteration, changes, self.size) if self.pruner else None
        return apply_all(changes, self.state.images), changes, tokens

    def _student_pass(self, student: Student, images: Tensor, tokens: Tensor | None) -> tuple[Tensor, AttentionRecord]:
        needs = self.spec.student_needs
        with self.passes.recording(student.module, needs, len(images), tokens, student.network) as record:
            return student.module(images).float(), record

    def _train_student(self, trainer: StudentTrainer, iteration: int) -> None:
        """One step of the student, on the images after their own step."""
        with torch.no_grad():
            images, _, tokens = self._augmented(iteration)
            teacher, _ = self.passes.recorded([images], [], frozenset(), [] if tokens is None else [tokens])
        trainer.step(lambda: self._student_pass(trainer.student, images, tokens)[0], teacher)

    def _inputs(
        self,
        images: Tensor,
        logits: Tensor,
        record: AttentionRecord,
        iteration: int,
        changes: tuple[Change, ...] = (),
        tokens: Tensor | None = None,
    ) -> LossInputs:
        used = len(logits)  # without the crops in iterations in which they are not forwarded
        return LossInputs(
            images=images,
            logits=logits,
            targets=None if self.targets is None else self.targets[:used],
            labels=None if self.labels is None else self.labels[:used],
            view_weights=self.view_weights[:used],
            attention=record,
            originals=self.state.images,
            iteration=iteration,
            iterations=self.spec.iterations,
            forward=self.passes.logits,
            follow=lambda maps: follow_all(changes, maps, self.size),
            tokens=tokens,
            draws=self.draws,
        )

    def _changes(self, iteration: int) -> tuple[Change, ...]:
        moment = Moment(
            iteration=iteration, iterations=self.spec.iterations, count=self.count, size=self.teacher.input_size
        )
        return tuple(
            augmentation.draw(self.generator("augmentation", index, iteration), moment)
            for index, augmentation in enumerate(self.spec.augmentations)
        )

    @torch.no_grad()
    def _add_pictures(self, result: SyntheticImages, name: str) -> None:
        """Add the attention maps of the loss of that name."""
        loss, images = self.spec.losses[name], self.state.images
        logits, record = self.passes.recorded([images], [], loss.needs)
        pictures = loss.pictures(self._inputs(images, logits, record, self.spec.iterations - 1).scoped(name))
        result.prior, result.reached, result.first_block = pictures.prior, pictures.reached, pictures.first_block


def _evaluated(name: str, loss: Loss, inputs: LossInputs) -> Tensor:
    term = loss(inputs.scoped(name))
    if not isinstance(term, Tensor) or term.ndim or not term.requires_grad:
        found = f"a tensor {list(term.shape)}" if isinstance(term, Tensor) else type(term).__name__
        raise SpdfqError(f"synthesis.losses.{name}: must return a scalar with a gradient to the images, not {found}")
    return term.float()


def _required(student: StudentFactory | None) -> StudentFactory:
    if student is None:
        raise SpdfqError(
            "synthesis.student: nothing here makes a student; run the whole recipe, or give synthesize(..., student=)"
        )
    return student
