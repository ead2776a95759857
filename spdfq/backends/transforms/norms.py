"""LayerNorms whose output can be rescaled, because all it feeds are linear layers that can undo it."""

from attrs import frozen
from torch import Tensor

from spdfq.backends.transforms.wiring import NormCalls, Wiring, wiring
from spdfq.quantized.model import QuantizedModel
from spdfq.quantized.products import input_site
from spdfq.quantizers import UniformQuantizer


@frozen(eq=False)
class NormGroup:
    """A LayerNorm and the linear layers that take all it puts out.

    Args:
        norm: names of the LayerNorm's weight and bias.
        weights: names of the layers' weights.
        biases: names of the layers' biases, in the same order; one that is not there yet is added when it is changed.
        inputs: sites of the layers' inputs that are quantized.
        observed: site of an input that sees every token.
    """

    norm: tuple[str, str]
    weights: tuple[str, ...]
    biases: tuple[str, ...]
    inputs: tuple[str, ...]
    observed: str

    @property
    def name(self) -> str:
        """Name of the LayerNorm."""
        return _owner(self.norm[0])


def norm_groups(model: QuantizedModel, example: Tensor) -> tuple[list[NormGroup], list[str]]:
    """The LayerNorms whose output can be rescaled, and for each other one a line that says why it cannot.

    Args:
        model: its network must not have been changed in shape since it was placed.
        example: one image ``[1, C, H, W]``.
    """
    wired = wiring(model.network, example)
    groups, skipped = [], []
    for norm in wired.norms.values():
        try:
            groups.append(_group(model, wired, norm))
        except _Unfit as reason:
            skipped.append(f"{norm.name} is left as it is: {reason}")
    return groups, skipped


class _Unfit(Exception):
    """Why a LayerNorm cannot be rescaled."""


def _group(model: QuantizedModel, wired: Wiring, norm: NormCalls) -> NormGroup:
    if norm.others:
        raise _Unfit(f"its output also goes to {', '.join(norm.others)}")
    if norm.bias is None:
        raise _Unfit("it has no bias of its own")
    linears = [wired.linears[weight] for weight in norm.layers]
    if mixed := [calls.weight for calls in linears if calls.sources != {norm.weight}]:
        raise _Unfit(f"{_owner(mixed[0])} takes other inputs as well")
    biases = {calls.weight: calls.bias(model.network) for calls in linears}
    if fixed := [weight for weight, bias in biases.items() if bias is None]:
        raise _Unfit(f"the bias of {_owner(fixed[0])} is made on the way and cannot be changed")
    if not (whole := [input_site(calls.weight) for calls in linears if calls.whole]) or norm.tokens == 1:
        raise _Unfit("what it feeds sees one token of an image, too little for a range of each channel")
    inputs = [site for calls in linears if (site := input_site(calls.weight)) in model.quantizers]
    if not inputs:
        raise _Unfit("what it feeds is not quantized")
    _check_quantizers(model, inputs)
    return NormGroup((norm.weight, norm.bias), tuple(biases), tuple(map(str, biases.values())), tuple(inputs), whole[0])


def _check_quantizers(model: QuantizedModel, inputs: list[str]) -> None:
    kinds = [uniform(model, site) for site in inputs]
    if len({(quantizer.bits, quantizer.channel_axis) for quantizer in kinds}) > 1:
        raise _Unfit(f"{', '.join(inputs)} differ in bits or granularity")


def uniform(model: QuantizedModel, site: str) -> UniformQuantizer:
    """The quantizer of a site, where it is a uniform one."""
    quantizer = model.quantizers[site]
    if type(quantizer) is not UniformQuantizer:
        raise _Unfit("its output has no uniform quantizer")
    return quantizer


def _owner(weight: str) -> str:
    return weight.rpartition(".")[0]


def rescale(model: QuantizedModel, group: NormGroup, factor: Tensor, offset: Tensor) -> None:
    """Have a LayerNorm put out ``x / factor - offset`` instead of x, and its layers undo it.

    Args:
        model: is changed in place; in float it computes what it did.
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
