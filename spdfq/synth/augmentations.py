"""Augmentations that move the images a teacher sees during synthesis; what follows the images moves along."""

import torch
from attrs import field, frozen, validators

from spdfq.registry import augmentations
from spdfq.synth.changes import Change, Crop, Moment, Move

_LARGEST_SIDE = 100_000
_PROBABILITY = (validators.ge(0.0), validators.le(1.0))


@frozen(kw_only=True)
class Augmentation:
    """Base class of augmentations."""

    def draw(self, generator: torch.Generator, moment: Moment) -> Change:
        """What happens to the images of an iteration; the generator and the moment alone decide."""
        raise TypeError(f"{type(self).__name__} does not define draw")


def _widths(_: object, __: object, value: int | tuple[int, ...]) -> None:
    widths = (value,) if isinstance(value, int) else value
    if not widths or min(widths) < 1 or max(widths) > _LARGEST_SIDE:
        raise ValueError(f"must be 1 to {_LARGEST_SIDE} pixels, or an array of such, got {value}")


@augmentations.register("jitter", paper="arXiv:2203.02250")
@frozen(kw_only=True)
class Jitter(Augmentation):
    """Roll all images of the group by the same random offset.

    Args:
        pixels: largest offset along each axis; an array has one for each of as many equal stages of the run.
        shared_axes: one draw for rows and columns (as PSAQ-ViT does), or one each.
        for_side: shorter side of the images that ``pixels`` is meant for; on others it is scaled along, to 1 pixel at
            least. Left out, it is taken as it is.
    """

    pixels: int | tuple[int, ...] = field(default=2, validator=_widths)
    shared_axes: bool = False
    for_side: int | None = field(default=None, validator=validators.optional(validators.ge(1)))

    def draw(self, generator: torch.Generator, moment: Moment) -> Move:
        """The move of one iteration."""
        width = self.width(moment)
        down, right = torch.randint(-width, width + 1, (2,), generator=generator).tolist()
        return Move(shift=(down, down if self.shared_axes else right))

    def width(self, moment: Moment) -> int:
        """The largest offset now, in pixels of these images."""
        stages = (self.pixels,) if isinstance(self.pixels, int) else self.pixels
        pixels = stages[moment.stage(len(stages))]
        return max(1, round(pixels * min(moment.size[1:]) / self.for_side)) if self.for_side else pixels


@augmentations.register("flip", paper="arXiv:2203.02250")
@frozen(kw_only=True)
class Flip(Augmentation):
    """Mirror the images left to right at random.

    Args:
        probability: of mirroring in an iteration.
        per_image: each image by itself, instead of the whole group at once.
    """

    probability: float = field(default=0.5, validator=list(_PROBABILITY))
    per_image: bool = False

    def draw(self, generator: torch.Generator, moment: Moment) -> Move:
        """The move of one iteration."""
        drawn = torch.rand(moment.count if self.per_image else 1, generator=generator) < self.probability
        return Move(flip=tuple(drawn.tolist()) if self.per_image else bool(drawn))


@augmentations.register("random_resized_crop")
@frozen(kw_only=True)
class RandomResizedCrop(Augmentation):
    """Show a random box of each image, resized to the whole.

    Neither attention priors that follow the images nor token pruning can go along; both refuse it.

    Args:
        smallest: smallest share of the image's area that a box may have; the share is uniform from there to 1.
        stretch: largest ratio of the box's aspect to the image's, either way; its logarithm is uniform. Large
            boxes are stretched less, so far as they fit into the image.
    """

    smallest: float = field(default=0.5, validator=[validators.gt(0.0), validators.le(1.0)])
    stretch: float = field(default=4 / 3, validator=[validators.ge(1.0), validators.le(10.0)])

    def draw(self, generator: torch.Generator, moment: Moment) -> Crop:
        """The boxes of one iteration."""
        area, aspect, down, right = torch.rand(4, moment.count, generator=generator)
        area = self.smallest + (1 - self.smallest) * area
        stretched = self.stretch ** (aspect - 0.5)  # of each side: the ratio of both is its square
        stretched = stretched.clamp(area.sqrt(), area.rsqrt())
        full = torch.tensor(moment.size[1:])[:, None]
        sides = full * torch.stack([area.sqrt() * stretched, area.sqrt() / stretched])
        sides = torch.minimum(sides.round().clamp(min=1), full).long()
        corner = (torch.stack([down, right]) * (full - sides + 1)).long().clamp(max=full - sides)
        return Crop(boxes=torch.cat([corner, sides]).T)
