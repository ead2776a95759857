"""Counts the multiplications of a forward pass where PyTorch's dispatcher sees them, and which of them stay in float.

A function mode sees the functions that Python code calls. It sees nothing of a custom operator, a scripted function, or
a function called under ``DisableTorchFunction``. The dispatcher sees what they all compute.
"""

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from attrs import frozen
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from spdfq.quantized.sites import site_name

aten = torch.ops.aten
_FLEX = "torch.nn.attention.flex_attention"
_FLEX_EAGER = "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG"
Key = tuple[str, str, tuple[str, ...]]


@frozen
class Multiplications:
    """The multiplications of one product, for one image.

    Args:
        name: the site of its second operand, or the module and the operator if the product has no sites.
        operator: what multiplies, for example ``mm``.
        sites: its operands; empty if it has no sites.
        count: number of multiplications; ``None`` if only the operator itself knows it.
        calls: how often the product was computed; more than once in a module that runs several times.
    """

    name: str
    operator: str
    sites: tuple[str, ...]
    count: int | None
    calls: int = 1


@frozen
class FloatShare:
    """How many multiplications have an operand in float.

    Args:
        total: multiplications of a forward pass of one image, as far as they can be counted.
        floating: those with an operand in float.
        unseen: names of products that have no sites, with the operator and the share of all multiplications in percent;
            ``None`` for operators whose multiplications cannot be counted.
    """

    total: int
    floating: int
    unseen: dict[str, float | None]

    @property
    def percent(self) -> float:
        """Share of the multiplications with an operand in float, in percent."""
        return 100 * self.floating / self.total if self.total else 0.0


class MultiplicationCounter(TorchDispatchMode):
    """Counts the multiplications that the dispatcher sees inside the ``with`` block, by product.

    Elementwise multiplications are not counted, except for those of two tensors that are both broadcast, as in an outer
    product.
    """

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()
        self.module: Callable[[], str] = lambda: ""
        """Gives the name of the running module."""
        self._product: tuple[str, tuple[str, ...]] | None = None
        self._counts: dict[Key, int | None] = {}
        self._calls = Counter[tuple[str, tuple[str, ...]]]()

    @contextmanager
    def product(self, name: str, *sites: str) -> Iterator[None]:
        """What is multiplied inside the ``with`` block belongs to this product."""
        before, self._product = self._product, (name, sites)
        self._calls[name, sites] += 1
        try:
            yield
        finally:
            self._product = before

    def counted(self) -> list[Multiplications]:
        """Every product so far."""
        return [
            Multiplications(name, operator, sites, count, self._calls.get((name, sites), 1))
            for (name, operator, sites), count in self._counts.items()
        ]

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        count = _multiplications(func, args, kwargs, result, self._product is not None)
        if count != 0:
            operator = _name(func)
            name, sites = self._product or (site_name(self.module(), operator), ())
            key, before = (name, operator, sites), self._counts.get((name, operator, sites), 0)
            self._counts[key] = None if count is None or before is None else before + count
        return result


@contextmanager
def eager_flex_attention() -> Iterator[None]:
    """Inside the ``with`` block, `flex_attention` runs as one operator; it would compile itself, which modes forbid."""
    module = sys.modules.get(_FLEX)
    before = getattr(module, _FLEX_EAGER, None)
    if before is None:
        yield
        return
    setattr(module, _FLEX_EAGER, True)
    try:
        yield
    finally:
        setattr(module, _FLEX_EAGER, before)


def float_share(products: list[Multiplications], in_float: Callable[[str], bool]) -> FloatShare:
    """The share of the multiplications with an operand in float.

    Args:
        products: of a forward pass.
        in_float: whether the tensor at a site is not quantized.
    """
    total = sum(product.count or 0 for product in products)
    floating = sum(product.count or 0 for product in products if not product.sites or any(map(in_float, product.sites)))
    unseen: dict[str, float | None] = {}
    for product in products:
        if not product.sites:
            unseen[product.name] = None if product.count is None else 100 * product.count / total
    return FloatShare(total, floating, unseen)


def _name(func: Any) -> str:
    """``mm`` for ``aten.mm.default``; with its library for an operator of an extension."""
    return str(getattr(func, "overloadpacket", func)).removeprefix("aten.")


def _multiplications(func: Any, args: tuple, kwargs: dict[str, Any], result: Any, is_product: bool) -> int | None:
    """Number of multiplications of an operator call; ``None`` for an operator that is not PyTorch's own."""
    packet = getattr(func, "overloadpacket", func)
    if packet in flop_registry:
        return int(flop_registry[packet](*args, **kwargs, out_val=result)) // 2
    if packet in _COUNTS:
        return _COUNTS[packet](args)
    if packet is aten.mul:
        return _elementwise(args, result, is_product)
    own = getattr(func, "namespace", "") in ("aten", "prim", "prims")
    return 0 if own or not any(map(torch.is_floating_point, _tensors(result))) else None


def _tensors(values: Any) -> list[Tensor]:
    items = values if isinstance(values, (tuple, list)) else (values,)
    return [item for item in items if isinstance(item, Tensor)]


def _elementwise(args: tuple, result: Tensor, is_product: bool) -> int:
    """Those of ``a * b`` if both are broadcast, or if it is a part of a product such as `torch.linalg.vecdot`."""
    operands = _tensors(args)
    if len(operands) < 2:
        return 0
    both = result.numel() > max(operand.numel() for operand in operands)
    return result.numel() if both or (is_product and operands[0].shape == operands[1].shape) else 0


def _attention(args: tuple) -> int:
    """Of ``[b, heads, n, d]`` queries with keys, and of the probabilities with values."""
    query, key, value = args[:3]
    return query.numel() * key.shape[-2] + query.shape[:-1].numel() * key.shape[-2] * value.shape[-1]


def _multi_head_attention(args: tuple) -> int:
    query, key, value, width = args[:4]
    projections = (2 * query.numel() + key.numel() + value.numel()) * width
    return projections + 2 * query.numel() * key.shape[-2]


def _encoder_layer(args: tuple) -> int:
    states = args[0]
    weights = sum(tensor.numel() for tensor in _tensors(args[1:]) if tensor.ndim == 2)
    return states.shape[:-1].numel() * weights + 2 * states.numel() * states.shape[-2]


def _recurrent(args: tuple) -> int:
    """Of an LSTM layer, whose input is ``[time, b, d]``, with its two weights."""
    return args[0].shape[:-1].numel() * (args[1].numel() + args[2].numel())


# operators for which torch's own table has no formula
_COUNTS: dict[Any, Callable[[tuple], int]] = {
    aten.dot: lambda args: args[0].numel(),
    aten.vdot: lambda args: args[0].numel(),
    aten.mv: lambda args: args[0].numel(),
    aten.addmv: lambda args: args[1].numel(),
    aten.addbmm: lambda args: args[1].numel() * args[2].shape[-1],
    aten._trilinear: lambda args: len(args[0]) * args[1].numel(),
    aten._cdist_forward: lambda args: args[0].numel() * args[1].shape[-2],
    aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    aten._native_multi_head_attention: _multi_head_attention,
    aten._transformer_encoder_layer_fwd: _encoder_layer,
    aten.mkldnn_rnn_layer: _recurrent,
}
