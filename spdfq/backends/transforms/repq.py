"""RepQ's transform: per-channel ranges after a LayerNorm, folded into the LayerNorm and the layers that follow."""

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import attrs
import torch
from attrs import define, field, frozen, validators
from torch import Tensor

from spdfq.backends.base import NEITHER, Calibration, Step
from spdfq.backends.calibrate import fit_weights
from spdfq.backends.transforms.channels import channel_statistics
from spdfq.backends.transforms.norms import NormGroup, norm_groups, rescale, uniform
from spdfq.errors import SpdfqError
from spdfq.quantized.model import QuantizedModel
from spdfq.quantized.sites import WEIGHT
from spdfq.quantizers import GridMseObserver, Observer, PercentileMseObserver, UniformQuantizer
from spdfq.quantizers.statistics import Statistics
from spdfq.recipe.structure import component
from spdfq.registry import steps

_NOTHING = "repq: nothing to fold; put { type = 'repq', part = 'channels' } before it"


@frozen(eq=False)
class Reparameterisation:
    """One scale and zero point for all channels, with a factor and an offset for each channel.

    With ``scale`` and ``zero_point``, ``x' = x / factor - offset`` has the same codes as x with the scale and the zero
    point of its channel.

    Args:
        scale: float64 ``[]``, the mean of the channels'.
        zero_point: float64 ``[]``, the rounded mean of the channels'.
        factor: float64 ``[C]``, r.
        offset: float64 ``[C]``, b.
    """

    scale: Tensor
    zero_point: Tensor
    factor: Tensor
    offset: Tensor


def reparameterise(scale: Tensor, zero_point: Tensor) -> Reparameterisation:
    """The factors and offsets of RepQ-ViT (arXiv 2212.08254, section 3.2) for ``scale``, ``zero_point`` ``[C]``."""
    scale, zero_point = scale.double(), zero_point.double()
    one_scale, one_zero = scale.mean(), zero_point.mean().round()
    factor = scale / one_scale
    return Reparameterisation(one_scale, one_zero, factor, -zero_point * scale / factor + one_zero * one_scale)


@steps.register("repq", paper="arXiv:2212.08254")
@define(kw_only=True)
class RepQ(Step):
    """Give each channel after a LayerNorm its own range, then fold the ranges into the LayerNorm and the next layers.

    From scale s and zero point z of each channel come one scale s' = mean s and zero point z' = round(mean z), and
    r = s / s', b = z's' - zs / r. The LayerNorm's weight and bias become w / r and β / r - b, a layer's weight and bias
    W diag(r) and c + W diag(r) b. The float model computes the same; quantized per tensor, it equals the model
    quantized per channel. First the median of each channel is subtracted (the same fold with r = 1), so that zero lies
    inside its range. LayerNorms whose output goes to anything but linear layers do not change; ``sites.json`` names
    them with the reason. A layer without a bias (Swin's reduction) gets one.

    The weight ranges of the layers are chosen again. Put it after ``calibrate``.

    Args:
        part: ``both``, or one of its two halves, with other steps between them: ``channels`` (a range for each channel)
            and ``fold``.
        observer: chooses the range of each channel.
        weight_observer: chooses the weight ranges of the layers.
        batch: images per forward pass.
    """

    calibrates: ClassVar[frozenset[str]] = NEITHER
    replaces_quantizers: ClassVar[bool] = True
    changes_weights: ClassVar[bool] = True

    part: Literal["both", "channels", "fold"] = "both"
    observer: Any = component("observer", default=PercentileMseObserver)
    weight_observer: Any = component("observer", default=GridMseObserver)
    batch: int = field(default=32, validator=validators.ge(1))

    def check(self, model: QuantizedModel, before: Sequence[Step]) -> None:
        """Refuses to fold ranges of channels if channels have no ranges, or if these are folded already."""
        super().check(model, before)
        if self.part == "fold" and not self._finds_channels(model, before):
            raise SpdfqError(_NOTHING)

    @staticmethod
    def _finds_channels(model: QuantizedModel, before: Sequence[Step]) -> bool:
        """Whether channels of activations have ranges of their own after the steps before."""
        if parts := [step.part for step in before if isinstance(step, RepQ)]:
            return parts[-1] == "channels"  # the others fold all of them
        activations = [quantizer for name, quantizer in model.quantizers.items() if model.sites[name].kind != WEIGHT]
        calibrated = any("activations" in step.calibrates for step in before)
        return calibrated and any(quantizer.channel_axis is not None for quantizer in activations)

    @torch.no_grad()
    def run(self, model: QuantizedModel, calibration: Calibration) -> None:
        """Transforms the model; its notes list the LayerNorms that do not change.

        Raises:
            NonFiniteError: the output of a LayerNorm holds NaN or infinity.
            SpdfqError: ``part`` is ``fold`` and no channels have their own ranges.
        """
        groups, skipped = norm_groups(model, calibration.images[:1])
        if self.part != "fold":
            model.note("repq", skipped or ([] if groups else ["no output of a LayerNorm goes to linear layers only"]))
            self._split(model, groups, calibration)
        if self.part != "channels":
            self._fold(model, groups)

    def _split(self, model: QuantizedModel, groups: list[NormGroup], calibration: Calibration) -> None:
        """Subtracts the median of each channel, and gives each channel its own range."""
        observed = {group.observed: f"{group.name}: its output" for group in groups}
        seen = channel_statistics(model, observed, calibration, self.batch, "repq")
        for group in groups:
            statistics, quantizer = seen[group.observed], uniform(model, group.inputs[0])
            median = statistics.samples.median(dim=1).values
            rescale(model, group, torch.ones_like(median), median)
            channels = attrs.evolve(quantizer, granularity="channel", axis=-1)
            channels.restore(_channel_ranges(statistics, median, self.observer, channels))
            for site in group.inputs:
                model.replace_quantizer(site, _restored(channels, channels.tensors()))

    def _fold(self, model: QuantizedModel, groups: list[NormGroup]) -> None:
        """Folds the ranges of the channels into LayerNorms and layers, and quantizes per tensor again."""
        split = [group for group in groups if model.quantizers[group.inputs[0]].channel_axis is not None]
        if groups and not split:
            raise SpdfqError(_NOTHING)
        for group in split:
            channels = model.quantizers[group.inputs[0]].tensors()
            found = reparameterise(channels["scale"], channels["zero_point"])
            rescale(model, group, found.factor, found.offset)
            for site in group.inputs:
                whole = attrs.evolve(uniform(model, site), granularity="tensor", axis=0)
                stored = {"scale": found.scale.float(), "zero_point": found.zero_point.to(whole.code_dtype)}
                model.replace_quantizer(site, _restored(whole, stored))
            fit_weights(model, self.weight_observer, [name for name in group.weights if name in model.quantizers])


def _channel_ranges(
    statistics: Statistics, median: Tensor, observer: Observer, channels: UniformQuantizer
) -> dict[str, Tensor]:
    """Scale and zero point of each channel after its median was subtracted."""
    fitted = channels.fitted(*observer.range_of(statistics.shifted(median), channels))
    dead = statistics.low == statistics.high
    if bool(dead.any()) and not bool(dead.all()):
        # a constant channel is zero now, with any scale; a scale of 1 would distort the mean of all scales
        fitted["scale"] = torch.where(dead, fitted["scale"][~dead].mean(), fitted["scale"])
    return fitted


def _restored(quantizer: UniformQuantizer, tensors: dict[str, Tensor]) -> UniformQuantizer:
    """A quantizer with the same options and these tensors."""
    copy = attrs.evolve(quantizer)
    copy.restore(tensors)
    return copy
