"""Augmentations that move the images which the teacher sees during synthesis."""

from typing import ClassVar

import torch
from attrs import field, frozen, validators
from einops import rearrange

from spdfq.errors import ComponentError
from spdfq.recipe.structure import Checked
from spdfq.registry import augmentations
from spdfq.synth.changes import Change, Crop, Moment, Move

_LARGEST_SHIFT = 100_000
_PROBABILITY = (validators.ge(0.0), validators.le(1.0))


@frozen(kw_only=True)
class Augmentation(Checked):
    """Base class of augmentations. A subclass defines `draw`."""

    followable: ClassVar[bool] = True
    """Whether maps on the token grid can follow the images. If not, losses and pruning that need it are refused."""

    def draw(self, generator: torch.Generator, moment: Moment) -> Change:
        """What to do to the images of one iteration. It must depend on the generator and the moment alone."""
        raise ComponentError(f"{type(self).__name__} does not define draw")


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
        largest = self.largest_shift(moment)
        down, right = torch.randint(-largest, largest + 1, (2,), generator=generator).tolist()
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
        drawn = torch.rand(moment.count if self.per_image else 1, generator=generator) < self.probability
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
        area, aspect, down, right = torch.rand(4, moment.count, generator=generator)
        area = self.smallest + (1 - self.smallest) * area
        stretched = self.stretch ** (aspect - 0.5)  # factor of one side; the aspect changes by its square
        stretched = stretched.clamp(area.sqrt(), area.rsqrt())
        full = rearrange(torch.tensor(moment.size[1:]), "side -> side 1")
        sides = full * torch.stack([area.sqrt() * stretched, area.sqrt() / stretched])
        sides = torch.minimum(sides.round().clamp(min=1), full).long()
        corner = (torch.stack([down, right]) * (full - sides + 1)).long().clamp(max=full - sides)
        return Crop(boxes=torch.cat([corner, sides]).T)
