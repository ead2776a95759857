"""Sees every product of a forward pass, by weight or by activation, and lets a visitor replace its operands."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from attrs import define
from torch import Tensor, nn

from spdfq.attention import SOFTMAX_FUNCTIONS, AttentionMode, attention_probabilities, fused_attention
from spdfq.quantizers import Quantizer

WEIGHT, INPUT, QUERY, KEY, VALUE, SOFTMAX, PRODUCT = "weight", "input", "query", "key", "value", "softmax", "product"
KINDS = (WEIGHT, INPUT, QUERY, KEY, VALUE, SOFTMAX, PRODUCT)

_BY_WEIGHT = {
    *(F.linear, F.conv1d, F.conv2d, F.conv3d),
    *(F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d),
}
BY_ACTIVATION = {
    *(torch.matmul, torch.linalg.matmul, Tensor.matmul, Tensor.__matmul__),
    *(torch.bmm, Tensor.bmm, torch.einsum),
}
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
}
_MARK = "_spdfq_is_softmax"

Visit = Callable[[str, str, Tensor], Tensor]
"""``visit(site, kind, tensor)`` gives the tensor that is multiplied instead."""
Leftover = Callable[[str, str], object]
"""``leftover(site, what)`` is told of a product whose operands cannot be replaced."""


def ignore(_: str, __: str) -> None:
    """A `Leftover` that does nothing."""


@define
class _Call:
    """A running ``forward``, and how many products it has made itself that can be quantized and that cannot."""

    name: str
    products: int = 0
    leftovers: int = 0


@contextmanager
def products(network: nn.Module, visit: Visit, leftover: Leftover = ignore) -> Iterator[None]:
    """While inside, every product of ``network``, or of a part of it called alone, passes ``visit``.

    Sites are named after the module that multiplies: ``blocks.0.mlp.fc1.weight`` and ``.input``,
    ``blocks.0.attn.query``, ``.key``, ``.softmax``, ``.value``; where it multiplies by itself, ``.product0_left`` and
    ``.product0_right``, then ``.product1_left`` and so on.
    Weights are known by identity, so a module that hands its weight to `F.linear` itself (BEiT) is seen as well.
    A product of other than two activations, or of an activation and a weight, is named after its function.
    """
    calls: list[_Call] = []

    def leave(*_: Any) -> None:
        calls.pop()

    with ExitStack() as stack:
        stack.enter_context(fused_attention(network))
        for name, module in network.named_modules():
            if isinstance(module, Quantizer):
                continue
            enter = module.register_forward_pre_hook(lambda *_, name=name: calls.append(_Call(name)))
            stack.callback(enter.remove)
            stack.callback(module.register_forward_hook(leave, always_call=True).remove)
        stack.enter_context(_ProductMode(network, calls, visit, leftover))
        yield


class _ProductMode(AttentionMode):
    def __init__(self, network: nn.Module, calls: list[_Call], visit: Visit, leftover: Leftover) -> None:
        super().__init__()
        self.weights = {id(parameter): name for name, parameter in network.named_parameters()}
        self.calls, self.visit, self.leftover = calls, visit, leftover

    def attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
        call = self._call()
        suffix = str(call.products) if call.products else ""
        call.products += 1
        query, key, value = (
            self.visit(_site(call.name, kind + suffix), kind, operand)
            for kind, operand in ((QUERY, query), (KEY, key), (VALUE, value))
        )
        probabilities = attention_probabilities(query, key, mask, scale).to(value.dtype)
        return self.visit(_site(call.name, SOFTMAX + suffix), SOFTMAX, probabilities) @ value

    def other(self, func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        if func in _BY_WEIGHT:
            return self._by_weight(func, *args, **kwargs)
        if func in BY_ACTIVATION:
            return self._by_activation(func, args, kwargs)
        if func in _OTHER_PRODUCTS:
            self._left_over(func)
        result = func(*args, **kwargs)
        if func in SOFTMAX_FUNCTIONS or (func in _KEEPS_VALUES and args and getattr(args[0], _MARK, False)):
            setattr(result, _MARK, True)
        return result

    def _by_weight(self, func: Any, input: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        name = self.weights.get(id(weight))
        if name is None:
            self._left_over(func)
            return func(input, weight, *args, **kwargs)
        return func(self.visit(input_site(name), INPUT, input), self.visit(name, WEIGHT, weight), *args, **kwargs)

    def _by_activation(self, func: Any, args: tuple, kwargs: dict[str, Any]) -> Tensor:
        equation, operands = (args[:1], args[1:]) if func is torch.einsum else ((), args)
        if len(operands) != 2 or kwargs or any(id(operand) in self.weights for operand in operands):
            self._left_over(func)
            return func(*args, **kwargs)
        call = self._call()
        name = _site(call.name, f"{PRODUCT}{call.products}")
        call.products += 1
        left, right = (
            self.visit(f"{name}_{side}", SOFTMAX if getattr(operand, _MARK, False) else PRODUCT, operand)
            for side, operand in zip(("left", "right"), operands, strict=True)
        )
        return func(*equation, left, right)

    def _left_over(self, func: Any) -> None:
        call, what = self._call(), getattr(func, "__name__", str(func)).strip("_")
        self.leftover(_site(call.name, what + (str(call.leftovers) if call.leftovers else "")), what)
        call.leftovers += 1

    def _call(self) -> _Call:
        return self.calls[-1] if self.calls else _Call("")


def input_site(weight: str) -> str:
    """The site of what a weight is multiplied with."""
    return weight.removesuffix(WEIGHT) + INPUT if weight.endswith(WEIGHT) else f"{weight}_{INPUT}"


def _site(module: str, leaf: str) -> str:
    return f"{module}.{leaf}" if module else leaf
