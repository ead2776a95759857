"""What is known of the tensors of a forward pass with signatures: sums, scalings and moves of streams."""

from collections.abc import Iterator
from typing import Any

import torch
from attrs import evolve, frozen
from torch import Tensor, nn

from spdfq.attention import AttentionMode
from spdfq.backends.transforms.signatures import Signatures, axis_of, replaced, spread
from spdfq.backends.transforms.streams import Norm, Part, Stream, Structure
from spdfq.backends.wiring import tensors
from spdfq.quantized.functions import SUMS, SUMS_IN_PLACE

_JOINS = {torch.cat, torch.concat, torch.concatenate, torch.stack}
_TOTALS = {torch.sum, Tensor.sum}
_FACTORS = {"mul", "mul_", "multiply", "__mul__", "__rmul__", "__imul__"}
_QUOTIENTS = {"div", "div_", "true_divide", "__truediv__", "__itruediv__"}
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


@frozen(eq=False)
class Known:
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


class KnownTensors(AttentionMode):
    """Follows signatures through all functions but layers, norms and attention.

    Args:
        network: its parameters are known by name.
        weights: ids of those that are weights or biases of layers and norms; the others are embeddings or factors.
    """

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
        self.by_id: dict[int, Known] = {}
        self.moved: dict[int, Tensor] = {}  # tensors that hold values of layers and attentions, at any place
        self.stand_ins: dict[int, Tensor] = {}
        self.scaled: dict[tuple[int, str], Known] = {}

    def known(self, tensor: Any) -> Known | None:
        """What is known of a tensor."""
        return self.by_id.get(id(tensor))

    def keep(self, known: Known) -> Tensor:
        """Remembers what is known of a tensor, and returns the tensor."""
        self.by_id[id(known.tensor)] = known
        return known.tensor

    def new_stream(self, features: int) -> Stream:
        """A stream of its own, until it is joined with another one."""
        self.found.streams.append(Stream(features))
        return self.found.streams[-1]

    def with_stand_ins(self, value: Any) -> Any:
        """Arguments with each embedding replaced by its signature."""
        for tensor in tensors(value):
            name = self.embeddings.get(id(tensor))
            if name is None:
                continue
            self.found.parameters.add(name)
            if id(tensor) not in self.stand_ins:
                stream, signature = self.new_stream(tensor.shape[-1]), self.signatures.new(name, tensor.shape[-1])
                stream.parameters.append(name)
                known = Known(spread(signature, tensor.detach(), -1), stream, signature, -1)
                self.stand_ins[id(tensor)] = self.keep(known)
        return replaced(value, self.stand_ins)

    def take(self, func: str, value: Any) -> None:
        """Values of layers and attentions among the arguments of a function that does not only move them."""
        for tensor in tensors(value):
            for place in self._places(tensor):
                self.found.used.setdefault(place, func)

    def _places(self, tensor: Tensor) -> Iterator[tuple[int, int]]:
        """The values of layers and attentions in a tensor: owner's id and index."""
        for number in tensor.unique().tolist() if id(tensor) in self.moved else ():
            if owner := self.signatures.owners.get(number):
                yield id(owner[0]), owner[1]

    def other(self, func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        """Any function but a layer, a norm or attention."""
        name = getattr(func, "__name__", str(func)).strip("_")
        if (factor := getattr(func, "__name__", "")) in _FACTORS | _QUOTIENTS and len(args) == 2 and not kwargs:
            if factor in _FACTORS and (scaled := self._layer_scale(func, *args)) is not None:
                return scaled
            if (same := self._scalar(func, args)) is not None:
                return same
        args, kwargs = self.with_stand_ins(args), self.with_stand_ins(kwargs)
        if (func in SUMS or func in SUMS_IN_PLACE) and len(args) == 2 and not kwargs:
            return self._sum(func, *args)
        if func in _JOINS:
            return self._join(func, args, kwargs)
        result = func(*args, **kwargs)
        summed = self.known(args[0]) if func in _TOTALS and args else None
        if summed and not summed.norm and isinstance(result, Tensor):
            result = result / (args[0].numel() / max(result.numel(), 1))  # of equal tokens: their mean
        return self._any(name, args, kwargs, result)

    def _any(self, name: str, args: tuple, kwargs: dict[str, Any], result: Any) -> Any:
        """A function without a rule: whatever its results are, or a reason."""
        results = tensors(result)
        if name == "setitem":
            results = [args[0]]
        if name in _IGNORED or not results:
            return result
        given = tensors((args, kwargs))
        if name in _MOVES:
            if any(id(tensor) in self.moved for tensor in given[:1]):
                self.moved |= {id(tensor): tensor for tensor in results}
        else:
            self.take(name, given)
        for known in [known for tensor in given if (known := self.known(tensor))]:
            axes = [axis_of(tensor, known.signature) for tensor in results]
            if None in axes or name == "setitem" or any(word in name for word in _NOT_LINEAR):
                known.stream.refuse(f"its features go through {name}")
                continue
            for tensor, axis in zip(results, axes, strict=True):
                exact = spread(known.signature, tensor, axis or -1)
                if tensor._base is None and tensor.is_contiguous():
                    tensor.copy_(exact)  # averages are rounded
                self.keep(evolve(known, tensor=tensor, axis=axis or -1))
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
            self.take("mul", [tensor])
            scaled = self.scaled.get((id(known.layer), name))
            if scaled is None:
                stream, signature = self.new_stream(known.stream.features), self.signatures.new(None, factor.numel())
                stream.writers.append((known.layer, name))
                scaled = self.scaled[id(known.layer), name] = Known(result, stream, signature, known.axis)
            values = spread(scaled.signature, result, known.axis)
            return self.keep(evolve(scaled, tensor=_into(func, result, values), axis=known.axis))
        return None

    def _scalar(self, func: Any, args: tuple) -> Tensor | None:
        """A known tensor times or divided by one number: the pass goes on with the tensor itself."""
        is_tensor = [isinstance(value, Tensor) and value.numel() > 1 for value in args]
        if is_tensor.count(True) != 1 or (not is_tensor[0] and "div" in func.__name__):
            return None
        tensor = args[is_tensor.index(True)]
        known = self.known(tensor)
        if (known is None and id(tensor) not in self.moved) or (known and known.norm):
            return None  # a factor behind a norm would have to scale what the norm's bias becomes
        name = func.__name__
        result = tensor if name.startswith("__i") or (name.endswith("_") and name[:2] != "__") else tensor.clone()
        self.found.scaled.update(self._places(tensor))
        if id(tensor) in self.moved:
            self.moved[id(result)] = result
        if known:
            self.keep(evolve(known, tensor=result, layer=None))
        return result

    def _sum(self, func: Any, left: Any, right: Any) -> Any:
        result = func(left, right)
        pair = [known for value in (left, right) if (known := self.known(value))]
        if not pair or not isinstance(left, Tensor) or not isinstance(right, Tensor):
            return self._any("add", (left, right), {}, result)
        self.take("add", (left, right))
        joined = self._joined(pair, result, 2, "added")
        if joined is None:
            return result
        return self.keep(evolve(joined, tensor=_into(func, result, spread(joined.signature, result, joined.axis))))

    def _join(self, func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        result = func(*args, **kwargs)
        given = tensors((args, kwargs))
        pair = [known for value in given if (known := self.known(value))]
        self.take("cat", given)
        if pair and len({(id(known.norm), id(known.signature)) for known in pair}) == 1 and len(pair) == len(given):
            return self._any("cat", args, kwargs, result)  # parts of the same
        joined = self._joined(pair, result, len(given), "concatenated") if pair else None
        if joined is None:
            return result
        return self.keep(evolve(joined, tensor=spread(joined.signature, result, joined.axis)))

    def _joined(self, parts: list[Known], result: Tensor, count: int, what: str) -> Known | None:
        """The stream of a sum or concatenation of so many tensors; ``None`` if it has no features of a stream.

        A sum that cannot be rotated is a stream with a reason.
        """
        axis, features = parts[0].axis, parts[0].stream.features
        alike = all(known.axis == axis and known.stream.features == features for known in parts)
        alike = alike and result.ndim >= -axis and result.shape[axis] == features
        reason = ""
        if any(known.norm for known in parts):
            reason = f"the output of a norm is {what}"
        elif not alike:
            reason = f"tensors of other shapes are {what}"
        elif len(parts) < count:
            reason = f"a tensor that no layer computes is {what}"
        streams = [known.stream for known in parts if not known.norm] if alike else []
        joined = streams[0].root if streams else self.new_stream(features)
        for stream in streams[1:]:
            joined = joined.join(stream)
        if reason:
            for refused in (joined, *(known.stream for known in parts)):
                refused.refuse(reason)
        return Known(result, joined, self.signatures.new(None, features), axis) if alike else None


def _into(func: Any, result: Tensor, values: Tensor) -> Tensor:
    """The values, written into the result of a function that works in place."""
    name = func.__name__
    in_place = name.startswith("__i") or (name.endswith("_") and not name.startswith("__"))
    return result.copy_(values) if in_place else values
