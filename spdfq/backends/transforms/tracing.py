"""Finds the residual streams and attention heads of a network by a forward pass with signatures.

Each layer, norm and embedding outputs its signature instead of its values: numbers of its own, the same for every
token and image. A tensor that consists of a signature only is that output, at most moved or averaged over tokens.
Everything else that touches a stream is a reason not to rotate it.
"""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from attrs import evolve
from torch import Tensor, nn

from spdfq.attention import PRODUCT_FUNCTIONS, FunctionMode, fused_attention
from spdfq.backends.transforms.known_tensors import Known, KnownTensors
from spdfq.backends.transforms.signatures import spread
from spdfq.backends.transforms.streams import Attention, Norm, Part, Rows, Structure
from spdfq.backends.wiring import tensors
from spdfq.quantized.functions import NORMS, PRODUCTS_WITH_WEIGHT
from spdfq.runtime.shared_modules import Hook, own_hooks

_LAYER_NORMS = {F.layer_norm, torch.layer_norm}
_CONVOLUTIONS = {F.conv1d, F.conv2d, F.conv3d}
_NORMALISE = {"batch_norm", "group_norm", "instance_norm"}
_AGAIN = "the output of a norm is normalised again"


@torch.no_grad()
def structure(network: nn.Module, example: Tensor) -> Structure:
    """The streams and attention heads of a network.

    Args:
        network: in evaluation mode.
        example: one image ``[1, C, H, W]``.
    """
    weights = _Weights()
    with fused_attention(network), weights:
        network(example)
    tracing = _Tracing(network, set(weights.seen))
    with fused_attention(network), own_hooks(tracing.hooks(network)), tracing:
        returned = network(example)
    for tensor in tensors(returned if isinstance(returned, (Tensor, dict, tuple, list)) else vars(returned)):
        if found := tracing.known(tensor):
            found.stream.refuse("it is what the network returns")
    _refuse_shared_biases(tracing.found)
    return tracing.found


def _refuse_shared_biases(found: Structure) -> None:
    """Treats a bias that layers with different weights have like one that is computed."""
    weights: dict[str | None, set[str]] = {}
    for part in found.parts.values():
        weights.setdefault(part.bias, set()).add(part.weight)
    for part in found.parts.values():
        if part.bias and len(weights[part.bias]) > 1:
            part.bias = ""


class _Weights(FunctionMode):
    """Records which tensors are weights and biases of layers and norms."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[int, Tensor] = {}

    def call(self, func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        if func in PRODUCTS_WITH_WEIGHT or func in NORMS or getattr(func, "__name__", "") in _NORMALISE:
            for tensor in tensors((args[1:], kwargs)):
                whole = tensor if tensor._base is None else tensor._base
                self.seen[id(whole)] = whole
        return func(*args, **kwargs)


class _Tracing(KnownTensors):
    """Replaces outputs by signatures and records what takes them."""

    def __init__(self, network: nn.Module, weights: set[int]) -> None:
        super().__init__(network, weights)
        self.norm_signatures: dict[str, Tensor] = {}
        self.part_signatures: dict[int, Tensor] = {}
        self.calls: list[tuple[str, nn.Module, tuple]] = []

    # modules

    def hooks(self, network: nn.Module) -> list[Hook]:
        """Hooks that tell which module runs."""
        found: list[Hook] = []
        for name, module in network.named_modules():
            found.append((module.register_forward_pre_hook, partial(self._enter, name)))
            found.append((partial(module.register_forward_hook, always_call=True), self._leave))
        return found

    def _enter(self, name: str, module: nn.Module, args: tuple) -> None:
        self.calls.append((name, module, args))

    def _leave(self, module: nn.Module, _: tuple, output: Any) -> None:
        name = self.calls.pop()[0]
        for stream in self.found.streams:
            norm = stream.norms.get(name)
            if norm and stream is stream.root:
                known = self.known(output) if isinstance(output, Tensor) else None
                if known is None or known.norm is not norm:
                    stream.refuse(f"{type(module).__name__} does more than normalise")

    def other(self, func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        """Any function but scaled dot-product attention."""
        if func in PRODUCT_FUNCTIONS and any(id(operand) in self.moved for operand in tensors((args, kwargs))):
            self.found.own_products[self._attending()] = None
        if func not in PRODUCTS_WITH_WEIGHT and func not in NORMS:
            return super().other(func, args, kwargs)
        named = {
            key: value for key, value in kwargs.items() if key == "input" or (key == "weight" and func not in NORMS)
        }
        args, kwargs = (*args, *named.values()), {key: kwargs[key] for key in kwargs if key not in named}
        args = (self.with_stand_ins(args[0]), *args[1:])
        if func is F.linear:
            return self._linear(*args, **kwargs)
        return self._norm(func, args, kwargs) if func in NORMS else self._convolution(func, args, kwargs)

    # layers and norms

    def _part(self, weight: Tensor, bias: Tensor | None, groups: int = 1) -> Part | None:
        """The layer of a weight, or of some of its rows; ``None`` if the weight is computed."""
        whole, start = self._rows(weight)
        if whole is None:
            return None
        base = weight if weight._base is None else weight._base
        key = (whole, start, start + len(weight))
        name: str | None = None
        if bias is not None:
            of_bias, first = self._rows(bias)
            name = of_bias if of_bias is not None and first == start and len(bias) == len(weight) else ""
        made_of = self._made_of(bias) if bias is not None and name == "" else None
        part = self.found.parts.setdefault(key, Part(whole, key[1:], len(weight) == len(base), name, made_of, groups))
        if (part.bias, part.made_of) != (name, made_of):
            part.bias, part.made_of = "", None
        return part

    def _made_of(self, bias: Tensor) -> tuple[tuple[str, int] | None, ...] | None:
        """The parameter and index of each number of a bias, ``None`` for zero; or ``None`` for another bias."""
        found = [self.signatures.owners.get(value, (None, 0)) if value else None for value in bias.tolist()]
        return tuple(found) if all(place is None or isinstance(place[0], str) for place in found) else None

    def _rows(self, tensor: Tensor) -> tuple[str | None, int]:
        """The parameter that a tensor is, or is some rows of, and the first row."""
        if name := self.names.get(id(tensor)):
            return name, 0
        base = tensor._base
        if base is None or id(base) not in self.names or tensor.stride() != base.stride() or not base.stride(0):
            return None, 0
        first, rest = divmod(int(tensor.storage_offset() - base.storage_offset()), base.stride(0))
        return (None, 0) if rest or tensor.shape[1:] != base.shape[1:] else (self.names[id(base)], first)

    def _output(self, part: Part, result: Tensor, axis: int) -> Tensor:
        """The signature of a layer in place of its output."""
        key = (part.weight, part.rows[0])
        if id(part) not in self.part_signatures:
            self.part_signatures[id(part)] = self.signatures.new(part, part.rows[1] - part.rows[0])
            stream = self.found.raw[key] = self.new_stream(part.rows[1] - part.rows[0])
            stream.writers.append((part, None))
        signature = self.part_signatures[id(part)]
        output = spread(signature, result, axis)
        self.moved[id(output)] = output
        return self.keep(Known(output, self.found.raw[key], signature, axis, None, part))

    def _linear(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        part, known = self._part(weight, bias), self.known(input)
        result = F.linear(input, weight, bias)
        attention = self._columns(input) if part else None
        if part and attention:
            part.sources.append(attention[0])
            attention[0].takers.append((part, attention[1]))
        else:
            self.take("linear", [input])
            if part and known and known.axis == -1:
                part.sources.append(known.norm or known.stream)
                known.stream.root.readers.append((part, known.norm))
            elif known:
                known.stream.refuse("a layer over tokens, or with a computed weight, takes it")
            if part and not (known and known.axis == -1):
                part.sources.append(None)
        return self._output(part, result, -1) if part else result

    def _convolution(self, func: Any, args: tuple, kwargs: dict[str, Any]) -> Tensor:
        result: Tensor = func(*args, **kwargs)
        self.take("convolution", args[:1])
        if known := self.known(args[0]):
            known.stream.refuse("a convolution takes it")
        if func not in _CONVOLUTIONS or len(args) < 2:
            return result
        bias = args[2] if len(args) > 2 else kwargs.get("bias")
        groups = args[6] if len(args) > 6 else kwargs.get("groups", 1)
        part = self._part(args[1], bias, groups)
        if part is None:
            return result
        part.sources.append(None)
        return self._output(part, result, args[1].ndim * -1 + 1)

    def _norm(self, func: Any, args: tuple, kwargs: dict[str, Any]) -> Tensor:
        result: Tensor = func(*args, **kwargs)
        self.take("norm", args[:1])
        known = self.known(args[0])
        if known is None:
            if id(args[0]) not in self.moved and self.calls:
                self.found.other_norms[self.calls[-1][0]] = None
            return result
        if known.norm:  # the output of a norm is a stream of its own
            known.stream.refuse(_AGAIN)
            known = evolve(known, stream=self.new_stream(known.stream.features), norm=None)
            known.stream.refuse(_AGAIN)
        norm = self._norm_of(func, known, *args, **kwargs)
        if norm is None:
            return result
        stream = known.stream.root
        norm = stream.norms.setdefault(norm.name, norm)
        for other in self.found.streams:  # the same norm of two streams
            if other is other.root and other is not stream and norm.name in other.norms:
                stream = stream.join(other)
        norm = stream.norms[norm.name]
        if norm.name not in self.norm_signatures:
            self.norm_signatures[norm.name] = self.signatures.new(None, norm.features)
        signature = self.norm_signatures[norm.name]
        return self.keep(Known(spread(signature, result, -1), stream, signature, -1, norm))

    def _norm_of(
        self, func: Any, known: Known, _: Tensor, shape: Any, weight: Tensor | None = None, *rest: Any, **kwargs: Any
    ) -> Norm | None:
        """The module that normalises a stream; ``None`` after noting why it cannot be replaced."""
        centres = func in _LAYER_NORMS
        bias, *after = rest if centres and rest else (kwargs.get("bias"), *([] if centres else rest))
        eps = after[0] if after else kwargs.get("eps", 1e-5 if centres else None)
        weight = kwargs.get("weight", weight)
        name, module, args = self.calls[-1] if self.calls else ("", None, ())
        given = self.known(args[0]) if args else None
        reason = ""
        if module is None or any(True for _ in module.children()):
            reason = "a module with layers of its own normalises it"
        elif known.axis != -1 or len(tuple(shape)) != 1 or not given or given.axis != -1:
            reason = "its norms are not over the last axis of a module's input"
        elif any(value is not None and not self._is_own(name, value) for value in (weight, bias)):
            reason = "the weight of a norm is computed, or another module's"
        if reason:
            known.stream.refuse(reason)
            self.found.other_norms[name] = None
            return None
        names = [None if value is None else self.names[id(value)] for value in (weight, bias)]
        return Norm(name, known.stream.features, None if eps is None else float(eps), centres, *names)

    def _is_own(self, module: str, value: Tensor) -> bool:
        name = self.names.get(id(value))
        return name is not None and name.rpartition(".")[0] == module

    # attention

    def attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
        """Records the heads; the output is a signature of its own for each head."""
        heads = [self._heads(operand) for operand in (query, key, value)]
        rows = [None if found is None else found[0] for found in heads]
        attention = Attention(self._attending(), rows[0], rows[1], rows[2])
        again = next((one for one in self.found.attentions if rows == [one.query, one.key, one.value]), None)
        attention = again if again and None not in rows else attention
        if attention is not again:
            self.found.attentions.append(attention)
        for operand, found in zip((query, key, value), heads, strict=True):
            if found is None:
                self.take("attention", [operand])
        shape = (*query.shape[:-1], value.shape[-1])
        if heads[2] is None:
            return value.new_zeros(shape)
        index, attention.outputs = _output_heads(heads[0], heads[2])
        signature = self.signatures.new(attention, len(attention.outputs) * value.shape[-1]).to(value)
        output = signature.reshape(len(attention.outputs), -1)[index]
        output = output.reshape(*value.shape[:-2], 1, value.shape[-1]).expand(shape).clone()
        self.moved[id(output)] = output
        return output

    def _attending(self) -> str:
        """The name of the innermost running module that has layers of its own."""
        names = [name for name, module, _ in self.calls if any(True for _ in module.children())]
        return names[-1] if names else ""

    def _heads(self, operand: Tensor) -> tuple[list[Rows], Tensor] | None:
        """The rows of each head of ``[..., N, d]``, and which head each of the leading indices has."""
        if not bool((operand == operand[..., :1, :]).all()):
            return None
        unique, index = operand[..., 0, :].reshape(-1, operand.shape[-1]).unique(dim=0, return_inverse=True)
        heads: list[Rows] = []
        for values in unique:
            found = self.signatures.find(values)
            owners = {id(owner): owner for owner, _ in found or ()}
            if found is None or len(owners) != 1 or not isinstance(found[0][0], Part):
                return None
            heads.append((found[0][0], tuple(row for _, row in found)))
        return heads, index

    def _columns(self, input: Tensor) -> tuple[Attention, list[list[int]]] | None:
        """The attention whose output a layer takes, and the columns of each of its heads; ``None`` for other inputs."""
        if id(input) not in self.moved or not bool((input == input.reshape(-1, input.shape[-1])[0]).all()):
            return None
        found = self.signatures.find(input.reshape(-1, input.shape[-1])[0])
        if not found or not isinstance(found[0][0], Attention) or len({id(owner) for owner, _ in found}) != 1:
            return None
        attention: Attention = found[0][0]
        size = len(attention.value[0][1]) if attention.value else 0
        columns = {place: column for column, (_, place) in enumerate(found)}
        wanted = range(len(attention.outputs) * size)
        if len(columns) != len(found) or set(columns) != set(wanted):
            return None
        return attention, [
            [columns[head * size + place] for place in range(size)] for head in range(len(wanted) // size)
        ]


def _output_heads(
    query: tuple[list[Rows], Tensor] | None, value: tuple[list[Rows], Tensor]
) -> tuple[Tensor, list[int]]:
    """Which head each leading index of an attention's output has, and which head of the values each of these takes."""
    index = value[1]
    if query is None or len(query[1]) != len(index):
        return index, list(range(len(value[0])))
    pairs, heads = torch.stack([query[1], index]).unique(dim=1, return_inverse=True)
    return heads, pairs[1].tolist()
