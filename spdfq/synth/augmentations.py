"""Augmentations of the images a teacher sees during synthesis; whoever follows them reads the same move."""

import torch
from attrs import field, frozen, validators
from torch import Tensor

from spdfq.registry import augmentations


@frozen(kw_only=True)
class Move:
    """How the whole group was moved: first mirrored, then rolled.

    Args:
        flip: mirrored left to right.
        shift: rows and columns rolled by, in pixels.
    """

    flip: bool = False
    shift: tuple[int, int] = (0, 0)

    def apply(self, images: Tensor) -> Tensor:
        """The moved images ``[B, C, H, W]``."""
        images = images.flip(-1) if self.flip else images
        return images if self.shift == (0, 0) else images.roll(self.shift, (-2, -1))

    def then(self, other: "Move") -> "Move":
        """This move followed by another; mirroring turns an earlier sideways roll around."""
        down, right = self.shift
        right = -right if other.flip else right
        return Move(flip=self.flip != other.flip, shift=(down + other.shift[0], right + other.shift[1]))


@augmentations.register("jitter", paper="arXiv:2203.02250")
@frozen(kw_only=True)
class Jitter:
    """Roll all images of the group by the same random offset.

    Args:
        pixels: largest offset along each axis.
        shared_axes: one draw for rows and columns (as PSAQ-ViT does), or one each.
    """

    pixels: int = field(default=2, validator=validators.ge(1))
    shared_axes: bool = False

    def draw(self, generator: torch.Generator) -> Move:
        """The move of one iteration."""
        down, right = torch.randint(-self.pixels, self.pixels + 1, (2,), generator=generator).tolist()
        return Move(shift=(down, down if self.shared_axes else right))


@augmentations.register("flip", paper="arXiv:2203.02250")
@frozen(kw_only=True)
class Flip:
    """Mirror all images of the group at random.

    Args:
        probability: of mirroring in an iteration.
    """

    probability: float = field(default=0.5, validator=[validators.ge(0.0), validators.le(1.0)])

    def draw(self, generator: torch.Generator) -> Move:
        """The move of one iteration."""
        return Move(flip=bool(torch.rand((), generator=generator) < self.probability))
