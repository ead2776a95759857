"""Total variation: how much neighbouring pixels differ."""

import math
from typing import Any, Literal, get_args

from attrs import define, field, validators
from torch import Tensor

from spdfq.errors import SpdfqError
from spdfq.losses.base import Loss, LossInputs, at_least_float32
from spdfq.registry import losses
from spdfq.runtime.arguments import check_number, check_tensor
from spdfq.runtime.runtime import uniform

Form = Literal["norm", "mean_square"]

# the targets of PSAQ-ViT are meant for a group of 32 images of 3x224x224
_PUBLISHED_PIXELS = 32 * 3 * 224 * 224


def total_variation(images: Tensor, diagonal: float = 1.0, form: Form = "norm") -> Tensor:
    """How much neighbouring pixels differ: horizontally, vertically and along both diagonals (arXiv 2203.02250).

    Args:
        images: ``[B, C, h, w]``.
        diagonal: factor of the two diagonals.
        form: ``norm`` is the sum of the four 2-norms of the differences. Each is over the whole group, so it grows with
            the square root of the number of pixels. ``mean_square`` is the sum of the four means of their squares.

    Returns:
        A scalar.

    Raises:
        SpdfqError: another shape or form, or a factor that is no number.
    """
    check_tensor("images", images, "B, C, h, w")
    check_number("diagonal", diagonal, 0)
    if form not in get_args(Form):
        raise SpdfqError(f"form must be one of {', '.join(map(repr, get_args(Form)))}, got {form!r}")
    images = at_least_float32(images)
    across, down = images[..., :, 1:] - images[..., :, :-1], images[..., 1:, :] - images[..., :-1, :]
    main, other = images[..., 1:, 1:] - images[..., :-1, :-1], images[..., 1:, :-1] - images[..., :-1, 1:]
    size = [x.norm() if form == "norm" else x.square().sum() / max(1, x.numel()) for x in (across, down, main, other)]
    return size[0] + size[1] + diagonal * (size[2] + size[3])


def _range(_: Any, __: Any, value: tuple[float, float]) -> None:
    if not 0 <= value[0] <= value[1] < math.inf:
        raise ValueError(f"expected two numbers of at least 0, the second at least the first, got {list(value)}")


def _positive(_: Any, __: Any, value: tuple[int, int, int, int]) -> None:
    if min(value) < 1:
        raise ValueError(f"expected four whole numbers from 1 up, got {list(value)}")


@losses.register("total_variation", paper="arXiv:2203.02250")
@define(kw_only=True)
class TotalVariationLoss(Loss):
    """Total variation of a group of images, a smoothness prior, or its distance from a target.

    SPDFQ and PSAQ-ViT have ``weight = 0.05``; PSAQ-ViT has ``target = [2500, 3000]``. SMI has ``weight = 1e-4`` and
    ``augmented = false``. MimiQ has ``weight = 2.5e-5``, ``diagonal = 0.7071`` and ``augmented = false``.

    Args:
        weight: factor of this loss.
        diagonal: factor of the diagonal differences (1/√2 in MimiQ, 1 elsewhere).
        form: ``norm`` over the group, as in the public code of PSAQ-ViT, or ``mean_square`` of the differences, without
            ``target`` and ``for_group`` (SPDFQ: unpublished).
        target: range from which a target is drawn once for each group; the loss is then the distance from the target.
            The range is meant for 32 images of 3×224×224, and scaled by the square root of the ratio of pixels.
        faithful: do not scale the target, as in the public code.
        augmented: take the images as the teacher saw them, instead of before the augmentations.
        for_group: ``[B, C, h, w]`` of the group that ``weight`` is meant for. For images of another size the loss is
            scaled by the square root of the ratio of their pixels, so that the gradient of a pixel stays as large. In a
            group of another length it is scaled by the square root of the inverse ratio of images, so that its
            ratio to losses that are means over the group stays the same. Without it, the loss is not scaled.
    """

    diagonal: float = field(default=1.0, validator=[validators.ge(0.0), validators.lt(math.inf)])
    form: Form = "norm"
    target: tuple[float, float] | None = field(default=None, validator=validators.optional(_range))
    faithful: bool = False
    augmented: bool = True
    for_group: tuple[int, int, int, int] | None = field(default=None, validator=validators.optional(_positive))

    def __attrs_post_init__(self) -> None:
        if self.form != "norm" and (self.target or self.for_group):
            raise ValueError("target and for_group are meant for form = 'norm'; leave them out")

    def __call__(self, inputs: LossInputs) -> Tensor:
        """The loss of a group."""
        return self._distance(inputs) * self._scale(inputs.images)

    def _distance(self, inputs: LossInputs) -> Tensor:
        images = inputs.images if self.augmented or inputs.originals is None else inputs.originals
        variation = total_variation(images, self.diagonal, self.form)
        return variation if self.target is None else (variation - self._target(inputs)).abs()

    def _target(self, inputs: LossInputs) -> float:
        assert self.target is not None
        low, high = self.target
        self.given(inputs, "draws")
        share = inputs.keep("target", lambda: uniform(inputs.generator("target")).item())
        scale = 1 if self.faithful else math.sqrt(inputs.images.numel() / _PUBLISHED_PIXELS)
        return scale * (low + (high - low) * share)

    def _scale(self, images: Tensor) -> float:
        if not self.for_group:
            return 1.0
        count, *size = self.for_group
        return math.sqrt(images[0].numel() / math.prod(size) * count / len(images))
