"""Which LayerNorm feeds which linear layers, and where their biases are, seen in one forward pass."""

from typing import Any

import torch
import torch.nn.functional as F
from attrs import define, field, frozen
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from spdfq.attention import PRODUCT_FUNCTIONS, fused_attention

_LAYER_NORMS = {F.layer_norm, torch.layer_norm}
# equal tokens stay what they are under any of these, others do not
_MIX_TOKENS = {F.scaled_dot_product_attention, *PRODUCT_FUNCTIONS}
_SEED = 0


@define(eq=False)
class LinearCalls:
    """What is known of the calls of one linear layer.

    Args:
        weight: name of its weight.
        biases: names of the biases it was called with; ``None`` for no bias, an empty string for one that is made on
            the way (BEiT).
        sources: weights of the LayerNorms its inputs came from; ``None`` for an input from elsewhere.
        whole: whether an input was all that a LayerNorm put out.
    """

    weight: str
    biases: set[str | None] = field(factory=set)
    sources: set[str | None] = field(factory=set)
    whole: bool = False

    def bias(self, network: nn.Module) -> str | None:
        """Name of the bias that can be changed, or that can be added where there is none; ``None`` if neither."""
        if len(self.biases) != 1:
            return None
        (name,) = self.biases
        if name is None and _takes_a_bias(network, self.weight):
            return self.weight.removesuffix("weight") + "bias"
        return name or None


def _takes_a_bias(network: nn.Module, weight: str) -> bool:
    """Whether the owner of the weight is the linear layer of PyTorch itself, so that its ``bias`` is what is added."""
    owner, _, leaf = weight.rpartition(".")
    module = network.get_submodule(owner)
    return leaf == "weight" and type(module).forward is nn.Linear.forward and module.bias is None


@define(eq=False)
class NormCalls:
    """What is known of one LayerNorm.

    Args:
        weight: name of its weight.
        bias: name of its bias; ``None`` where there is none.
        tokens: how many tokens of one image it normalises.
        layers: weights of the linear layers it feeds, in the order of the forward pass.
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
    """The LayerNorms and linear layers of a network by name, in the order of a forward pass."""

    norms: dict[str, NormCalls]
    linears: dict[str, LinearCalls]


@torch.no_grad()
def wiring(network: nn.Module, example: Tensor) -> Wiring:
    """How the LayerNorms and linear layers of a network are connected.

    Every LayerNorm puts out a signature of its own meanwhile, the same for all tokens. Whatever carries it in full is
    its output, moved about at most (shifted windows); a pad, a sum or a pooled token is not.

    Args:
        network: in evaluation mode.
        example: one image ``[1, C, H, W]``.
    """
    watch = _Watch(network)
    with fused_attention(network), watch:
        network(example)
    return Wiring(watch.norms, watch.linears)


@frozen(eq=False)
class _Carrier:
    """A tensor that is a LayerNorm's output, moved about at most; holding it keeps its id from being used again."""

    tensor: Tensor
    norm: NormCalls
    signature: Tensor
    size: int


class _Watch(TorchFunctionMode):
    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.names = {id(parameter): name for name, parameter in network.named_parameters()}
        self.norms: dict[str, NormCalls] = {}
        self.linears: dict[str, LinearCalls] = {}
        self.carriers: dict[int, _Carrier] = {}
        self.generator = torch.Generator().manual_seed(_SEED)

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        given = [self.carriers[id(tensor)] for tensor in _tensors((args, kwargs)) if id(tensor) in self.carriers]
        if func is F.linear:
            self._linear(*args, **kwargs)
        else:
            self._follow(func, given, _tensors(result))
        return self._signed(result, *args, **kwargs) if func in _LAYER_NORMS else result

    def _signed(
        self,
        result: Tensor,
        input: Tensor,
        shape: Any,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        *_: Any,
        **__: Any,
    ) -> Tensor:
        name = self.names.get(id(weight))
        if name is None or weight is None or weight.ndim != 1:
            return result
        tokens = result.numel() // len(weight)
        norm = self.norms.setdefault(name, NormCalls(name, self.names.get(id(bias)), tokens))
        signature = torch.randn(len(weight), generator=self.generator).to(result)
        signed = signature.expand_as(result).clone()
        self.carriers[id(signed)] = _Carrier(signed, norm, signature, signed.numel())
        return signed

    def _linear(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> None:
        name, carrier = self.names.get(id(weight)), self.carriers.get(id(input))
        if carrier and not _carries_last(input, carrier.signature):
            _add(carrier.norm.others, "linear over tokens")
            carrier = None
        if name is None:
            if carrier:
                _add(carrier.norm.others, "linear")
            return
        calls = self.linears.setdefault(name, LinearCalls(name))
        calls.biases.add(None if bias is None else self.names.get(id(bias), ""))
        calls.sources.add(carrier.norm.weight if carrier else None)
        if carrier:
            calls.whole |= carrier.size == input.numel()
            _add(carrier.norm.layers, name)

    def _follow(self, func: Any, given: list[_Carrier], results: list[Tensor]) -> None:
        for carrier in given:
            for tensor in results:
                if func not in _MIX_TOKENS and _carries(tensor, carrier.signature):
                    self.carriers[id(tensor)] = _Carrier(tensor, carrier.norm, carrier.signature, carrier.size)
                else:
                    _add(carrier.norm.others, getattr(func, "__name__", str(func)).strip("_"))


def _add(names: list[str], name: str) -> None:
    if name not in names:
        names.append(name)


def _carries(tensor: Tensor, signature: Tensor) -> bool:
    """Whether a tensor consists of the signature and nothing else, along whichever axis."""
    axes = [axis for axis, length in enumerate(tensor.shape) if length == len(signature)]
    return any(bool((tensor.movedim(axis, -1) == signature).all()) for axis in axes)


def _carries_last(tensor: Tensor, signature: Tensor) -> bool:
    """Whether it consists of the signature along its last axis, which is the one that a linear layer multiplies."""
    return tensor.shape[-1] == len(signature) and bool((tensor == signature).all())


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    items = value.values() if isinstance(value, dict) else value if isinstance(value, (tuple, list)) else ()
    return [tensor for item in items for tensor in _tensors(item)]
