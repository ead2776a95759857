"""Which LayerNorm feeds which linear layers, and which biases those have, found by one forward pass.

During the pass each LayerNorm outputs a signature: random numbers of its own, the same for every token. A tensor that
consists of a signature only is the output of that LayerNorm, at most moved (shifted windows). A padded, added or pooled
tensor is not.
"""

from collections import Counter
from typing import Any

import torch
import torch.nn.functional as F
from attrs import define, field, frozen
from torch import Tensor, nn

from spdfq.attention import PRODUCT_FUNCTIONS, FunctionMode, fused_attention
from spdfq.runtime.runtime import normal

_LAYER_NORMS = {F.layer_norm, torch.layer_norm}
# They mix tokens, but leave equal tokens as they are, so that a signature would survive them.
_MIX_TOKENS = {F.scaled_dot_product_attention, *PRODUCT_FUNCTIONS}
_SEED = 0


@define(eq=False)
class LinearCalls:
    """How one linear layer is called.

    Args:
        weight: name of its weight.
        biases: names of the biases it was called with: ``None`` for no bias, an empty string for one that is computed
            in the forward pass (BEiT) or that another layer has too.
        sources: weights of the LayerNorms that its inputs are outputs of; ``None`` for any other input.
        whole: whether an input was a complete LayerNorm output, with all tokens.
    """

    weight: str
    biases: set[str | None] = field(factory=set)
    sources: set[str | None] = field(factory=set)
    whole: bool = False

    def bias(self, network: nn.Module) -> str | None:
        """Name of the bias that can be changed, or added if there is none; ``None`` if neither is possible."""
        if len(self.biases) != 1:
            return None
        (name,) = self.biases
        if name is None and accepts_a_bias(network, self.weight):
            return self.weight.removesuffix("weight") + "bias"
        return name or None


def accepts_a_bias(network: nn.Module, weight: str) -> bool:
    """Whether the weight belongs to one plain `nn.Linear` without a bias, which adds its ``bias`` once it has one."""
    owner, _, leaf = weight.rpartition(".")
    module, parameter = network.get_submodule(owner), network.get_parameter(weight)
    owners = [part for part in network.modules() if any(own is parameter for own in part.parameters(recurse=False))]
    plain = leaf == "weight" and type(module).forward is nn.Linear.forward and module.bias is None
    return plain and owners == [module]


@define(eq=False)
class NormCalls:
    """How one LayerNorm is called, and where its output goes.

    Args:
        weight: name of its weight.
        bias: name of its bias; ``None`` if it has none.
        tokens: number of tokens of one image that it normalises.
        layers: weights of the linear layers that take its output, in the order of the forward pass.
        others: names of other functions that take its output.
    """

    weight: str
    bias: str | None
    tokens: int
    layers: list[str] = field(factory=list)
    others: list[str] = field(factory=list)

    @property
    def name(self) -> str:
        """Name of the module that owns the weight."""
        return self.weight.rpartition(".")[0]


@frozen(eq=False)
class Wiring:
    """The LayerNorms and linear layers of a network by the names of their weights, in the order of a forward pass."""

    norms: dict[str, NormCalls]
    linears: dict[str, LinearCalls]


@torch.no_grad()
def wiring(network: nn.Module, example: Tensor) -> Wiring:
    """How the LayerNorms and linear layers of a network are connected.

    Args:
        network: in evaluation mode.
        example: one image ``[1, C, H, W]``.
    """
    mode = _WiringMode(network)
    with fused_attention(network), mode:
        network(example)
    times = Counter(bias for calls in mode.linears.values() for bias in calls.biases)
    for calls in mode.linears.values():
        if any(bias and times[bias] > 1 for bias in calls.biases):
            calls.biases.add("")
    return Wiring(mode.norms, mode.linears)


@frozen(eq=False)
class _NormOutput:
    """A tensor that is the output of a LayerNorm, at most moved, during the pass with signatures.

    Args:
        tensor: the tensor; keeping it alive prevents that its id is used again.
        norm: the LayerNorm.
        signature: the values that every token has, ``[C]``.
        size: number of values of the complete output.
    """

    tensor: Tensor
    norm: NormCalls
    signature: Tensor
    size: int


class _WiringMode(FunctionMode):
    """Replaces the outputs of LayerNorms by signatures and records which functions take them."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.names = {id(parameter): name for name, parameter in network.named_parameters()}
        self.norms: dict[str, NormCalls] = {}
        self.linears: dict[str, LinearCalls] = {}
        self.outputs: dict[int, _NormOutput] = {}
        self.generator = torch.Generator().manual_seed(_SEED)

    def call(self, func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        """Any function."""
        result = func(*args, **kwargs)
        if func is F.linear:
            self._record_linear(*args, **kwargs)
        else:
            taken = [self.outputs[id(tensor)] for tensor in tensors((args, kwargs)) if id(tensor) in self.outputs]
            self._record_other(func, taken, tensors(result))
        return self._with_signature(result, *args, **kwargs) if func in _LAYER_NORMS else result

    def _with_signature(
        self,
        result: Tensor,
        input: Tensor,
        shape: Any,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        *_: Any,
        **__: Any,
    ) -> Tensor:
        """The output of a LayerNorm with a known weight ``[C]``: its signature in place of ``result``."""
        name = self.names.get(id(weight))
        if name is None or weight is None or weight.ndim != 1:
            return result
        tokens = result.numel() // len(weight)
        norm = self.norms.setdefault(name, NormCalls(name, self.names.get(id(bias)), tokens))
        signature = normal(self.generator, len(weight)).to(result)
        output = signature.expand_as(result).clone()
        self.outputs[id(output)] = _NormOutput(output, norm, signature, output.numel())
        return output

    def _record_linear(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> None:
        name, source = self.names.get(id(weight)), self.outputs.get(id(input))
        if source and not _has_signature_last(input, source.signature):
            _append_new(source.norm.others, "linear over tokens")
            source = None
        if name is None:
            if source:
                _append_new(source.norm.others, "linear")
            return
        calls = self.linears.setdefault(name, LinearCalls(name))
        calls.biases.add(None if bias is None else self.names.get(id(bias), ""))
        calls.sources.add(source.norm.weight if source else None)
        if source:
            calls.whole |= source.size == input.numel()
            _append_new(source.norm.layers, name)

    def _record_other(self, func: Any, taken: list[_NormOutput], results: list[Tensor]) -> None:
        """A function that only moves a LayerNorm output gives a LayerNorm output; any other one is noted."""
        for source in taken:
            for tensor in results:
                if func not in _MIX_TOKENS and _has_signature(tensor, source.signature):
                    self.outputs[id(tensor)] = _NormOutput(tensor, source.norm, source.signature, source.size)
                else:
                    _append_new(source.norm.others, getattr(func, "__name__", str(func)).strip("_"))


def _append_new(names: list[str], name: str) -> None:
    if name not in names:
        names.append(name)


def _has_signature(tensor: Tensor, signature: Tensor) -> bool:
    """Whether a tensor consists of the signature only, along some axis."""
    axes = [axis for axis, length in enumerate(tensor.shape) if length == len(signature)]
    return any(bool((tensor.movedim(axis, -1) == signature).all()) for axis in axes)


def _has_signature_last(tensor: Tensor, signature: Tensor) -> bool:
    """Whether a tensor consists of the signature only, along its last axis, which a linear layer multiplies."""
    return tensor.shape[-1] == len(signature) and bool((tensor == signature).all())


def tensors(value: Any) -> list[Tensor]:
    """All tensors in nested arguments or results."""
    if isinstance(value, Tensor):
        return [value]
    items = value.values() if isinstance(value, dict) else value if isinstance(value, (tuple, list)) else ()
    return [tensor for item in items for tensor in tensors(item)]
