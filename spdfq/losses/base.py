"""The base class of losses, and what each iteration hands to them."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from attrs import define, evolve, field
from torch import Tensor

from spdfq.attention import AttentionRecord
from spdfq.losses.attention_maps import MapPictures
from spdfq.runtime import generator


@define(kw_only=True)
class LossInputs:
    """What one iteration over a group of ``B`` images and their ``M`` crops hands to the losses.

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
        generator: makes a generator for a purpose. Within a group, the same purpose always gives the same state. The
            default is the run's own function with seed 0.
        kept: what the loss stores for the group; see `keep`.
        iteration: counted from 0.
        iterations: number of iterations of the whole run.
        forward: float32 logits ``[n, K]`` of the teacher for more views ``[n, C, h, w]``.
        student_logits: ``[B, K]`` float32 logits of the quantized student; ``None`` without a student.
        student_attention: the student's attention, recorded for the losses that need a student; ``None`` without one.
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
    generator: Callable[..., torch.Generator] = field(default=partial(generator, 0))
    kept: dict[Any, Any] = field(factory=dict)
    iteration: int = 0
    iterations: int = 1
    forward: Callable[[Tensor], Tensor] | None = None
    student_logits: Tensor | None = None
    student_attention: AttentionRecord | None = None

    def scoped(self, name: str) -> "LossInputs":
        """The same inputs for the loss of that name. What it keeps and draws is separate from other losses."""
        return evolve(self, generator=partial(self.generator, name), kept=self.kept.setdefault(name, {}))

    def keep(self, key: Any, make: Callable[[], Any]) -> Any:
        """Return ``make()``, computed the first time that this key is asked for in this group.

        A resumed run calls ``make`` again, so it must depend on `generator` and on shapes, but not on the images.
        """
        if key not in self.kept:
            self.kept[key] = make()
        return self.kept[key]


def _weight(_: Any, attribute: Any, value: Any) -> None:
    if value != "auto" and not 0 <= value < math.inf:
        raise ValueError(f"must be at least 0 and finite, or 'auto', got {value!r}")


def at_least_float32(x: Tensor) -> Tensor:
    """Convert half precision to float32; leave float32 and float64 unchanged."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


@define(kw_only=True)
class Loss:
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
        raise TypeError(f"{type(self).__name__} does not define __call__")

    def pictures(self, inputs: LossInputs) -> MapPictures:
        """The attention that the loss aims at, and the attention reached; called once, after the last iteration.

        Args:
            inputs: of a pass over the images without augmentations, crops or pruning.
        """
        raise TypeError(f"{type(self).__name__} does not define pictures")
