"""Augmentations that move the images which the teacher sees during synthesis."""

from typing import ClassVar

import torch
from attrs import field, frozen, validators
from einops import rearrange
from torch import Tensor

from spdfq.errors import ComponentError, SpdfqError
from spdfq.recipe.structure import Checked
from spdfq.registry import augmentations
from spdfq.runtime.arguments import check_generator, check_tensor
from spdfq.runtime.runtime import uniform
from spdfq.synth.changes import Change, Crop, Moment, Move

_LARGEST_SHIFT = 100_000
_PROBABILITY = (validators.ge(0.0), validators.le(1.0))


@frozen(kw_only=True)
class Augmentation(Checked):
    """Base class of augmentations. A subclass defines `draw`."""

    followable: ClassVar[bool] = True
    """Whether maps on the token grid can follow the images. If not, losses and pruning that need it are refused."""

    def __call__(self, images: Tensor, generator: torch.Generator, iteration: int = 0, iterations: int = 1) -> Tensor:
        """Draw a change and apply it.

        Args:
            images: ``[B, C, h, w]``.
            generator: CPU generator.
            iteration: counted from 0; some augmentations change in the course of a run.
            iterations: number of iterations of the run.

        Returns:
            The changed images, differentiable. Maps follow them with what `draw` returns; see `Change.follow`.
        """
        check_tensor("images", images, "B, C, h, w")
        channels, height, width = images.shape[1:]
        size = (channels, height, width)
        moment = Moment(iteration=iteration, iterations=iterations, count=len(images), size=size)
        return self.draw(generator, moment).apply(images)

    def draw(self, generator: torch.Generator, moment: Moment) -> Change:
        """What to do to the images of one iteration. It must depend on the generator and the moment alone.

        Args:
            generator: CPU generator.
            moment: when, and for which images: their number and size.

        Raises:
            SpdfqError: an argument of another type.
        """
        raise ComponentError(f"{type(self).__name__} does not define draw")


def check_draw(generator: torch.Generator, moment: Moment) -> None:
    """Refuse what is not a CPU generator and a moment."""
    check_generator(generator)
    if not isinstance(moment, Moment):
        raise SpdfqError(f"moment must be Moment(count=B, size=(C, h, w), ...), got {type(moment).__name__}")


def _shifts(_: object, __: object, value: int | tuple[int, ...]) -> None:
    shifts = (value,) if isinstance(value, int) else value
    if not shifts or min(shifts) < 1 or max(shifts) > _LARGEST_SHIFT:
        raise ValueError(f"must be 1 to {_LARGEST_SHIFT} pixels, or an array of such numbers, got {value}")


@augmentations.register("jitter", paper="arXiv:2203.02250")
@frozen(kw_only=True)
class Jitter(Augmentation):
    """Roll all images of the group by the same random offset.

    Args:
        pixels: largest offset along each axis; an array divides the run into stages of equal length, with one offset
            for each stage.
        shared_axes: draw one offset for both axes (as PSAQ-ViT does) instead of one for each axis.
        for_side: length of the images' shorter side that ``pixels`` is meant for; for other images the offset is scaled
            in proportion, to at least 1 pixel. Without it the offset is not scaled.
    """

    pixels: int | tuple[int, ...] = field(default=2, validator=_shifts)
    shared_axes: bool = False
    for_side: int | None = field(default=None, validator=validators.optional(validators.ge(1)))

    def draw(self, generator: torch.Generator, moment: Moment) -> Move:
        """The movement of one iteration."""
        check_draw(generator, moment)
        largest = self.largest_shift(moment)
        down, right = torch.randint(-largest, largest + 1, (2,), generator=generator, device="cpu").tolist()
        return Move(shift=(down, down if self.shared_axes else right))

    def largest_shift(self, moment: Moment) -> int:
        """The largest offset at this moment, in pixels of these images."""
        stages = (self.pixels,) if isinstance(self.pixels, int) else self.pixels
        pixels = stages[moment.stage(len(stages))]
        return max(1, round(pixels * min(moment.size[1:]) / self.for_side)) if self.for_side else pixels


@augmentations.register("flip", paper="arXiv:2203.02250")
@frozen(kw_only=True)
class Flip(Augmentation):
    """Mirror the images left to right at random.

    Args:
        probability: of mirroring in an iteration.
        per_image: decide for each image separately instead of once for the whole group.
    """

    probability: float = field(default=0.5, validator=list(_PROBABILITY))
    per_image: bool = False

    def draw(self, generator: torch.Generator, moment: Moment) -> Move:
        """The movement of one iteration."""
        check_draw(generator, moment)
        drawn = uniform(generator, moment.count if self.per_image else 1) < self.probability
        return Move(flip=tuple(drawn.tolist()) if self.per_image else bool(drawn))


@augmentations.register("random_resized_crop")
@frozen(kw_only=True)
class RandomResizedCrop(Augmentation):
    """Show a random box of each image, resized to the full size.

    Attention priors that follow the images and token pruning cannot be combined with it.

    Args:
        smallest: smallest share of the image's area that a box may have; the share is uniform from there to 1.
        stretch: largest ratio between the aspect of a box and that of the image, in either direction; its logarithm is
            uniform. A large box is stretched less if it would not fit into the image.
    """

    followable: ClassVar[bool] = False

    smallest: float = field(default=0.5, validator=[validators.gt(0.0), validators.le(1.0)])
    stretch: float = field(default=4 / 3, validator=[validators.ge(1.0), validators.le(10.0)])

    def draw(self, generator: torch.Generator, moment: Moment) -> Crop:
        """The boxes of one iteration."""
        check_draw(generator, moment)
        area, aspect, down, right = uniform(generator, 4, moment.count)
        area = self.smallest + (1 - self.smallest) * area
        stretched = self.stretch ** (aspect - 0.5)  # factor of one side; the aspect changes by its square
        stretched = stretched.clamp(area.sqrt(), area.rsqrt())
        full = rearrange(torch.tensor(moment.size[1:], device="cpu"), "side -> side 1")
        sides = full * torch.stack([area.sqrt() * stretched, area.sqrt() / stretched])
        sides = torch.minimum(sides.round().clamp(min=1), full).long()
        corner = (torch.stack([down, right]) * (full - sides + 1)).long().clamp(max=full - sides)
        return Crop(boxes=torch.cat([corner, sides]).T)
