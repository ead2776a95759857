"""The values of each quantized site against its range: clipped values, used levels, noise, outliers, dead channels."""

import math
from collections.abc import Callable

import attrs
import torch
from attrs import define, field, frozen
from torch import Tensor

from spdfq.doctor.channels import ChannelRanges, Outlier, as_channels
from spdfq.doctor.pair import Images, Pair
from spdfq.quantized.dequantized import decibels, dequantized, energy, level_values
from spdfq.quantizers import GridMseObserver, PercentileMseObserver, Quantizer
from spdfq.quantizers.option_checks import BYTE
from spdfq.runtime import Runtime


@frozen
class SiteValues:
    """What was observed at one site.

    Activations are those of the quantized model, so they carry the errors of the sites before.

    Args:
        site: its name.
        kind: as in ``sites.json``.
        bits: of its quantizer.
        low: smallest value.
        high: largest value.
        range_low: smallest value that the quantizer can give, of any channel.
        range_high: largest value that it can give.
        clipped: share of the values beyond both ends of the range by more than half a step, in percent.
        levels: number of values that the quantizer can give.
        used: how many of them occurred.
        snr: signal-to-noise ratio in dB: the sum of squares over that of the rounding and clipping errors.
        best_snr: the same with a range chosen again for these values, at the same bits; not for weights that learned,
            whose difference from the float weight is not rounding alone.
        dead: number of channels with one value after quantization, but several before.
        constant: number of channels with one value before quantization, too.
        channels: number of channels; 0 where there are none.
        outlier_channels: channels with much larger values than the others.
        outlier_tokens: the same of tokens.
    """

    site: str
    kind: str
    bits: int
    low: float
    high: float
    range_low: float
    range_high: float
    clipped: float
    levels: int
    used: int
    snr: float
    best_snr: float
    dead: int = 0
    constant: int = 0
    channels: int = 0
    outlier_channels: tuple[Outlier, ...] = ()
    outlier_tokens: tuple[Outlier, ...] = ()


def site_values(pair: Pair, images: Images, runtime: Runtime, learned: bool) -> list[SiteValues]:
    """The values of every site that has a counterpart in float, over two forward passes of the quantized model.

    Args:
        pair: the quantized model and its reference.
        images: calibration images.
        runtime: progress.
        learned: whether a step changed the weights for other reasons than their range.
    """
    model, device = pair.model, images.images.device
    seen = {name: _Observed.of(pair, name, device) for name in pair.sites}
    weights = {name: pair.reference.weight(name) for name in seen if name in pair.weights}
    activations = seen.keys() - weights.keys()
    with runtime.progress("looking at ranges", 2) as advance, torch.no_grad():
        for look in (_Observed.observe, _Observed.compare):
            for name, weight in weights.items():
                look(seen[name], weight)

            def visit(name: str, kind: str, tensor: Tensor, look: Callable[[_Observed, Tensor], None] = look) -> Tensor:
                if name in activations:
                    look(seen[name], tensor)
                return pair.quantized(name, kind, tensor)

            with model.visiting(visit):
                pair.outputs(model.network, images.images)
            advance(1)
    return [observed.result(learned) for observed in seen.values()]


@frozen(eq=False)
class _Reach:
    """The smallest and the largest value that a quantizer gives, and how far beyond them a value is clipped."""

    low: Tensor
    high: Tensor
    below: Tensor
    above: Tensor

    @classmethod
    def of(cls, quantizer: Quantizer, shape: tuple[int, ...], device: torch.device) -> "_Reach":
        last = quantizer.levels - 1
        # values of more than 8 bits are evenly spaced, so the ends are enough
        codes = None if quantizer.bits <= BYTE else (0, 1, last - 1, last)
        values = level_values(quantizer, shape, device, codes)
        return cls(values[0], values[-1], (values[1] - values[0]) / 2, (values[-1] - values[-2]) / 2)

    def beyond(self, x: Tensor) -> Tensor:
        """Which values are clipped, bool."""
        return (x < self.low - self.below) | (x > self.high + self.above)

    @property
    def ends(self) -> tuple[float, float]:
        """The smallest and the largest value of any channel."""
        return float(self.low.min()), float(self.high.max())


@define(eq=False)
class _Observed:
    """What is summed up at one site.

    Args:
        pair: the quantized model and its reference.
        name: of the site.
        quantizer: of the quantized model.
        again: the same quantizer without a range.
        reach: the smallest and largest value that the quantizer gives, and half of the steps beside them; each of a
            shape that broadcasts against the values.
        counts: how often each code occurred.
    """

    pair: Pair
    name: str
    quantizer: Quantizer
    again: Quantizer
    reach: _Reach
    counts: Tensor
    plain: ChannelRanges = field(factory=ChannelRanges, init=False)
    rounded: ChannelRanges = field(factory=ChannelRanges, init=False)
    low: float = field(default=math.inf, init=False)
    high: float = field(default=-math.inf, init=False)
    values: int = field(default=0, init=False)
    clipped: int = field(default=0, init=False)
    signal: float = field(default=0.0, init=False)
    noise: float = field(default=0.0, init=False)
    best_noise: float = field(default=0.0, init=False)

    @classmethod
    def of(cls, pair: Pair, name: str, device: torch.device) -> "_Observed":
        quantizer = pair.model.quantizers[name]
        counts = torch.zeros(quantizer.levels, dtype=torch.long, device=device)
        reach = _Reach.of(quantizer, pair.model.sites[name].shape, device)
        return cls(pair, name, quantizer, attrs.evolve(quantizer).to(device), reach, counts)

    @property
    def is_weight(self) -> bool:
        return self.name in self.pair.weights

    def observe(self, tensor: Tensor) -> None:
        """Sum up the values of one batch."""
        x = tensor.detach().float()
        # a learned weight is not the float weight rounded to the nearest value
        q = self.pair.weights[self.name] if self.is_weight else dequantized(self.quantizer, x)
        self.low, self.high = min(self.low, float(x.min())), max(self.high, float(x.max()))
        self.values += x.numel()
        self.clipped += int(self.reach.beyond(x).sum())
        self.signal += energy(x)
        self.noise += energy(x - q)
        codes = self.quantizer.codes(q if self.is_weight else x)
        self.counts += torch.bincount(codes.flatten().int(), minlength=len(self.counts))
        self.again.observe(x)
        for ranges, values in ((self.plain, x), (self.rounded, q)):
            if (channels := as_channels(self.pair.model, self.name, values)) is not None:
                ranges.add(channels)

    def compare(self, tensor: Tensor) -> None:
        """Sum up the error of one batch with a range chosen again, after all batches were observed."""
        if not self.again.frozen:
            self.again.freeze(GridMseObserver() if self.is_weight else PercentileMseObserver())
        x = tensor.detach().float()
        self.best_noise += energy(x - dequantized(self.again, x))

    def result(self, learned: bool) -> SiteValues:
        """What was found."""
        low, high = self.reach.ends
        snr = decibels(self.signal, self.noise)
        found = SiteValues(
            site=self.name,
            kind=self.pair.model.sites[self.name].kind,
            bits=self.quantizer.bits,
            low=self.low,
            high=self.high,
            range_low=low,
            range_high=high,
            clipped=100 * self.clipped / self.values,
            levels=self.quantizer.levels,
            used=int((self.counts > 0).sum()),
            snr=snr,
            best_snr=snr if learned and self.is_weight else max(snr, decibels(self.signal, self.best_noise)),
        )
        if not self.plain.channels:
            return found
        constant, rounded = self.plain.constant, self.rounded.constant
        return attrs.evolve(
            found,
            channels=self.plain.channels,
            dead=int((rounded & ~constant).sum()),
            constant=int(constant.sum()),
            outlier_channels=() if self.is_weight else self.plain.outlier_channels(),
            outlier_tokens=() if self.is_weight else self.plain.outlier_tokens(),
        )
