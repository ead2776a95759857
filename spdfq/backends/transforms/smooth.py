"""Smoothing: the channels of a layer's input are shifted and scaled to similar ranges, and the layer undoes it."""

from collections.abc import Sequence
from functools import partial
from typing import Any, ClassVar

import attrs
import torch
from attrs import define, field, frozen, validators
from torch import Tensor, nn

from spdfq.backends.base import NEITHER, Calibration, Step
from spdfq.backends.transforms.channels import channel_ranges, channel_statistics
from spdfq.backends.transforms.float_changes import Kept, check_same_output, refuse_after_calibration
from spdfq.backends.transforms.norms import norm_groups, rescale
from spdfq.backends.transforms.rotatable import places, score_obstacle, value_obstacle
from spdfq.backends.transforms.streams import Attention, Part
from spdfq.backends.transforms.tracing import structure
from spdfq.backends.wiring import LinearCalls, wiring
from spdfq.quantized.model import QuantizedModel
from spdfq.quantized.sites import input_site
from spdfq.quantizers import Observer, PercentileMseObserver, UniformQuantizer
from spdfq.quantizers.statistics import Statistics
from spdfq.recipe.structure import component
from spdfq.registry import steps
from spdfq.runtime.shared_modules import Hook, own_hooks


@steps.register("smooth", paper="arXiv:2304.09145")
@define(kw_only=True)
class Smooth(Step):
    """Shift and scale the channels of each linear layer's input to similar ranges. Exact in float.

    A channel x with the range [a, b] becomes ``(x - (a + b) / 2) / r`` with ``r = ((b - a) / g)**strength``, where g is
    the geometric mean of all channels. The layer undoes it: ``W diag(r)`` and ``b + W (a + b) / 2`` (Outlier
    Suppression+, arXiv 2304.09145; SmoothQuant, arXiv 2211.10438). So one range for the whole tensor loses less, and
    the weights take over a part of the differences between channels.

    Shift and factor are folded into a LayerNorm in front, or into the layer that computes the values of an attention.
    Elsewhere, as behind a GELU, the layer becomes a `ShiftedLinear`, which subtracts and multiplies once per value.
    The mean of the keys is subtracted too: it adds the same to all scores of a query, so the softmax does not change.

    ``sites.json`` names the layers that do not change. Put it after ``rotate`` and before ``calibrate``.

    Args:
        strength: 0 shifts only, 1 gives all channels the same range.
        observer: chooses the range of each channel.
        batch: images per forward pass.
    """

    calibrates: ClassVar[frozenset[str]] = NEITHER
    in_float: ClassVar[bool] = True

    strength: float = field(default=0.5, validator=[validators.ge(0.0), validators.le(1.0)])
    observer: Any = component("observer", default=PercentileMseObserver)
    batch: int = field(default=32, validator=validators.ge(1))

    def check(self, model: QuantizedModel, before: Sequence[Step]) -> None:
        """Refuses ranges that were chosen before, because they do not fit the smoothed tensors."""
        refuse_after_calibration("smooth", model, before)

    @torch.no_grad()
    def run(self, model: QuantizedModel, calibration: Calibration) -> None:
        """Smooths the network; its notes list the layers that do not change.

        Raises:
            NonFiniteError: the input of a layer holds NaN or infinity.
            SpdfqError: a range was chosen before.
            ModelError: the output changed.
        """
        refuse_after_calibration("smooth", model)
        images = calibration.images[:2]
        before = model.network(images)
        _Smoothing(self, model, calibration).run()
        check_same_output("smooth", model.network(images), before)


@frozen(eq=False)
class _Change:
    """How the channels of a layer's input change: ``(x - shift) / factor``, float64 ``[d]`` each."""

    shift: Tensor
    factor: Tensor


@define(eq=False)
class _Smoothing:
    """One run of the step."""

    spec: Smooth
    model: QuantizedModel
    calibration: Calibration
    _linears: dict[str, LinearCalls] = field(init=False)
    _changes: dict[str, _Change] = field(init=False)
    _kept: Kept = field(init=False, factory=lambda: Kept("the input", "smoothed"))

    def run(self) -> None:
        """Smooths the input of every layer once, where that costs least."""
        example = self.calibration.images[:1]
        found = structure(self.model.network, example)
        groups, _ = norm_groups(self.model, example)
        self._linears = wiring(self.model.network, example).linears
        called = _called_layers(self.model.network, example)
        inputs = {input_site(weight): f"the input of {_module(weight)}" for weight in self._linears}
        seen = channel_statistics(self.model, inputs, self.calibration, self.spec.batch, "smooth")
        self._centre_keys([a for a in found.attentions if score_obstacle(found, a) is None], seen)
        self._changes = {weight: change for weight in self._linears if (change := self._change(weight, seen))}
        for group in groups:
            if change := self._changes.get(group.observed_weight):
                rescale(self.model, group, change.factor, change.shift / change.factor)
                self._done(*group.weights)
        for attention in found.attentions:
            if value_obstacle(found, attention) is None:
                self._fold_into_values(attention)
        for weight, change in list(self._changes.items()):
            if weight in called and (bias := self._linears[weight].bias(self.model.network)):
                _undo(self.model, weight, bias, change)
                self.model.shift_input(weight, change.shift, 1 / change.factor)
                self._done(weight)
        for weight in self._changes:
            self._keep(weight, "its bias is computed in the forward pass, or no nn.Linear that runs has its weight")
        self.model.note("smooth", self._kept.lines())

    def _change(self, weight: str, seen: dict[str, Statistics]) -> _Change | None:
        """How the input of a layer should change; ``None``, with a reason, if it should not."""
        site = input_site(weight)
        quantizer, statistics = self.model.quantizers.get(site), seen.get(site)
        if quantizer is None or statistics is None:
            return self._keep(weight, "its input is not quantized")
        if type(quantizer) is not UniformQuantizer or quantizer.channel_axis is not None:
            return self._keep(weight, "its input has no uniform quantizer with one range")
        if self.model.sites[site].shape[:-1].count(1) == len(self.model.sites[site].shape) - 1:
            return self._keep(weight, "it takes one token of an image, too little for a range of each channel")
        return smoothing(statistics, quantizer, self.spec.observer, self.spec.strength)

    def _keep(self, weight: str, why: str) -> None:
        self._kept.add(why, _module(weight))

    def _done(self, *weights: str) -> None:
        for weight in weights:
            self._changes.pop(weight, None)

    def _fold_into_values(self, attention: Attention) -> None:
        """Shifts and scales the rows of the values, if only one layer takes the output and no heads share values."""
        heads = attention.value or []
        if len(attention.takers) != 1 or sorted(attention.outputs) != list(range(len(heads))):
            return
        ((taker, columns),) = attention.takers
        change, bias = self._changes.get(taker.weight), taker.bias
        fixed = any(part.bias is None or part.made_of is not None for part, _ in heads)
        if change is None or not bias or not taker.whole or fixed:
            return
        _undo(self.model, taker.weight, bias, change)
        for (part, rows), place in zip((heads[index] for index in attention.outputs), columns, strict=True):
            index = [part.rows[0] + row for row in rows]
            factor, shift = change.factor[place], change.shift[place]
            weight, value_bias = (self.model.network.get_parameter(str(name)) for name in (part.weight, part.bias))
            chosen = weight.double()[index].flatten(1) / factor[:, None]
            weight[index] = chosen.to(weight).reshape(weight[index].shape)
            value_bias[index] = ((value_bias.double()[index] - shift) / factor).to(value_bias)
        self._done(taker.weight)

    def _centre_keys(self, attentions: list[Attention], seen: dict[str, Statistics]) -> None:
        """Subtracts the mean of each channel of the keys from their biases."""
        changed: set[tuple[str, int]] = set()
        for attention in attentions:
            for part, rows in attention.key or []:
                statistics = seen.get(input_site(part.weight))
                if part.bias and statistics is not None and not changed & places([(part, rows)]):
                    changed |= places([(part, rows)])
                    _centre(self.model, part, rows, statistics)


def _centre(model: QuantizedModel, part: Part, rows: tuple[int, ...], statistics: Statistics) -> None:
    index = [part.rows[0] + row for row in rows]
    mean = model.network.get_parameter(part.weight).double()[index].flatten(1) @ statistics.samples.double().mean(1)
    bias = model.network.get_parameter(str(part.bias))
    bias[index] = (-mean).to(bias)


def smoothing(statistics: Statistics, quantizer: UniformQuantizer, observer: Observer, strength: float) -> _Change:
    """The change after which the channels have similar ranges.

    Args:
        statistics: of the channels.
        quantizer: of the whole tensor.
        observer: chooses the range of each channel.
        strength: exponent of the factors.
    """
    channels = attrs.evolve(quantizer, granularity="channel", axis=-1)
    median = statistics.samples.median(dim=1).values
    fitted = channel_ranges(statistics, median, observer, channels)
    scale, zero_point = fitted["scale"].double(), fitted["zero_point"].double()
    middle = median.double() + ((quantizer.levels - 1) / 2 - zero_point) * scale
    return _Change(middle, (scale / scale.log().mean().exp()) ** strength)


def _undo(model: QuantizedModel, weight_name: str, bias_name: str, change: _Change) -> None:
    """Makes a layer compute the same from its changed input."""
    weight, bias = model.weight(weight_name), model.bias(bias_name)
    bias.copy_(bias.double() + weight.double() @ change.shift)
    weight.copy_(weight.double() * change.factor)


def _module(weight: str) -> str:
    return weight.rpartition(".")[0]


@torch.no_grad()
def _called_layers(network: nn.Module, example: Tensor) -> set[str]:
    """Weights that belong to one plain `nn.Linear` only, whose ``forward`` runs."""
    running: set[str] = set()
    owners: dict[int, int] = {}
    for module in network.modules():
        for parameter in module.parameters(recurse=False):
            owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    plain = {
        f"{name}.weight": module
        for name, module in network.named_modules()
        if type(module) is nn.Linear and owners[id(module.weight)] == 1 and name
    }
    hooks: list[Hook] = [
        (module.register_forward_pre_hook, partial(lambda weight, *_: running.add(weight), weight))
        for weight, module in plain.items()
    ]
    with own_hooks(hooks):
        network(example)
    return running
