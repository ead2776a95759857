"""LayerNorms whose output can be rescaled, because only linear layers take it and these can undo the scaling."""

from attrs import frozen
from torch import Tensor

from spdfq.backends.wiring import NormCalls, Wiring, wiring
from spdfq.quantized.model import QuantizedModel
from spdfq.quantized.sites import input_site
from spdfq.quantizers import UniformQuantizer


@frozen(eq=False)
class NormGroup:
    """A LayerNorm and the linear layers that take its output.

    Args:
        norm: names of the LayerNorm's weight and bias.
        weights: names of the layers' weights.
        biases: names of the layers' biases, in the same order; a missing one is added when it is changed.
        inputs: the quantized input sites of the layers.
        observed: the input site of a layer that takes every token.
    """

    norm: tuple[str, str]
    weights: tuple[str, ...]
    biases: tuple[str, ...]
    inputs: tuple[str, ...]
    observed: str

    @property
    def name(self) -> str:
        """Name of the LayerNorm."""
        return _module(self.norm[0])

    @property
    def observed_weight(self) -> str:
        """The weight of the layer whose input is ``observed``."""
        return next(weight for weight in self.weights if input_site(weight) == self.observed)


def norm_groups(model: QuantizedModel, example: Tensor) -> tuple[list[NormGroup], list[str]]:
    """The LayerNorms whose output can be rescaled, and for each other LayerNorm a line that says why not.

    Args:
        model: a placed model, whose modules have not changed since.
        example: one image ``[1, C, H, W]``.
    """
    wired = wiring(model.network, example)
    groups, skipped = [], []
    for norm in wired.norms.values():
        try:
            groups.append(_group(model, wired, norm))
        except _CannotRescale as reason:
            skipped.append(f"{norm.name} does not change: {reason}")
    return groups, skipped


class _CannotRescale(Exception):
    """The reason why a LayerNorm cannot be rescaled."""


def _group(model: QuantizedModel, wired: Wiring, norm: NormCalls) -> NormGroup:
    if norm.others:
        raise _CannotRescale(f"its output also goes to {', '.join(norm.others)}")
    if norm.bias is None:
        raise _CannotRescale("it has no bias of its own")
    linears = [wired.linears[weight] for weight in norm.layers]
    if mixed := [calls.weight for calls in linears if calls.sources != {norm.weight}]:
        raise _CannotRescale(f"{_module(mixed[0])} also takes other inputs")
    biases = {calls.weight: calls.bias(model.network) for calls in linears}
    if fixed := [weight for weight, bias in biases.items() if bias is None]:
        raise _CannotRescale(f"the bias of {_module(fixed[0])} is computed in the forward pass and cannot be changed")
    if not (whole := [input_site(calls.weight) for calls in linears if calls.whole]) or norm.tokens == 1:
        raise _CannotRescale("its layers take one token of an image, too little for a range of each channel")
    inputs = [site for calls in linears if (site := input_site(calls.weight)) in model.quantizers]
    if not inputs:
        raise _CannotRescale("the inputs of its layers are not quantized")
    _check_quantizers(model, inputs)
    return NormGroup((norm.weight, norm.bias), tuple(biases), tuple(map(str, biases.values())), tuple(inputs), whole[0])


def _check_quantizers(model: QuantizedModel, inputs: list[str]) -> None:
    kinds = [uniform(model, site) for site in inputs]
    if len({(quantizer.bits, quantizer.channel_axis) for quantizer in kinds}) > 1:
        raise _CannotRescale(f"{', '.join(inputs)} differ in bits or granularity")


def uniform(model: QuantizedModel, site: str) -> UniformQuantizer:
    """The quantizer of an input site of a `NormGroup`, which is always a uniform one."""
    quantizer = model.quantizers[site]
    if type(quantizer) is not UniformQuantizer:
        raise _CannotRescale("its output has no uniform quantizer")
    return quantizer


def _module(weight: str) -> str:
    return weight.rpartition(".")[0]


def rescale(model: QuantizedModel, group: NormGroup, factor: Tensor, offset: Tensor) -> None:
    """Makes a LayerNorm output ``x / factor - offset`` instead of x, and makes its layers undo that.

    Args:
        model: changed in place; in float its output stays the same.
        group: the LayerNorm and its layers.
        factor: ``[C]``, above 0.
        offset: ``[C]``.
    """
    factor, offset = factor.double(), offset.double()
    gain, shift = (model.network.get_parameter(name) for name in group.norm)
    gain.copy_(gain.double() / factor)
    shift.copy_(shift.double() / factor - offset)
    for weight_name, bias_name in zip(group.weights, group.biases, strict=True):
        weight, bias = model.weight(weight_name), model.bias(bias_name)
        scaled = weight.double() * factor
        weight.copy_(scaled)
        bias.copy_(bias.double() + scaled @ offset)
