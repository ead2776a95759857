"""The base class of losses, and what each iteration hands to them."""

import copy
import math
from collections.abc import Callable
from typing import Any, ClassVar, Literal

import torch
from attrs import define, field
from torch import Tensor

from spdfq.attention import QUERIES_AND_KEYS, AttentionRecord
from spdfq.errors import ComponentError, SpdfqError
from spdfq.losses.attention_maps import MapPictures
from spdfq.recipe.structure import Checked
from spdfq.registry import losses
from spdfq.runtime import Draws
from spdfq.runtime.arguments import check_alike, check_tensor

_REMEDIES = {
    "logits": "give the teacher's logits [B, K]",
    "targets": "give targets [B, K], for example those of SoftLabelTarget().sample(...)",
    "labels": "give labels [B, K], for example those of spdfq.synth.label_mask(...)",
    "draws": "it draws at random: give draws=Draws(seed), one for each group of images",
    "forward": "give the teacher's forward pass",
    "student_logits": "there is no quantized student here: give its logits [B, K]",
    "student_attention": "there is no quantized student here: give the record of its attention",
}


@define(kw_only=True)
class LossInputs(Checked):
    """What one iteration over a group of ``B`` images and their ``M`` crops hands to the losses.

    `Loss.of` makes it from its arguments.

    Args:
        images: ``[B, C, h, w]``, normalised, as the teacher saw them.
        logits: ``[B+M, K]`` float32: the images first, then the crops; features if the teacher has no head.
        targets: ``[B+M, K]`` probabilities drawn by the target; ``None`` without classes.
        labels: ``[B+M, K]`` boolean: the classes that each view is meant to show; ``None`` without classes.
        view_weights: ``[B+M]``: 1/B for an image, 1/(B m) for each crop of an image with m crops.
        attention: what the losses asked to have recorded, for the images but not for the crops.
        originals: ``[B, C, h, w]``: the images before this iteration's augmentations.
        follow: moves maps ``[B, heads, *grid]`` on the token grid along with this iteration's augmentations.
        tokens: ``[B, K]`` indices of the patch tokens that the teacher saw, ascending; ``None`` if it saw all of them
            (see token pruning).
        draws: the random draws of the group; ``None`` for losses that draw nothing.
        iteration: counted from 0.
        iterations: number of iterations of the whole run.
        forward: float32 logits ``[n, K]`` of the teacher for more views ``[n, C, h, w]``.
        student_logits: ``[B, K]`` float32 logits of the quantized student; ``None`` without a student.
        student_attention: the student's attention, recorded for the losses that need a student; ``None`` without one.

    Raises:
        SpdfqError: a value of the wrong type or shape, or an ``iteration`` that is not one of ``iterations``.
    """

    images: Tensor
    logits: Tensor | None = None
    targets: Tensor | None = None
    labels: Tensor | None = None
    view_weights: Tensor | None = None
    attention: AttentionRecord = field(factory=AttentionRecord)
    originals: Tensor | None = None
    follow: Callable[[Tensor], Tensor] = field(default=lambda maps: maps)
    tokens: Tensor | None = None
    draws: Draws | None = None
    iteration: int = 0
    iterations: int = 1
    forward: Callable[[Tensor], Tensor] | None = None
    student_logits: Tensor | None = None
    student_attention: AttentionRecord | None = None

    def __attrs_post_init__(self) -> None:
        check_tensor("images", self.images, "B, C, h, w")
        if self.logits is not None:
            check_tensor("logits", self.logits, "B, K")
            if self.targets is not None:
                check_alike("targets", self.targets, "logits", self.logits, "B, K")
            if self.labels is not None:
                check_alike("labels (see spdfq.synth.label_mask)", self.labels, "logits", self.logits, "B, K")
            if self.view_weights is not None:
                check_alike("view_weights", self.view_weights, "the logits' first axis", self.logits[:, 0], "B")
        if not 0 <= self.iteration < self.iterations:
            raise SpdfqError(f"iteration is {self.iteration}, but there are {self.iterations}; give iterations too")

    def scoped(self, name: str) -> "LossInputs":
        """The same inputs for the loss of that name. What it keeps and draws is separate from other losses."""
        inputs = copy.copy(self)  # unlike evolve, it does not check everything again
        inputs.draws = self.draws.scoped(name) if self.draws else None
        return inputs

    def generator(self, *purpose: str | int) -> torch.Generator:
        """A fresh generator for a purpose; within a group, the same purpose always gives the same state."""
        return self._draws().generator(*purpose)

    def keep(self, key: Any, make: Callable[[], Any]) -> Any:
        """What ``make`` returned when this key was first asked for in this group; see `Draws.keep`."""
        return self._draws().keep(key, make)

    def each(self, purpose: tuple[str | int, ...], draw: Callable[..., Tensor], *sizes: int) -> Tensor:
        """What this iteration draws for a purpose, where the images are; see `Draws.each`."""
        return self._draws().each(purpose, self.iteration, draw, *sizes, device=self.images.device)

    def _draws(self) -> Draws:
        if self.draws is None:
            raise SpdfqError(f"got no draws; {_REMEDIES['draws']}")
        return self.draws


def _weight(_: Any, attribute: Any, value: Any) -> None:
    if value != "auto" and not 0 <= value < math.inf:
        raise ValueError(f"must be at least 0 and finite, or 'auto', got {value!r}")


def at_least_float32(x: Tensor) -> Tensor:
    """Convert half precision to float32; leave float32 and float64 unchanged."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


@define(kw_only=True)
class Loss(Checked):
    """Base class of losses. A subclass defines `__call__`.

    Args:
        weight: factor of this loss in the sum; ``auto`` balances its gradient against the label loss's.
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    """What must be recorded: names of `spdfq.attention.NEEDS`."""

    label_loss: ClassVar[bool] = False
    """Whether it reads the labels. ``weight = "auto"`` balances other losses against label losses."""

    needs_student: ClassVar[bool] = False
    """Whether it compares the teacher with a quantized student, which only an adversarial synthesis has."""

    has_pictures: ClassVar[bool] = False
    """Whether `pictures` has something to show in the report."""

    weight: float | Literal["auto"] = field(default=1.0, validator=_weight)

    @property
    def follows_images(self) -> bool:
        """Whether it calls ``LossInputs.follow``. If so, augmentations that maps cannot follow are refused."""
        return False

    def check(self, attention: AttentionRecord, pruned: bool) -> None:
        """Refuse a model that the loss cannot be computed on, before anything runs.

        Args:
            attention: a record of one image.
            pruned: whether patches will be left out during the run.

        Raises:
            SpdfqError: what the model lacks.
        """

    def __call__(self, inputs: LossInputs) -> Tensor:
        """The loss of a group: a scalar with a gradient to the images, before it is multiplied by ``weight``."""
        raise ComponentError(f"{type(self).__name__} does not define __call__")

    def of(
        self, images: Tensor, attention: AttentionRecord | None = None, *, draws: Draws | None = None, **others: Any
    ) -> Tensor:
        """The loss in a training loop of your own, before it is multiplied by ``weight``.

        Args:
            images: ``[B, C, h, w]``, as the model saw them.
            attention: what ``record_attention(model, loss.needs, rows=B)`` recorded; for losses with ``needs``.
            draws: ``Draws(seed, group)``, one for each group of images; for losses that draw at random.
            others: other fields of `LossInputs` by name, such as ``logits`` or ``targets``.

        Returns:
            A scalar with a gradient to the images.

        Raises:
            SpdfqError: an input that this loss needs is missing, or one has the wrong type or shape.
        """
        if isinstance(images, AttentionRecord):
            raise SpdfqError("give the images first and then the record: loss.of(images, record)")
        if "generator" in others:
            raise SpdfqError("a generator forgets what it drew; give draws=Draws(seed), one for each group of images")
        record = AttentionRecord() if attention is None else attention
        inputs = LossInputs(images=images, attention=record, draws=draws, **others)
        name = losses.label(self)
        self._check_rows(inputs, name)
        if draws is not None:
            inputs = inputs.scoped(name)
            owner = inputs.keep("loss", lambda: self)
            if owner is not self and owner != self:
                raise SpdfqError(f"{name}: another {name} has these draws; give draws.scoped('second') to one of them")
        return self(inputs)

    def given(self, inputs: LossInputs, name: str) -> Any:
        """An input by its name.

        Raises:
            SpdfqError: it is missing; the message says what to give.
        """
        if getattr(inputs, name) is None:
            raise SpdfqError(f"{losses.label(self)}: got no {name}; {_REMEDIES.get(name, 'give it')}")
        return getattr(inputs, name)

    def recorded(self, inputs: LossInputs, name: str = "attention") -> AttentionRecord:
        """The record of the teacher's attention, or of ``student_attention``.

        Raises:
            SpdfqError: it is missing, or lacks something of ``needs``.
        """
        record: AttentionRecord = self.given(inputs, name)
        for need in sorted(self.needs):
            if not (record.queries if need == QUERIES_AND_KEYS else getattr(record, need)):
                raise SpdfqError(
                    f"{losses.label(self)}: {name} holds no {need}; call the model inside "
                    "`with record_attention(model, loss.needs) as record:` and give the record"
                )
        return record

    def _check_rows(self, inputs: LossInputs, name: str) -> None:
        """Refuse a record of more than the images, such as their crops, which would count as windows of the images."""
        count, record = len(inputs.images), inputs.attention
        for entries in (record.class_attention, record.attention_outputs, record.queries):
            found = {len(entry) for entry in entries}
            views = {count if inputs.logits is None else len(inputs.logits)} - {count}
            if any(rows % count for rows in found) or (found - {count} and (record.has_class or found == views)):
                raise SpdfqError(
                    f"{name}: there are {count} images, but the record holds {max(found)}; give rows={count} to "
                    "record_attention, so that crops are not recorded"
                )

    def pictures(self, inputs: LossInputs) -> MapPictures:
        """The attention that the loss aims at, and the attention reached; called once, after the last iteration.

        Args:
            inputs: of a pass over the images without augmentations, crops or pruning.
        """
        raise ComponentError(f"{type(self).__name__} does not define pictures")
