"""Smoothing: the channels of a layer's input are shifted and scaled to similar ranges, and the layer undoes it."""

from collections import Counter
from collections.abc import Sequence
from functools import partial
from math import prod
from typing import Any, ClassVar

import attrs
import torch
from attrs import define, field, frozen, validators
from torch import Tensor, nn

from spdfq.backends.base import NEITHER, Calibration, Step
from spdfq.backends.transforms.channels import channel_statistics
from spdfq.backends.transforms.float_changes import Kept, check_same_output, refuse_after_calibration
from spdfq.backends.transforms.norms import norm_groups, rescale
from spdfq.backends.transforms.rotatable import score_obstacle, value_obstacle
from spdfq.backends.transforms.streams import Attention, Part, Rows, Structure
from spdfq.backends.transforms.tracing import structure
from spdfq.backends.wiring import wiring
from spdfq.quantized.model import QuantizedModel
from spdfq.quantized.sites import KEY, PRODUCT, WEIGHT, input_site
from spdfq.quantizers import Observer, PercentileMseObserver, UniformQuantizer
from spdfq.quantizers.statistics import Statistics
from spdfq.recipe.structure import component
from spdfq.registry import steps
from spdfq.runtime.shared_modules import Hook, own_hooks

_LARGEST_RATIO = 1e3  # of a channel's range to the mean: a channel that hardly varies here may vary on other images


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
    The mean of the keys is subtracted too: it adds the same to all scores of a query, so the softmax does not change
    (SageAttention, arXiv 2410.02367).

    Only inputs with a uniform quantizer and one range change. ``sites.json`` names the layers and keys that do not
    change, with the reason. Put it after ``rotate`` and before ``calibrate``. The steps that follow compare with the
    smoothed float network.

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
        """Smooths the network; its notes list the layers and keys that do not change.

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
class Change:
    """How the channels of a layer's input change: ``(x - shift) / factor``, float64 ``[d]`` each."""

    shift: Tensor
    factor: Tensor


def smoothing(statistics: Statistics, quantizer: UniformQuantizer, observer: Observer, strength: float) -> Change:
    """The change after which the channels have similar ranges, with the middle at zero.

    Args:
        statistics: of the channels.
        quantizer: of the whole tensor.
        observer: chooses the range of each channel.
        strength: exponent of the factors.
    """
    median = statistics.samples.median(dim=1).values
    channels = attrs.evolve(quantizer, granularity="channel", axis=-1, symmetric=False)
    low, high = (end.double() for end in observer.range_of(statistics.shifted(median), channels))
    low, high = low.clamp(max=0), high.clamp(min=0)
    width = high - low
    width = torch.where(width > 0, width, statistics.high.double() - statistics.low.double())
    alive = width > 0
    mean = width[alive].log().mean().exp()  # geometric
    ratio = torch.where(alive, (width / mean).clamp(1 / _LARGEST_RATIO, _LARGEST_RATIO), 1.0)
    return Change(median.double() + (low + high) / 2, ratio**strength)


@define(eq=False)
class _Smoothing:
    """One run of the step.

    Args:
        spec: the step.
        model: changed in place.
        calibration: its images are observed.
    """

    spec: Smooth
    model: QuantizedModel
    calibration: Calibration
    _biases: dict[str, str | None] = field(init=False)
    _changes: dict[str, Change] = field(init=False)
    _kept: Kept = field(init=False, factory=lambda: Kept("the input", "smoothed"))
    _kept_keys: Kept = field(init=False, factory=lambda: Kept("the keys", "centred"))

    def run(self) -> None:
        """Smooths the input of every layer once, where that costs least."""
        network, example = self.model.network, self.calibration.images[:1]
        found = structure(network, example)
        groups, _ = norm_groups(self.model, example)
        # before anything changes: a layer that gets a bias would look like one with a bias of its own
        self._biases = {weight: calls.bias(network) for weight, calls in wiring(network, example).linears.items()}
        plain = _plain_layers(self.model, example)
        keys = self._keys(found)
        quantizers = self._input_quantizers()
        sites = {
            site: f"the input of {_module(site)}" for site in (*map(input_site, quantizers), *map(_input_of, keys))
        }
        seen = channel_statistics(self.model, sites, self.calibration, self.spec.batch, "smooth")
        for (part, rows), site in zip(keys, map(_input_of, keys), strict=True):
            self._centre(part, rows, seen[site].samples.double().mean(1))
        self._changes = {
            weight: smoothing(seen[input_site(weight)], quantizer, self.spec.observer, self.spec.strength)
            for weight, quantizer in quantizers.items()
        }
        for group in groups:
            if change := self._changes.get(group.observed_weight):
                rescale(self.model, group, change.factor, change.shift / change.factor)
                for weight in group.weights:
                    self._changes.pop(weight, None)
        for attention in found.attentions:
            if value_obstacle(found, attention) is None:
                self._fold_into_values(found, attention)
        for weight, change in self._changes.items():
            if weight not in plain:
                self._kept.add("not every product with its weight is a call of one plain nn.Linear", _module(weight))
            elif (bias := self._biases[weight]) is None:
                self._kept.add("its bias is computed in the forward pass, or another layer's too", _module(weight))
            else:
                _undo(self.model, weight, bias, change)
                layer = self.model.shift_input(weight)
                layer.input_shift.copy_(change.shift)
                layer.input_factor.copy_(1 / change.factor)
        self.model.note("smooth", [*self._kept_keys.lines(), *self._kept.lines()])

    def _input_quantizers(self) -> dict[str, UniformQuantizer]:
        """The quantizer of the input of each layer that can be smoothed, by weight."""
        found: dict[str, UniformQuantizer] = {}
        for weight in [name for name, site in self.model.sites.items() if site.kind == WEIGHT and len(site.shape) == 2]:
            site = input_site(weight)
            quantizer = self.model.quantizers.get(site)
            if weight not in self._biases:
                self._kept.add("only some rows of its weight are multiplied at once", _module(weight))
            elif quantizer is None:
                self._kept.add("it has no quantizer of its own", _module(weight))
            elif type(quantizer) is not UniformQuantizer or quantizer.channel_axis is not None:
                self._kept.add("it has no uniform quantizer with one range", _module(weight))
            elif prod(self.model.sites[site].shape[:-1]) == 1:
                self._kept.add("it is one token of an image, too little for a range of each channel", _module(weight))
            else:
                found[weight] = quantizer
        return found

    def _bias_of(self, part: Part) -> str | None:
        """Name of a bias that can be changed, or added if there is none; ``None`` if neither is possible."""
        return part.bias or (self._biases.get(part.weight) if part.bias is None and part.whole else None)

    def _keys(self, found: Structure) -> list[Rows]:
        """The keys that can be centred, each once."""
        keys: list[Rows] = []
        if not any(self.model.sites[name].kind in (KEY, PRODUCT) for name in self.model.quantizers):
            return keys
        for attention in found.attentions:
            obstacle = score_obstacle(found, attention)
            heads = attention.key or []
            if obstacle is None and any(self._bias_of(part) is None for part, _ in heads):
                obstacle = "their bias is computed in the forward pass and cannot be changed"
            if obstacle is None and any(self.model.weight(part.weight).ndim != 2 for part, _ in heads):
                obstacle = "a convolution computes them"
            if obstacle:
                self._kept_keys.add(obstacle, attention.name)
            else:
                keys += heads
        self._kept_keys.add("not computed by scaled_dot_product_attention", *found.own_products)
        return keys

    def _centre(self, part: Part, rows: tuple[int, ...], inputs: Tensor) -> None:
        """Makes the mean of keys zero, given that of the layer's inputs, float64 ``[d]``."""
        index = [part.rows[0] + row for row in rows]
        bias = self.model.bias(str(self._bias_of(part)))
        mean = self.model.weight(part.weight).double()[index].flatten(1) @ inputs
        bias[index] = (-mean).to(bias)

    def _fold_into_values(self, found: Structure, attention: Attention) -> None:
        """Shifts and scales the rows of the values, if only one layer takes the output and no heads share values."""
        heads = attention.value or []
        if len(attention.takers) != 1 or sorted(attention.outputs) != list(range(len(heads))):
            return
        ((taker, columns),) = attention.takers
        change, bias = self._changes.get(taker.weight), self._bias_of(taker)
        fixed = any(self._bias_of(part) is None or part.made_of is not None for part, _ in heads)
        outputs = {(id(attention), index) for index in range(sum(map(len, columns)))}
        # a number between the two would have to divide the shift
        scaled = (outputs | {(id(part), row) for part, rows in heads for row in rows}) & found.scaled
        if change is None or bias is None or not taker.whole or fixed or scaled:
            return
        _undo(self.model, taker.weight, bias, change)
        for (part, rows), place in zip((heads[index] for index in attention.outputs), columns, strict=True):
            index = [part.rows[0] + row for row in rows]
            factor, shift = change.factor[place], change.shift[place]
            weight, value_bias = self.model.weight(part.weight), self.model.bias(str(self._bias_of(part)))
            chosen = weight.double()[index].flatten(1) / factor[:, None]
            weight[index] = chosen.to(weight).reshape(weight[index].shape)
            value_bias[index] = ((value_bias.double()[index] - shift) / factor).to(value_bias)
        del self._changes[taker.weight]


def _input_of(head: Rows) -> str:
    """The site of the input of a head's layer."""
    part = head[0]
    return input_site(part.weight) + ("" if part.whole else f"_rows{part.rows[0]}")


def _undo(model: QuantizedModel, weight_name: str, bias_name: str, change: Change) -> None:
    """Makes a layer compute the same from its changed input."""
    weight, bias = model.weight(weight_name), model.bias(bias_name)
    bias.copy_(bias.double() + weight.double() @ change.shift)
    weight.copy_(weight.double() * change.factor)


def _module(name: str) -> str:
    return name.rpartition(".")[0]


@torch.no_grad()
def _plain_layers(model: QuantizedModel, example: Tensor) -> set[str]:
    """Weights of which every product is a call of the one plain `nn.Linear` that has it."""
    owners = Counter(
        id(parameter)
        for _, module in model.network.named_modules(remove_duplicate=False)
        for parameter in module.parameters(recurse=False)
    )
    plain = {
        f"{name}.weight": module
        for name, module in model.network.named_modules()
        if name and type(module) is nn.Linear and owners[id(module.weight)] == 1 and "forward" not in vars(module)
    }
    calls, products = Counter[str](), Counter[str]()

    def visit(name: str, kind: str, tensor: Tensor) -> Tensor:
        products[name] += kind == WEIGHT
        return tensor

    hooks: list[Hook] = [
        (module.register_forward_pre_hook, partial(lambda weight, *_: calls.update([weight]), weight))
        for weight, module in plain.items()
    ]
    with own_hooks(hooks), model.visiting(visit):
        model.network(example)
    return {weight for weight in plain if calls[weight] == products[weight] > 0}
