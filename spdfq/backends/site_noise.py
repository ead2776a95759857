"""The noise of every quantized site: its signal-to-noise ratio, a histogram of its values, and its levels."""

import math
from typing import Any

import torch
from attrs import define, field
from torch import Tensor

from spdfq.backends.blocks import block_names
from spdfq.errors import ModelError
from spdfq.quantized.dequantized import decibels, energy, folded_shift, level_values
from spdfq.quantized.model import QuantizedModel
from spdfq.quantized.sites import WEIGHT
from spdfq.quantizers import Quantizer
from spdfq.runtime import Runtime

IMAGES = 16
"""At most so many images are looked at, in one forward pass."""
BINS = 64
_MARGIN = 0.25
_MOST_LEVELS = 64
_EXACT = 100.0


def site_noise(model: QuantizedModel, images: Tensor, runtime: Runtime) -> dict[str, Any]:
    """What each quantizer changes in the tensor that enters it, over one forward pass of the quantized model.

    Args:
        model: calibrated, on the runtime's device.
        images: normalised ``[n, C, H, W]``; the first 16 are used.
        runtime: device and modes.

    Returns:
        Plain data: ``images``, their number; ``blocks``, the names of the blocks in order, empty for a model without
        them; and ``sites``: for each its name, ``kind``, ``bits``, ``snr`` in dB, ``counts`` of the values in 64 bins,
        ``low`` and ``high`` of the bins, the ``levels`` of the quantizer, and whether these are ``relative``: values of
        channels with ranges of their own are relative to the range of their channel, from 0 to 1. The first and the
        last bin also count everything beyond. ``snr`` is ``None`` if a value is not finite, and for a weight that a
        step has rounded already, because its float value is gone. ``levels`` is ``None`` above 64 of them.
    """
    model.check_calibrated()
    shown = images[:IMAGES].to(runtime.device, torch.float32)
    found = {name: _Site.of(model, name, shown.device) for name in model.quantizers}

    def visit(name: str, kind: str, tensor: Tensor) -> Tensor:
        quantized = model.quantized(name, kind, tensor)
        if name in found:
            found[name].add(tensor.float(), quantized.float())
        return quantized

    with runtime.own_modes(), torch.no_grad(), model.visiting(visit):
        model.network(shown)
    return {"images": len(shown), "blocks": _blocks(model), "sites": [site.result() for site in found.values()]}


def _blocks(model: QuantizedModel) -> list[str]:
    try:
        return block_names(model)
    except ModelError:
        return []


@define(eq=False)
class _Site:
    """What is summed up at one site.

    Args:
        about: name, kind and bits.
        shift: of the quantizer, in a bias.
        low: lower end of the range of the quantizer; of a shape that broadcasts against the values.
        width: of the range.
        levels: that the quantizer can give, relative to the range; ``None`` if there are too many.
    """

    about: dict[str, Any]
    shift: float
    low: Tensor
    width: Tensor
    levels: Tensor | None
    signal: float = field(default=0.0, init=False)
    noise: float = field(default=0.0, init=False)
    counts: Tensor = field(init=False)

    def __attrs_post_init__(self) -> None:
        self.counts = torch.zeros(BINS, dtype=torch.long, device=self.low.device)

    @classmethod
    def of(cls, model: QuantizedModel, name: str, device: torch.device) -> "_Site":
        quantizer: Quantizer = model.quantizers[name]
        few = quantizer.levels <= _MOST_LEVELS
        ends = None if few else (0, quantizer.levels - 1)
        values = level_values(quantizer, model.sites[name].shape, device, ends)
        low, width = values[0], (values[-1] - values[0]).clamp(min=1e-30)
        # of channels with the same kind of range these are the same for all
        levels = ((values - low) / width).flatten(1).median(dim=1).values if few else None
        about = {"site": name, "kind": model.sites[name].kind, "bits": quantizer.bits}
        return cls(about, folded_shift(quantizer), low, width, levels)

    def add(self, x: Tensor, quantized: Tensor) -> None:
        self.signal += energy(x)
        self.noise += energy(x - (quantized - self.shift))
        bins = ((x - self.low) / self.width + _MARGIN) * (BINS / (1 + 2 * _MARGIN))
        self.counts += torch.bincount(bins.nan_to_num().clamp(0, BINS - 1).int().flatten(), minlength=BINS)

    def result(self) -> dict[str, Any]:
        relative = self.low.numel() > 1
        low, width = (0.0, 1.0) if relative else (float(self.low), float(self.width))
        levels = None if self.levels is None else [_short(low + width * each) for each in self.levels.tolist()]
        return {
            **self.about,
            "snr": self._snr(),
            "low": _short(low - _MARGIN * width),
            "high": _short(low + (1 + _MARGIN) * width),
            "counts": self.counts.tolist(),
            "levels": levels,
            "relative": relative,
        }

    def _snr(self) -> float | None:
        if not math.isfinite(self.noise):
            return None
        snr = decibels(self.signal, self.noise)
        return None if self.about["kind"] == WEIGHT and snr >= _EXACT else round(snr, 2)


def _short(value: float) -> float:
    return float(f"{value:.5g}")
