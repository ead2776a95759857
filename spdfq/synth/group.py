"""The optimisation loop of one group of images: forward, losses, balance, step, clamp; checked, saved and resumable."""

import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spdfq.attention import AttentionRecord
from spdfq.errors import NonFiniteError, SpdfqError
from spdfq.losses.attention_maps import prior_pictures
from spdfq.losses.attention_prior import AttentionPriorLoss
from spdfq.losses.base import Loss, LossInputs
from spdfq.runtime import Advance, Runtime
from spdfq.synth.base import SyntheticImages
from spdfq.synth.changes import Change, Moment, apply_all, follow_all
from spdfq.synth.forward import ForwardPasses, new_pruner
from spdfq.synth.group_state import GroupState, LossWeights
from spdfq.synth.samplers import CropPlan
from spdfq.synth.settings import COLUMNS_OF_THE_LOOP, SynthesisSettings
from spdfq.synth.sources import noise
from spdfq.synth.student_training import Student, StudentFactory, StudentTrainer
from spdfq.teacher import Teacher

CHECK_EVERY = 10
SAVE_SECONDS = 5.0
# a student is stored with its moments: three times the teacher's weights
SAVE_SECONDS_STUDENT = 60.0


class Group:
    """The unit of work: ``count`` images with their optimiser, crops, targets, automatic weights and state file.

    Every draw is a function of the seed, the group's index, a purpose and the iteration, so nothing but `state` has to
    be stored.
    """

    def __init__(
        self,
        spec: SynthesisSettings,
        teacher: Teacher,
        runtime: Runtime,
        index: int,
        count: int,
        student: StudentFactory | None = None,
    ) -> None:
        self.spec, self.teacher, self.runtime, self.index, self.count = spec, teacher, runtime, index, count
        self.size: tuple[int, int] = teacher.input_size[1:]
        self.columns = (*spec.losses, *COLUMNS_OF_THE_LOOP)
        self.kept: dict[Any, Any] = {}
        self.turn = 0
        self.plan: CropPlan = spec.sampler.sample(count, self.size, teacher.num_classes, self.generator("sampler"))
        self.labels: Tensor | None = None
        self.targets: Tensor | None = None
        if not teacher.headless:
            self.labels, self.targets = self._labels_and_targets()
        self.view_weights = self._view_weights()
        self.state = self._begin()
        self.passes = ForwardPasses(teacher, runtime, count, new_pruner(spec.pruning, teacher, count))
        self.trainer = StudentTrainer(spec.student, _given(student)) if spec.student else None
        self.state.others = {"pruning": self.passes.pruner, "student": self.trainer}
        self.low, self.high = teacher.pixel_range(self.state.images)

    def generator(self, *purpose: str | int) -> torch.Generator:
        """A fresh generator for a purpose of this group."""
        return self.runtime.generator("group", self.index, *purpose)

    def run(self, advance: Advance, folder: Path | None = None) -> SyntheticImages:
        """All iterations that are still to do, then the result.

        Raises:
            NonFiniteError: a loss or the gradient; nothing that came of it is stored.
            DataError: the state found in ``folder`` is damaged.
        """
        state, iterations = self.state, self.spec.iterations
        path = folder / f"group-{self.index:05d}.safetensors" if folder else None
        if path and path.exists():
            state.restore(path)
            advance(state.iteration)
        pause = SAVE_SECONDS_STUDENT if self.trainer else SAVE_SECONDS
        checked, saved = state.iteration, time.monotonic()
        while state.iteration < iterations:
            self.step(state.iteration)
            state.iteration += 1
            to_save = state.iteration == iterations or time.monotonic() - saved >= pause
            if to_save or state.iteration % CHECK_EVERY == 0:
                self._check(checked)
                if to_save and path:
                    state.save(path)
                advance(state.iteration - checked, **self._latest())
                checked, saved = state.iteration, time.monotonic() if to_save else saved
        return self._result()

    def step(self, iteration: int) -> None:
        """One iteration; on an accelerator it queues its work without waiting for it."""
        state = self.state
        self.passes.prune(state.images, iteration)
        inputs = self._forward(iteration)
        terms = {name: _evaluated(name, loss, inputs) for name, loss in self.spec.losses.items()}
        state.loss_weights.observe(terms, state.images, iteration)
        total = torch.stack([term * state.loss_weights.weight(name) for name, term in terms.items()]).sum()
        (gradient,) = torch.autograd.grad(total, state.images)
        state.images.grad = gradient
        state.curve[iteration] = torch.stack([*terms.values(), total, gradient.norm()]).detach()
        if self.spec.schedule.restarts(iteration, self.spec.iterations):
            state.optimizer.state.clear()
        for group in state.optimizer.param_groups:
            group["lr"] = self.spec.optimizer.lr * self.spec.schedule.factor(iteration, self.spec.iterations)
        state.optimizer.step()
        with torch.no_grad():
            state.images.clamp_(self.low, self.high)
        if self.trainer and self.trainer.due(iteration):
            self._teach(self.trainer, iteration)

    def _begin(self) -> GroupState:
        drawn = noise(self.count, self.teacher, self.generator("noise")).to(self.runtime.device)
        images = self.spec.optimizer.start(drawn).requires_grad_()
        curve = torch.zeros(self.spec.iterations, len(self.columns), device=images.device)
        return GroupState(images, self.spec.optimizer.build(images), LossWeights(self.spec.losses), curve)

    def _labels_and_targets(self) -> tuple[Tensor | None, Tensor | None]:
        """``[B+M, K]`` of the images and then of the crops; nothing where the images have no target."""
        classes = self.teacher.num_classes
        whole = self.plan.label_mask(self.count, classes)
        crops = torch.nn.functional.one_hot(self.plan.labels, classes).bool()
        mask = torch.cat([whole, crops])
        shown = [row.nonzero().flatten() for row in mask]
        targets = self.spec.target.sample(shown, classes, self.generator("target"))
        if targets is None:
            return None, None
        return mask.to(self.runtime.device), targets.to(self.runtime.device)

    def _view_weights(self) -> Tensor:
        crops = torch.bincount(self.plan.owners, minlength=self.count)[self.plan.owners]
        return (torch.cat([torch.ones(self.count), 1 / crops]) / self.count).to(self.runtime.device)

    def _forward(self, iteration: int) -> LossInputs:
        """A pass of the teacher over the augmented images and, where they are due, the crops; and of the student."""
        images, changes, tokens = self._seen(iteration)
        self._redraw(iteration)
        crops = self.plan.views(self.state.images, self.size) if self.plan.due(iteration) else None
        logits, record = self.passes.recorded(images, crops, self.spec.needs, tokens)
        inputs = self._inputs(images, logits, record, iteration, changes, tokens)
        if self.trainer:
            student = self.trainer.ready(self.state.images, iteration)
            inputs.student_logits, inputs.student_attention = self._answer(student, images, tokens)
        return inputs

    def _redraw(self, iteration: int) -> None:
        """The crops of this iteration, where they do not stay what they were."""
        turn = iteration // self.plan.redraw if self.plan.redraw else 0
        if turn != self.turn:
            self.turn = turn
            self.plan = self.spec.sampler.redrawn(self.plan, self.size, self.generator("sampler", turn))

    def _seen(self, iteration: int) -> tuple[Tensor, tuple[Change, ...], Tensor | None]:
        """The images as they are, augmented for an iteration, how, and the patch tokens that take part."""
        changes, pruner = self._changes(iteration), self.passes.pruner
        tokens = pruner.tokens(iteration, changes, self.size) if pruner else None
        return apply_all(changes, self.state.images), changes, tokens

    def _answer(self, student: Student, images: Tensor, tokens: Tensor | None) -> tuple[Tensor, AttentionRecord]:
        needs = self.spec.student_needs
        with self.passes.recording(student.module, needs, tokens, student.network) as record:
            return student.module(images).float(), record

    def _teach(self, trainer: StudentTrainer, iteration: int) -> None:
        """The student's turn, on the images as they have just become."""
        with torch.no_grad():
            images, _, tokens = self._seen(iteration)
            teacher, _ = self.passes.recorded(images, None, frozenset(), tokens)
        trainer.learn(lambda: self._answer(trainer.student, images, tokens)[0], teacher)

    def _inputs(
        self,
        images: Tensor,
        logits: Tensor,
        record: AttentionRecord,
        iteration: int,
        changes: tuple[Change, ...] = (),
        tokens: Tensor | None = None,
    ) -> LossInputs:
        used = len(logits)
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
            generator=self.generator,
            kept=self.kept,
        )

    def _changes(self, iteration: int) -> tuple[Change, ...]:
        moment = Moment(
            iteration=iteration, iterations=self.spec.iterations, count=self.count, size=self.teacher.input_size
        )
        return tuple(
            augmentation.draw(self.generator("augmentation", index, iteration), moment)
            for index, augmentation in enumerate(self.spec.augmentations)
        )

    def _check(self, first: int) -> None:
        """Refuse to go on, and to save, after a loss or gradient that is not finite."""
        wrong = (~self.state.curve[first : self.state.iteration].isfinite()).nonzero()
        if len(wrong):
            row, column = wrong[0].tolist()
            raise NonFiniteError(
                f"synthesis: {self.columns[column]} is not finite in iteration {first + row} of group {self.index}; "
                "try a lower synthesis.optimizer.lr, a lower weight of that loss, or runtime.precision='float32'"
            )

    def _latest(self) -> dict[str, float]:
        """The total first: a narrow terminal shows the beginning."""
        values = dict(zip(self.columns, self.state.curve[self.state.iteration - 1].tolist(), strict=True))
        return {"total": values.pop("total"), **values}

    def _result(self) -> SyntheticImages:
        result = SyntheticImages(
            images=self.state.images.detach().cpu(), curves=self.state.curve.cpu().unsqueeze(0), columns=self.columns
        )
        self._redraw(self.spec.iterations - 1)
        if self.labels is not None:
            result.boxes, result.owners, result.labels = self.plan.boxes, self.plan.owners, self.plan.labels
        priors = {name: loss for name, loss in self.spec.losses.items() if isinstance(loss, AttentionPriorLoss)}
        if priors and self.index == 0:
            name, loss = next(iter(priors.items()))
            result.prior, result.reached, result.first_block = self._prior_pictures(name, loss)
        return result

    @torch.no_grad()
    def _prior_pictures(self, name: str, loss: AttentionPriorLoss) -> tuple[Tensor, Tensor, int]:
        images = self.state.images
        logits, record = self.passes.recorded(images, None, loss.needs, None)
        return prior_pictures(loss, self._inputs(images, logits, record, self.spec.iterations - 1).scoped(name))


def _evaluated(name: str, loss: Loss, inputs: LossInputs) -> Tensor:
    term = loss(inputs.scoped(name))
    if not isinstance(term, Tensor) or term.ndim or not term.requires_grad:
        found = f"a tensor {list(term.shape)}" if isinstance(term, Tensor) else type(term).__name__
        raise SpdfqError(f"synthesis.losses.{name}: must return a scalar with a gradient to the images, not {found}")
    return term.float()


def _given(student: StudentFactory | None) -> StudentFactory:
    if student is None:
        raise SpdfqError(
            "synthesis.student: nothing here makes a student; run the whole recipe, or give synthesize(..., student=)"
        )
    return student
