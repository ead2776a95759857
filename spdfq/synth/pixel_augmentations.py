"""Augmentations that change pixel values and move nothing."""

from typing import ClassVar, Literal

import torch
from attrs import field, frozen, validators

from spdfq.registry import augmentations
from spdfq.runtime.runtime import normal, uniform
from spdfq.synth.augmentations import Augmentation, check_draw
from spdfq.synth.changes import Affine, Change, Frequencies, Moment

_NOT_NEGATIVE = (validators.ge(0.0), validators.lt(10.0))


@augmentations.register("channel_offset", paper="arXiv:2407.20021")
@frozen(kw_only=True)
class ChannelOffset(Augmentation):
    """Add a normal offset to each channel of each image; it shrinks towards the end of the run (as in MimiQ).

    Args:
        std: standard deviation at the beginning, in normalised pixel units; it falls linearly to 0.
    """

    std: float = field(default=0.5, validator=list(_NOT_NEGATIVE))

    def draw(self, generator: torch.Generator, moment: Moment) -> Affine:
        """The offsets of one iteration."""
        check_draw(generator, moment)
        left = 1 - moment.iteration / moment.iterations
        drawn = normal(generator, moment.count, moment.size[0])
        return Affine(scale=torch.ones_like(drawn), offset=self.std * left * drawn)


@augmentations.register("color_jitter", paper="arXiv:2407.20021")
@frozen(kw_only=True)
class ColorJitter(Augmentation):
    """Shift and scale each channel of each image: ``x ← (x − m) / exp(s)`` with uniform m and s (as in MimiQ).

    Args:
        mean: m lies between minus and plus this number, in normalised pixel units.
        std: s lies between minus and plus this number.
    """

    mean: float = field(default=1.0, validator=list(_NOT_NEGATIVE))
    std: float = field(default=1.0, validator=list(_NOT_NEGATIVE))

    def draw(self, generator: torch.Generator, moment: Moment) -> Affine:
        """The shifts and scales of one iteration."""
        check_draw(generator, moment)
        m, s = 2 * uniform(generator, 2, moment.count, moment.size[0]) - 1
        scale = (-self.std * s).exp()
        return Affine(scale=scale, offset=-self.mean * m * scale)


@frozen(kw_only=True)
class _FrequencyFilter(Augmentation):
    keep: ClassVar[Literal["low", "high"]]

    radius: float = field(default=0.5, validator=[validators.gt(0.0), validators.lt(1.0)])
    probability: float = field(default=0.5, validator=[validators.ge(0.0), validators.le(1.0)])

    def draw(self, generator: torch.Generator, moment: Moment) -> Change:
        """The filter, or a change that does nothing."""
        check_draw(generator, moment)
        filters = bool(uniform(generator) < self.probability)
        return Frequencies(radius=self.radius, keep=self.keep) if filters else Change()


@augmentations.register("low_pass")
@frozen(kw_only=True)
class LowPass(_FrequencyFilter):
    """Remove the frequencies above a radius.

    Args:
        radius: the limit, as a share of the highest frequency along an axis.
        probability: of filtering in an iteration.
    """

    keep: ClassVar[Literal["low", "high"]] = "low"


@augmentations.register("high_pass")
@frozen(kw_only=True)
class HighPass(_FrequencyFilter):
    """Remove the frequencies below a radius; the mean of each channel stays.

    Args:
        radius: the limit, as a share of the highest frequency along an axis.
        probability: of filtering in an iteration.
    """

    keep: ClassVar[Literal["low", "high"]] = "high"
