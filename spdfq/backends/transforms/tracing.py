"""Finds the residual streams and attention heads of a network by a forward pass with signatures.

Each layer, norm and embedding outputs its signature instead of its values: numbers of its own, the same for every
token and image. A tensor that consists of a signature only is that output, at most moved or averaged over tokens.
Everything else that touches a stream is a reason not to rotate it.
"""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from attrs import evolve, frozen
from torch import Tensor, nn

from spdfq.attention import AttentionMode, FunctionMode, fused_attention
from spdfq.backends.transforms.signatures import Signatures, axis_of, replaced, spread, tensors
from spdfq.backends.transforms.streams import Attention, Norm, Part, Rows, Stream, Structure
from spdfq.quantized.functions import NORMS, PRODUCTS_WITH_WEIGHT, SUMS, SUMS_IN_PLACE
from spdfq.runtime.shared_modules import Hook, own_hooks

_LAYER_NORMS = {F.layer_norm, torch.layer_norm}
_CONVOLUTIONS = {F.conv1d, F.conv2d, F.conv3d}
_JOINS = {torch.cat, torch.concat, torch.concatenate, torch.stack}
_TOTALS = {torch.sum, Tensor.sum}
_FACTORS = {"mul", "mul_", "multiply", "__mul__", "__rmul__", "__imul__"}
_QUOTIENTS = {"div", "div_", "true_divide", "__truediv__", "__itruediv__"}
_NORMALISE = {"batch_norm", "group_norm", "instance_norm"}
_IGNORED = {"zeros_like", "ones_like", "empty_like", "new_zeros", "new_ones", "new_empty", "new_full", "full_like"}
# their result may look like a signature although they are not linear
_NOT_LINEAR = ("max", "min", "sort", "median", "topk", "clamp", "clip", "hardtanh")
# they change nothing but place, shape and type
_MOVES = {
    *("view", "reshape", "permute", "transpose", "flatten", "unflatten", "unsqueeze", "squeeze", "contiguous"),
    *("getitem", "unbind", "chunk", "split", "split_with_sizes", "tensor_split", "expand", "expand_as", "roll", "to"),
    *("float", "type_as", "type", "clone", "detach", "swapaxes", "swapdims", "movedim", "moveaxis", "get", "dropout"),
    *("repeat_interleave", "select", "narrow", "view_as", "reshape_as", "t"),
}


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
    return tracing.found


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


@frozen(eq=False)
class _Known:
    """A tensor that consists of a signature.

    Args:
        tensor: the tensor; keeping it alive prevents that its id is used again.
        stream: the stream that it belongs to, or that ``norm`` normalises.
        signature: ``[C]``.
        axis: of the features, counted from the end.
        norm: what normalised it last; ``None`` for the stream itself.
        layer: the layer whose output it is, before anything was added or scaled.
    """

    tensor: Tensor
    stream: Stream
    signature: Tensor
    axis: int
    norm: Norm | None = None
    layer: Part | None = None


class _Tracing(AttentionMode):
    """Replaces outputs by signatures and records what takes them."""

    def __init__(self, network: nn.Module, weights: set[int]) -> None:
        super().__init__()
        self.names = {id(parameter): name for name, parameter in network.named_parameters()}
        self.embeddings = {
            id(parameter): name
            for name, parameter in network.named_parameters()
            if id(parameter) not in weights and parameter.is_floating_point() and parameter.numel() > 1
        }
        self.found = Structure()
        self.signatures = Signatures()
        self.by_id: dict[int, _Known] = {}
        self.moved: dict[int, Tensor] = {}  # tensors that hold values of layers and attentions, at any place
        self.stand_ins: dict[int, Tensor] = {}
        self.norm_signatures: dict[str, Tensor] = {}
        self.part_signatures: dict[int, Tensor] = {}
        self.scaled: dict[tuple[int, str], _Known] = {}
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

    # what is known of tensors

    def known(self, tensor: Any) -> _Known | None:
        """What is known of a tensor."""
        return self.by_id.get(id(tensor))

    def _keep(self, known: _Known) -> Tensor:
        self.by_id[id(known.tensor)] = known
        return known.tensor

    def _stream(self, features: int) -> Stream:
        self.found.streams.append(Stream(features))
        return self.found.streams[-1]

    def _stand_ins(self, value: Any) -> Any:
        """Arguments with each embedding replaced by its signature."""
        for tensor in tensors(value):
            name = self.embeddings.get(id(tensor))
            if name is None:
                continue
            self.found.parameters.add(name)
            if id(tensor) not in self.stand_ins:
                stream, signature = self._stream(tensor.shape[-1]), self.signatures.new(None, tensor.shape[-1])
                stream.parameters.append(name)
                known = _Known(spread(signature, tensor.detach(), -1), stream, signature, -1)
                self.stand_ins[id(tensor)] = self._keep(known)
        return replaced(value, self.stand_ins)

    def _take(self, func: str, value: Any) -> None:
        """Values of layers and attentions among the arguments of a function that does not only move them."""
        for tensor in tensors(value):
            if id(tensor) in self.moved:
                for number in tensor.unique().tolist():
                    if owner := self.signatures.owners.get(number):
                        self.found.used.setdefault((id(owner[0]), owner[1]), func)

    # functions

    def other(self, func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        """Any function but scaled dot-product attention."""
        name = getattr(func, "__name__", str(func)).strip("_")
        if func in PRODUCTS_WITH_WEIGHT or func in NORMS:
            if args:
                args = (self._stand_ins(args[0]), *args[1:])
            if func is F.linear:
                return self._linear(*args, **kwargs)
            return (
                self._convolution(func, args, kwargs)
                if func in PRODUCTS_WITH_WEIGHT
                else self._norm(func, args, kwargs)
            )
        if (factor := getattr(func, "__name__", "")) in _FACTORS | _QUOTIENTS and len(args) == 2 and not kwargs:
            if factor in _FACTORS and (scaled := self._layer_scale(func, *args)) is not None:
                return scaled
            if (same := self._scalar(func, args)) is not None:
                return same
        args, kwargs = self._stand_ins(args), self._stand_ins(kwargs)
        if (func in SUMS or func in SUMS_IN_PLACE) and len(args) == 2 and not kwargs:
            return self._sum(func, *args)
        if func in _JOINS:
            return self._join(func, args, kwargs)
        result = func(*args, **kwargs)
        if func in _TOTALS and isinstance(result, Tensor) and args and self.known(args[0]):
            result = result / (args[0].numel() / max(result.numel(), 1))  # of equal tokens: their mean
        return self._any(name, args, kwargs, result)

    def _any(self, name: str, args: tuple, kwargs: dict[str, Any], result: Any) -> Any:
        """A function without a rule: whatever its results are, or a reason."""
        results = tensors(result)
        if name == "setitem":
            results = [args[0]]
        if name in {ignored.strip("_") for ignored in _IGNORED} or not results:
            return result
        given = tensors((args, kwargs))
        if name in _MOVES:
            if any(id(tensor) in self.moved for tensor in given[:1]):
                self.moved |= {id(tensor): tensor for tensor in results}
        else:
            self._take(name, given)
        for known in [known for tensor in given if (known := self.known(tensor))]:
            axes = [axis_of(tensor, known.signature) for tensor in results]
            if None in axes or name == "setitem" or any(word in name for word in _NOT_LINEAR):
                known.stream.refuse(f"its features go through {name}")
                continue
            for tensor, axis in zip(results, axes, strict=True):
                exact = spread(known.signature, tensor, axis or -1)
                if tensor._base is None and tensor.is_contiguous():
                    tensor.copy_(exact)  # averages are rounded
                self._keep(evolve(known, tensor=tensor, axis=axis or -1))
        return result

    def _layer_scale(self, func: Any, left: Any, right: Any) -> Tensor | None:
        """The output of a layer times a parameter for each feature; ``None`` for any other product."""
        for tensor, factor in ((left, right), (right, left)):
            known, name = self.known(tensor), self.embeddings.get(id(factor))
            if known is None or known.layer is None or name is None or factor.numel() != known.stream.features:
                continue
            shape = (1,) * (factor.ndim + known.axis) + factor.shape[known.axis :]
            if factor.ndim + known.axis < 0 or factor.shape != shape or factor.shape[known.axis] != factor.numel():
                continue
            result = func(left, right)
            self._take("mul", [tensor])
            scaled = self.scaled.get((id(known.layer), name))
            if scaled is None:
                stream, signature = self._stream(known.stream.features), self.signatures.new(None, factor.numel())
                stream.writers.append((known.layer, name))
                scaled = self.scaled[id(known.layer), name] = _Known(result, stream, signature, known.axis)
            values = spread(scaled.signature, result, known.axis)
            return self._keep(evolve(scaled, tensor=_into(func, result, values), axis=known.axis))
        return None

    def _scalar(self, func: Any, args: tuple) -> Tensor | None:
        """A known tensor times or divided by one number: the pass goes on with the tensor itself."""
        is_tensor = [isinstance(value, Tensor) and value.numel() > 1 for value in args]
        if is_tensor.count(True) != 1 or (not is_tensor[0] and "div" in func.__name__):
            return None
        tensor = args[is_tensor.index(True)]
        if not self.known(tensor) and id(tensor) not in self.moved:
            return None
        name = func.__name__
        result = tensor if name.startswith("__i") or (name.endswith("_") and name[:2] != "__") else tensor.clone()
        if id(tensor) in self.moved:
            self.moved[id(result)] = result
        if known := self.known(tensor):
            self._keep(evolve(known, tensor=result, layer=None))
        return result

    def _sum(self, func: Any, left: Any, right: Any) -> Any:
        result = func(left, right)
        pair = [known for value in (left, right) if (known := self.known(value))]
        if not pair or not isinstance(left, Tensor) or not isinstance(right, Tensor):
            return self._any("add", (left, right), {}, result)
        self._take("add", (left, right))
        joined = self._joined(pair, 2, "added")
        if joined is None:
            return result
        return self._keep(evolve(joined, tensor=_into(func, result, spread(joined.signature, result, joined.axis))))

    def _join(self, func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        result = func(*args, **kwargs)
        given = tensors((args, kwargs))
        pair = [known for value in given if (known := self.known(value))]
        self._take("cat", given)
        if pair and len({(id(known.norm), id(known.signature)) for known in pair}) == 1 and len(pair) == len(given):
            return self._any("cat", args, kwargs, result)  # parts of the same
        joined = self._joined(pair, len(given), "concatenated") if pair else None
        if joined is None:
            return result
        if result.shape[joined.axis] != len(joined.signature):
            joined.stream.refuse("its features are concatenated with others")
            return result
        return self._keep(evolve(joined, tensor=spread(joined.signature, result, joined.axis)))

    def _joined(self, parts: list[_Known], count: int, what: str) -> _Known | None:
        """The stream of tensors that are added or concatenated over tokens; ``None`` after noting why not."""
        reason = ""
        if len(parts) < count:
            reason = f"a tensor that no layer computes is {what}"
        elif any(known.norm for known in parts):
            reason = f"the output of a norm is {what}"
        elif len({(known.axis, known.stream.features) for known in parts}) > 1:
            reason = f"tensors of other shapes are {what}"
        if reason:
            for known in parts:
                known.stream.refuse(reason)
            return None
        stream = parts[0].stream.root
        for known in parts[1:]:
            stream = stream.join(known.stream)
        return _Known(parts[0].tensor, stream, self.signatures.new(None, stream.features), parts[0].axis)

    # layers and norms

    def _part(self, weight: Tensor, bias: Tensor | None, groups: int = 1, linear: bool = True) -> Part | None:
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
        part = self.found.parts.setdefault(key, Part(whole, key[1:], len(weight) == len(base), name, groups, linear))
        if part.bias != name:
            part.bias = ""
        return part

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
            stream = self.found.raw[key] = self._stream(part.rows[1] - part.rows[0])
            stream.writers.append((part, None))
        signature = self.part_signatures[id(part)]
        output = spread(signature, result, axis)
        self.moved[id(output)] = output
        return self._keep(_Known(output, self.found.raw[key], signature, axis, None, part))

    def _linear(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        part, known = self._part(weight, bias), self.known(input)
        result = F.linear(input, weight, bias)
        attention = self._columns(input) if part else None
        if part and attention:
            part.sources.append(attention[0])
            attention[0].takers.append((part, attention[1]))
        else:
            self._take("linear", [input])
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
        self._take("convolution", args[:1])
        if known := self.known(args[0]):
            known.stream.refuse("a convolution takes it")
        if func not in _CONVOLUTIONS or len(args) < 2:
            return result
        bias = args[2] if len(args) > 2 else kwargs.get("bias")
        groups = args[6] if len(args) > 6 else kwargs.get("groups", 1)
        part = self._part(args[1], bias, groups, linear=False)
        if part is None:
            return result
        part.sources.append(None)
        return self._output(part, result, args[1].ndim * -1 + 1)

    def _norm(self, func: Any, args: tuple, kwargs: dict[str, Any]) -> Tensor:
        result: Tensor = func(*args, **kwargs)
        self._take("norm", args[:1])
        known = self.known(args[0])
        if known is None:
            if id(args[0]) not in self.moved and self.calls:
                self.found.other_norms[self.calls[-1][0]] = None
            return result
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
        return self._keep(_Known(spread(signature, result, -1), stream, signature, -1, norm))

    def _norm_of(
        self, func: Any, known: _Known, _: Tensor, shape: Any, weight: Tensor | None = None, *rest: Any, **kwargs: Any
    ) -> Norm | None:
        """The module that normalises a stream; ``None`` after noting why it cannot be replaced."""
        centres = func in _LAYER_NORMS
        bias, *after = rest if centres and rest else (kwargs.get("bias"), *([] if centres else rest))
        eps = after[0] if after else kwargs.get("eps", 1e-5 if centres else None)
        weight = kwargs.get("weight", weight)
        name, module, args = self.calls[-1] if self.calls else ("", None, ())
        given = self.known(args[0]) if args else None
        reason = ""
        if known.norm:
            reason = "the output of a norm is normalised again"
        elif known.axis != -1 or len(tuple(shape)) != 1 or not given or given.axis != -1:
            reason = "its norms are not over the last axis of a module's input"
        elif any(value is not None and not self._is_own(name, value) for value in (weight, bias)):
            reason = "the weight of a norm is computed, or another module's"
        elif module is None or any(True for _ in module.children()):
            reason = "a module with layers of its own normalises it"
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
                self._take("attention", [operand])
        shape = (*query.shape[:-1], value.shape[-1])
        if heads[2] is None:
            return value.new_zeros(shape)
        unique, index = heads[2]
        signature = self.signatures.new(attention, len(unique) * value.shape[-1]).to(value).reshape(len(unique), -1)
        output = signature[index].reshape(*value.shape[:-2], 1, value.shape[-1]).expand(shape).clone()
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
        wanted = range(len(attention.value or ()) * size)
        if len(columns) != len(found) or set(columns) != set(wanted):
            return None
        return attention, [
            [columns[head * size + place] for place in range(size)] for head in range(len(wanted) // size)
        ]


def _into(func: Any, result: Tensor, values: Tensor) -> Tensor:
    """The values, written into the result of a function that works in place."""
    name = func.__name__
    in_place = name.startswith("__i") or (name.endswith("_") and not name.startswith("__"))
    return result.copy_(values) if in_place else values
