"""What every loss of the synthesis is: an attrs class called with what one iteration produced."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from attrs import define, evolve, field
from torch import Tensor

from spdfq.attention import AttentionRecord


@define(kw_only=True)
class LossInputs:
    """What one iteration over a group of ``B`` images and its ``M`` crops hands to the losses.

    Args:
        images: ``[B, C, h, w]``, normalised, as the teacher saw them.
        logits: ``[B+M, K]`` float32: the images first, then the crops; features where the teacher has no head.
        targets: ``[B+M, K]`` probabilities drawn by the target; ``None`` where there are no classes.
        labels: ``[B+M, K]`` boolean: the classes each view is meant to show; ``None`` where there are no classes.
        view_weights: ``[B+M]``: 1/B for an image, 1/(B m) for each of an image's m crops.
        attention: what the losses asked to be recorded, for the images alone.
        originals: ``[B, C, h, w]``: the images before this iteration's augmentations.
        follow: maps ``[B, H, *grid]`` on the token grid, gone along with this iteration's augmentations.
        tokens: ``[B, K]`` the patch tokens the teacher saw, ascending, where some were left out (token pruning).
        generator: a fresh generator for a purpose, in the same state each time it is asked for within a group.
        kept: what the loss wants to keep for the group; see `keep`.
        iteration: counted from 0.
        iterations: of the whole run.
        forward: the teacher's logits ``[n, K]``, float32, of further views ``[n, C, h, w]``.
        student_logits: ``[B, K]`` float32, the quantized student's of the images; an adversarial synthesis gives them.
        student_attention: likewise, what the losses that need a student asked to be recorded.
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
    generator: Callable[..., torch.Generator] = field(default=lambda *purpose: torch.Generator().manual_seed(0))
    kept: dict[Any, Any] = field(factory=dict)
    iteration: int = 0
    iterations: int = 1
    forward: Callable[[Tensor], Tensor] | None = None
    student_logits: Tensor | None = None
    student_attention: AttentionRecord | None = None

    def scoped(self, name: str) -> "LossInputs":
        """The same for the loss of that name: what it keeps and draws is shared with no other loss."""
        return evolve(self, generator=partial(self.generator, name), kept=self.kept.setdefault(name, {}))

    def keep(self, key: Any, make: Callable[[], Any]) -> Any:
        """What ``make`` returned the first time this key was asked for in this group.

        It is made anew after a resume, so let it depend on `generator` and shapes alone, not on the images.
        """
        if key not in self.kept:
            self.kept[key] = make()
        return self.kept[key]


def _weight(_: Any, attribute: Any, value: Any) -> None:
    if value != "auto" and not 0 <= value < math.inf:
        raise ValueError(f"must be at least 0 and finite, or 'auto', got {value!r}")


def at_least_float32(x: Tensor) -> Tensor:
    """Half precision to float32; float64 stays what it is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


@define(kw_only=True)
class Loss:
    """Base class of losses.

    Args:
        weight: factor of this loss in the sum; ``auto`` balances its gradient against the label loss's.
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    """What must be recorded: names of `spdfq.attention.NEEDS`."""

    label_loss: ClassVar[bool] = False
    """Whether this is the loss that ``weight = "auto"`` balances others against."""

    needs_student: ClassVar[bool] = False
    """Whether it compares the teacher with a quantized student, which only an adversarial synthesis has."""

    weight: float | Literal["auto"] = field(default=1.0, validator=_weight)

    def check(self, attention: AttentionRecord, pruned: bool) -> None:
        """Refuse a model that the loss cannot be computed on, before anything runs.

        Args:
            attention: what was recorded of one image.
            pruned: whether patches will be left out on the way.

        Raises:
            SpdfqError: what the model lacks.
        """

    def __call__(self, inputs: LossInputs) -> Tensor:
        """The loss of a group, a scalar with a gradient to the images, not yet weighted."""
        raise TypeError(f"{type(self).__name__} does not define __call__")
