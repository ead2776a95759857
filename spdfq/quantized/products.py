"""Sees every product of a forward pass, by weight or by activation, and lets a visitor replace its operands.

On demand it also sees tensors at other points: LayerNorm outputs, residual sums, scores before the softmax, logits.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from attrs import define, field
from torch import Tensor, nn

from spdfq.attention import (
    PRODUCT_FUNCTIONS,
    SOFTMAX_FUNCTIONS,
    AttentionMode,
    attention_probabilities,
    attention_scores,
    fused_attention,
)
from spdfq.quantizers import Product, Quantizer

WEIGHT, INPUT, QUERY, KEY, VALUE, SOFTMAX, PRODUCT = "weight", "input", "query", "key", "value", "softmax", "product"
KINDS = (WEIGHT, INPUT, QUERY, KEY, VALUE, SOFTMAX, PRODUCT)
LAYER_NORM, BRANCH, RESIDUAL, SCORES, LOGITS = "layer_norm", "branch", "residual", "scores", "logits"
POINTS = frozenset((LAYER_NORM, BRANCH, RESIDUAL, SCORES, LOGITS))
ATTENTION = frozenset((QUERY, KEY, VALUE, SOFTMAX, PRODUCT, SCORES))
GELU = "gelu"

_BY_WEIGHT = {
    *(F.linear, F.conv1d, F.conv2d, F.conv3d),
    *(F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d),
}
# the axis of the output that belongs to a weight's first one
_CHANNELS = {F.linear: -1, F.conv1d: 1, F.conv2d: 1, F.conv3d: 1}
_OTHER_PRODUCTS = {
    *(torch.mm, torch.mv, torch.dot, torch.inner, torch.tensordot, torch.chain_matmul, torch.linalg.multi_dot),
    *(torch.addmm, torch.addmv, torch.addbmm, torch.baddbmm),
    *(Tensor.mm, Tensor.mv, Tensor.dot, Tensor.inner, Tensor.__rmatmul__),
    *(Tensor.addmm, Tensor.addmv, Tensor.addbmm, Tensor.baddbmm),
    *(F.bilinear, torch.bilinear, F.multi_head_attention_forward),
}
_KEEPS_VALUES = {
    *(F.dropout, torch.dropout, Tensor.to, Tensor.float, Tensor.type_as, Tensor.contiguous, Tensor.view),
    *(Tensor.reshape, Tensor.permute, Tensor.transpose, Tensor.flatten, Tensor.unsqueeze, Tensor.squeeze),
    *(torch.reshape, torch.permute, torch.transpose, torch.flatten, torch.unsqueeze, torch.squeeze),
    *(torch.roll, Tensor.roll, F.pad, Tensor.__getitem__),
}
_LAYER_NORMS = {F.layer_norm, torch.layer_norm, F.rms_norm, torch.rms_norm}
_SUMS = {torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__}
_SUMS_IN_PLACE = {Tensor.add_, Tensor.__iadd__}
_MAKER = "_spdfq_maker"

Visit = Callable[[str, str, Tensor], Tensor]
"""``visit(site, kind, tensor)`` gives the tensor that is multiplied instead."""
Leftover = Callable[[str, str], object]
"""``leftover(site, what)`` is told of a product whose operands cannot be replaced."""
Watch = Callable[[str, Product], object]
"""``watch(site, product)`` is told what each operand is multiplied into."""


def ignore(_: str, __: Any) -> None:
    """A `Leftover` or `Watch` that does nothing."""


def maker(tensor: Tensor) -> str:
    """What made a tensor, where that counts: ``softmax``, ``gelu``, or the kind of the point that saw it."""
    made: str = getattr(tensor, _MAKER, "")
    return made


@define(eq=False)
class _Call:
    """A running ``forward``.

    Args:
        name: of the module.
        products: how many it has made itself that can be quantized.
        leftovers: and how many that cannot.
        points: how many points of each kind it has passed.
        skips: its arguments and residual sums by id: what can be the skip of a residual sum.
    """

    name: str
    products: int = 0
    leftovers: int = 0
    points: Counter[str] = field(factory=Counter)
    skips: dict[int, Tensor] = field(factory=dict)


@contextmanager
def products(
    network: nn.Module,
    visit: Visit,
    leftover: Leftover = ignore,
    points: frozenset[str] = frozenset(),
    watch: Watch = ignore,
) -> Iterator[None]:
    """While inside, every product of ``network``, or of a part of it called alone, passes ``visit``.

    Sites are named after the module that multiplies: ``blocks.0.mlp.fc1.weight`` and ``.input``,
    ``blocks.0.attn.query``, ``.key``, ``.softmax``, ``.value``; where it multiplies by itself, ``.product0_left`` and
    ``.product0_right``, then ``.product1_left`` and so on.
    Weights are known by identity, so a module that hands its weight to `F.linear` itself (BEiT) is seen as well.
    A product of other than two activations, or of an activation and a weight, is named after its function.

    Of ``points``, ``visit`` also sees, named after the module that runs (``blocks.0.residual``, then ``.residual1``):

    * ``layer_norm``: outputs of LayerNorm and RMSNorm.
    * ``residual`` and ``branch``: the sum, and the summand that is no skip, of a sum with a skip. A skip is an argument
      of the module, a residual sum it made before, or either moved about; a shortcut that pools or projects is none.
    * ``scores``: attention scores in float32, before masks; what goes into an explicit softmax.
    * ``logits``: what the network returns.

    What a point saw passes `visit` once more where it enters a linear layer or is added; `maker` tells.
    """
    calls: list[_Call] = []

    def enter(name: str, args: tuple, kwargs: dict[str, Any]) -> None:
        given = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)] if points else []
        calls.append(_Call(name, skips={id(tensor): tensor for tensor in given}))

    def leave(module: nn.Module, _: tuple, output: Any) -> Any:
        calls.pop()
        if module is network and LOGITS in points and isinstance(output, Tensor):
            return visit(LOGITS, LOGITS, output)
        return None

    with ExitStack() as stack:
        stack.enter_context(fused_attention(network))
        for name, module in network.named_modules():
            if isinstance(module, Quantizer):
                continue
            begin = module.register_forward_pre_hook(
                lambda _, args, kwargs, name=name: enter(name, args, kwargs), with_kwargs=True
            )
            stack.callback(begin.remove)
            stack.callback(module.register_forward_hook(leave, always_call=True).remove)
        stack.enter_context(_ProductMode(network, calls, visit, leftover, points, watch))
        yield


class _ProductMode(AttentionMode):
    def __init__(
        self,
        network: nn.Module,
        calls: list[_Call],
        visit: Visit,
        leftover: Leftover,
        points: frozenset[str],
        watch: Watch,
    ) -> None:
        super().__init__()
        self.weights = {id(parameter): name for name, parameter in network.named_parameters()}
        self.calls, self.visit, self.leftover, self.points, self.watch = calls, visit, leftover, points, watch

    def attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
        call = self._call()
        suffix = str(call.products) if call.products else ""
        call.products += 1
        names = {kind: _site(call.name, kind + suffix) for kind in ATTENTION}
        self.watch(names[QUERY], Product(query, lambda other: attention_scores(other, key, scale)))
        self.watch(names[KEY], Product(key, lambda other: attention_scores(query, other, scale)))
        query, key = self.visit(names[QUERY], QUERY, query), self.visit(names[KEY], KEY, key)
        value, values = self.visit(names[VALUE], VALUE, value), value
        change = partial(self.visit, names[SCORES], SCORES) if SCORES in self.points else None
        probabilities = attention_probabilities(query, key, mask, scale, change).to(value.dtype)
        self.watch(names[VALUE], Product(values, lambda other: probabilities @ other))
        self.watch(names[SOFTMAX], Product(probabilities, lambda other: other @ values))
        return self.visit(names[SOFTMAX], SOFTMAX, probabilities) @ value

    def other(self, func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        if func in _BY_WEIGHT:
            return self._by_weight(func, *args, **kwargs)
        if func in PRODUCT_FUNCTIONS:
            return self._by_activation(func, args, kwargs)
        if func in _OTHER_PRODUCTS:
            self._left_over(func)
        if self.points and (func in _SUMS or func in _SUMS_IN_PLACE):
            return self._sum(func, args, kwargs)
        if func in SOFTMAX_FUNCTIONS and SCORES in self.points and args:
            args = (self._point(SCORES, args[0]), *args[1:])
        result = func(*args, **kwargs)
        if func in _LAYER_NORMS and LAYER_NORM in self.points:
            return _made(self._point(LAYER_NORM, result), LAYER_NORM)
        if func in _KEEPS_VALUES and args:
            self._moved(args[0], result)
        elif func in SOFTMAX_FUNCTIONS or func is F.gelu:
            _made(result, SOFTMAX if func in SOFTMAX_FUNCTIONS else GELU)
        return result

    def _moved(self, tensor: Any, result: Any) -> None:
        if made := maker(tensor):
            _made(result, made)
        if self.points and self.calls and id(tensor) in self.calls[-1].skips:
            self.calls[-1].skips[id(result)] = result

    def _sum(self, func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        skips = self.calls[-1].skips if self.calls else {}
        at = next((index for index, summand in enumerate(args[:2]) if id(summand) in skips), None)
        if at is None or len(args) != 2 or kwargs or not _adds_to(args[at], args[1 - at]):
            return func(*args, **kwargs)
        summands = list(args)
        if BRANCH in self.points:
            summands[1 - at] = self._point(BRANCH, args[1 - at])
        total = func(*summands)
        if RESIDUAL in self.points:
            seen = self._point(RESIDUAL, total)
            total = total.copy_(seen) if func in _SUMS_IN_PLACE and seen is not total else seen
            _made(total, RESIDUAL)
        skips[id(total)] = total
        return total

    def _point(self, kind: str, tensor: Tensor) -> Tensor:
        call = self._call()
        count = call.points[kind]
        call.points[kind] += 1
        return self.visit(_site(call.name, f"{kind}{count or ''}"), kind, tensor)

    def _by_weight(self, func: Any, input: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        name = self.weights.get(id(weight))
        if name is None:
            self._left_over(func)
            return func(input, weight, *args, **kwargs)
        input_name = input_site(name)
        self.watch(input_name, Product(input, lambda other: func(other, weight, *args, **kwargs)))
        channels = _CHANNELS.get(func)
        self.watch(name, Product(weight, lambda other: func(input, other, *args, **kwargs), channels))
        return func(self.visit(input_name, INPUT, input), self.visit(name, WEIGHT, weight), *args, **kwargs)

    def _by_activation(self, func: Any, args: tuple, kwargs: dict[str, Any]) -> Tensor:
        equation, operands = (args[:1], args[1:]) if func is torch.einsum else ((), args)
        if len(operands) != 2 or kwargs or any(id(operand) in self.weights for operand in operands):
            self._left_over(func)
            return func(*args, **kwargs)
        call = self._call()
        name = _site(call.name, f"{PRODUCT}{call.products}")
        call.products += 1
        left, right = operands
        self.watch(f"{name}_left", Product(left, lambda other: func(*equation, other, right)))
        self.watch(f"{name}_right", Product(right, lambda other: func(*equation, left, other)))
        seen = (
            self.visit(f"{name}_{side}", SOFTMAX if maker(operand) == SOFTMAX else PRODUCT, operand)
            for side, operand in zip(("left", "right"), operands, strict=True)
        )
        return func(*equation, *seen)

    def _left_over(self, func: Any) -> None:
        call, what = self._call(), getattr(func, "__name__", str(func)).strip("_")
        self.leftover(_site(call.name, what + (str(call.leftovers) if call.leftovers else "")), what)
        call.leftovers += 1

    def _call(self) -> _Call:
        return self.calls[-1] if self.calls else _Call("")


def input_site(weight: str) -> str:
    """The site of what a weight is multiplied with."""
    return weight.removesuffix(WEIGHT) + INPUT if weight.endswith(WEIGHT) else f"{weight}_{INPUT}"


def _made(tensor: Tensor, by: str) -> Tensor:
    setattr(tensor, _MAKER, by)
    return tensor


def _adds_to(skip: Tensor, summand: Any) -> bool:
    """Whether a sum with the skip has the skip's shape and is of activations."""
    if not isinstance(summand, Tensor) or not (skip.is_floating_point() and summand.is_floating_point()):
        return False
    return summand.ndim > 1 and torch.broadcast_shapes(skip.shape, summand.shape) == skip.shape


def _site(module: str, leaf: str) -> str:
    return f"{module}.{leaf}" if module else leaf
