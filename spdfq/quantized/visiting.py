"""Visits every site of a forward pass: a visitor sees each tensor that can be quantized, and may replace it.

Sites are the operands of all products and, on demand, points between products: LayerNorm outputs, residual sums, scores
before the softmax, logits. Nothing in the network is replaced or wrapped: one `torch.overrides.TorchFunctionMode` sees
the functions that the network calls.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
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
from spdfq.errors import is_out_of_memory
from spdfq.quantized.functions import (
    MOVES,
    NORMS,
    OTHER_PRODUCTS,
    OUTPUT_CHANNELS,
    PRODUCTS_WITH_WEIGHT,
    SUMS,
    SUMS_IN_PLACE,
    is_known_by_weight,
)
from spdfq.quantized.multiplications import MultiplicationCounter, Multiplications, eager_flex_attention
from spdfq.quantized.sites import (
    ATTENTION,
    BRANCH,
    GELU,
    INPUT,
    KEY,
    LAYER_NORM,
    LOGITS,
    PRODUCT,
    QUERY,
    RESIDUAL,
    SCORES,
    SOFTMAX,
    VALUE,
    WEIGHT,
    Site,
    input_site,
    site_name,
)
from spdfq.quantizers import Product
from spdfq.runtime.shared_modules import Hook, own_hooks

_MAKER_MARK = "_spdfq_maker"

Visit = Callable[[str, str, Tensor], Tensor]
"""``visit(site, kind, tensor)`` returns the tensor that is used instead of ``tensor``."""
OnLeftover = Callable[[str, str], object]
"""``on_leftover(site, function)`` is called for each product whose operands cannot be replaced."""
OnProduct = Callable[[str, Product], object]
"""``on_product(site, product)`` is called for each operand of a product, before the visit."""


def ignore(_: str, __: Any) -> None:
    """An `OnLeftover` or `OnProduct` that does nothing."""


def unchanged(_: str, __: str, tensor: Tensor) -> Tensor:
    """A `Visit` that changes nothing."""
    return tensor


def maker_of(tensor: Tensor) -> str:
    """What computed a tensor, as far as it matters: ``softmax``, ``gelu``, or the kind of the point it passed."""
    maker: str = getattr(tensor, _MAKER_MARK, "")
    return maker


def _marked(tensor: Tensor, maker: str) -> Tensor:
    """The tensor with a mark that says what computed it."""
    setattr(tensor, _MAKER_MARK, maker)
    return tensor


@define(eq=False)
class _ModuleCall:
    """One running ``forward`` of a module.

    Args:
        name: of the module.
        products: number of products with replaceable operands that the module itself computed so far.
        leftovers: number of other products so far.
        points: number of points of each kind passed so far.
        skips: tensors that can be the skip of a residual sum, by id: the arguments and the residual sums so far.
    """

    name: str
    products: int = 0
    leftovers: int = 0
    points: dict[str, int] = field(factory=dict)
    skips: dict[int, Tensor] = field(factory=dict)


@contextmanager
def visit_sites(
    network: nn.Module,
    visit: Visit,
    on_leftover: OnLeftover = ignore,
    points: frozenset[str] = frozenset(),
    on_product: OnProduct = ignore,
    counter: MultiplicationCounter | None = None,
) -> Iterator[None]:
    """Inside the ``with`` block, calls of ``network`` or of a part of it pass all operands of products to ``visit``.

    Sites are named after the module that multiplies: ``blocks.0.mlp.fc1.weight`` and ``.input``,
    ``blocks.0.attn.query``, ``.key``, ``.softmax``, ``.value``. If a product takes some rows of a weight only, its
    input is called ``in_proj_input_rows64``. Operands of an explicit product of two activations are
    called ``.product0_left`` and ``.product0_right``, then ``.product1_left`` and so on. Weights are known by identity,
    so weights that a module passes to `F.linear` itself (BEiT) are seen too. Any other product cannot be replaced; it
    is reported to ``on_leftover`` and named after its function.

    ``visit`` also sees the kinds of ``points``, named after the running module (``blocks.0.residual``, then
    ``.residual1``):

    * ``layer_norm``: outputs of LayerNorm and RMSNorm.
    * ``residual`` and ``branch``: the sum of a skip and a branch, and the branch. A skip is an argument of the module,
      a residual sum that the module computed before, or one of them moved. A shortcut that pools or projects is no
      skip.
    * ``scores``: attention scores in float32, before masks; and the input of an explicit softmax.
    * ``logits``: what the network returns.

    A tensor that was seen at a point is visited again where it enters a linear layer or is added to a skip; `maker_of`
    tells.

    A ``counter`` counts the multiplications of each product and of everything else that runs.
    """
    calls: list[_ModuleCall] = []

    def enter(name: str, _: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        given = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)] if points else []
        calls.append(_ModuleCall(name, skips={id(tensor): tensor for tensor in given}))

    def leave(module: nn.Module, _: tuple, output: Any) -> Any:
        calls.pop()
        if module is network and LOGITS in points and isinstance(output, Tensor):
            return visit(LOGITS, LOGITS, output)
        return None

    hooks: list[Hook] = []
    for name, module in network.named_modules():
        if not points and not counter and is_known_by_weight(module):
            continue  # hooks take time
        hooks.append((partial(module.register_forward_pre_hook, with_kwargs=True), partial(enter, name)))
        hooks.append((partial(module.register_forward_hook, always_call=True), leave))
    mode = _VisitingMode(network, calls, visit, on_leftover, points, on_product, counter)
    if counter:
        counter.module = lambda: calls[-1].name if calls else ""
    with fused_attention(network), own_hooks(hooks), mode, counter or nullcontext():
        yield


@torch.no_grad()
def find_sites(
    network: nn.Module, example: Tensor, points: frozenset[str] = frozenset()
) -> tuple[dict[str, Site], dict[str, str]]:
    """Every site of a network, in the order of a forward pass, and the products that cannot be quantized.

    Args:
        network: any module in evaluation mode.
        example: one normalised image ``[1, C, H, W]``.
        points: kinds of points that are sites too. A tensor seen at a point has no second site where it enters a linear
            layer or is added to a skip.
    """
    sites: dict[str, Site] = {}
    leftovers: dict[str, str] = {}

    def visit(name: str, kind: str, tensor: Tensor) -> Tensor:
        seen_before = kind in (INPUT, BRANCH) and maker_of(tensor) in points
        if not seen_before:
            sites.setdefault(name, Site(name, kind, tuple(tensor.shape), maker_of(tensor)))
        return tensor

    with visit_sites(network, visit, leftovers.setdefault, points):
        network(example)
    return sites, leftovers


def count_multiplications(network: nn.Module, example: Tensor) -> list[Multiplications]:
    """The multiplications of a forward pass of one image ``[1, C, H, W]``, those of each product and all others.

    Where something forbids that the dispatcher is watched, the whole network counts as one unknown product.
    """
    counter = MultiplicationCounter()
    try:
        # under inference mode the dispatcher would see whole operators instead of what they consist of
        with (
            torch.inference_mode(False),
            torch.no_grad(),
            eager_flex_attention(),
            visit_sites(network, unchanged, counter=counter),
        ):
            network(example)
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise
        return [Multiplications(type(network).__name__, "forward", (), None)]
    return counter.counted()


class _VisitingMode(AttentionMode):
    """Sees every function call of the network; ``calls`` is the stack of the modules whose ``forward`` runs."""

    def __init__(
        self,
        network: nn.Module,
        calls: list[_ModuleCall],
        visit: Visit,
        on_leftover: OnLeftover,
        points: frozenset[str],
        on_product: OnProduct,
        counter: MultiplicationCounter | None,
    ) -> None:
        super().__init__()
        self.weights = {id(parameter): name for name, parameter in network.named_parameters()}
        self.counted_as: Callable[..., AbstractContextManager[None]] = counter.product if counter else _not_counted
        self.calls, self.visit, self.points = calls, visit, points
        self.on_leftover, self.on_product = on_leftover, on_product

    @property
    def _call(self) -> _ModuleCall:
        return self.calls[-1] if self.calls else _ModuleCall("")

    def attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
        """Attention by explicit products of visited operands."""
        return self.attend_with_probabilities(query, key, value, mask, scale)[0]

    def attend_with_probabilities(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float
    ) -> tuple[Tensor, Tensor]:
        """The same, and the visited probabilities."""
        call = self._call
        suffix = str(call.products) if call.products else ""
        call.products += 1
        names = {kind: site_name(call.name, kind + suffix) for kind in ATTENTION}
        self.on_product(names[QUERY], Product(query, lambda other: attention_scores(other, key, scale)))
        self.on_product(names[KEY], Product(key, lambda other: attention_scores(query, other, scale)))
        query, key = self.visit(names[QUERY], QUERY, query), self.visit(names[KEY], KEY, key)
        value, float_value = self.visit(names[VALUE], VALUE, value), value
        change_scores = partial(self.visit, names[SCORES], SCORES) if SCORES in self.points else None
        with self.counted_as(names[KEY], names[QUERY], names[KEY]):
            probabilities = attention_probabilities(query, key, mask, scale, change_scores).to(value.dtype)
        self.on_product(names[VALUE], Product(float_value, lambda other: probabilities @ other))
        self.on_product(names[SOFTMAX], Product(probabilities, lambda other: other @ float_value))
        visited = self.visit(names[SOFTMAX], SOFTMAX, probabilities)
        with self.counted_as(names[VALUE], names[SOFTMAX], names[VALUE]):
            return visited @ value, visited

    def other(self, func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        """Any function but scaled dot-product attention."""
        if func in SOFTMAX_FUNCTIONS or func in PRODUCT_FUNCTIONS:
            args, kwargs = _positional(args, kwargs)
        if func in PRODUCTS_WITH_WEIGHT:
            return self._product_with_weight(func, *args, **kwargs)
        if func in PRODUCT_FUNCTIONS:
            return self._product_of_activations(func, args, kwargs)
        if func in OTHER_PRODUCTS:
            return self._left_over(func, *args, **kwargs)
        if self.points and (func in SUMS or func in SUMS_IN_PLACE):
            return self._sum(func, args, kwargs)
        if func in SOFTMAX_FUNCTIONS and SCORES in self.points and args:
            args = (self._visit_point(SCORES, args[0]), *args[1:])
        result = func(*args, **kwargs)
        if func in NORMS and LAYER_NORM in self.points:
            return _marked(self._visit_point(LAYER_NORM, result), LAYER_NORM)
        if func in MOVES and args:
            self._treat_alike(args[0], result)
        elif func in SOFTMAX_FUNCTIONS or func is F.gelu:
            _marked(result, SOFTMAX if func in SOFTMAX_FUNCTIONS else GELU)
        return result

    def _treat_alike(self, tensor: Any, moved: Any) -> None:
        """A moved tensor keeps the mark of the original and can be a skip if the original can."""
        if maker := maker_of(tensor):
            _marked(moved, maker)
        if self.points and self.calls and id(tensor) in self.calls[-1].skips:
            self.calls[-1].skips[id(moved)] = moved

    def _sum(self, func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        """A sum of two tensors; if one of them is a skip, the other one is a branch and the sum a residual sum."""
        skip_at = self._skip_position(args, kwargs)
        if skip_at is None:
            return func(*args, **kwargs)
        summands = list(args)
        if BRANCH in self.points:
            summands[1 - skip_at] = self._visit_point(BRANCH, args[1 - skip_at])
        total = func(*summands)
        if RESIDUAL in self.points:
            visited = self._visit_point(RESIDUAL, total)
            if func in SUMS_IN_PLACE and visited is not total:
                visited = total.copy_(visited)  # the network goes on with the tensor that it changed in place
            total = _marked(visited, RESIDUAL)
        self.calls[-1].skips[id(total)] = total
        return total

    def _skip_position(self, args: tuple, kwargs: dict[str, Any]) -> int | None:
        """Which of the summands of a residual sum is the skip, 0 or 1; ``None`` if it is no residual sum."""
        skips = self.calls[-1].skips if self.calls else {}
        skip_at = next((index for index, summand in enumerate(args[:2]) if id(summand) in skips), None)
        if skip_at is None or len(args) != 2 or kwargs or not _is_branch(args[1 - skip_at], args[skip_at]):
            return None
        return skip_at

    def _visit_point(self, kind: str, tensor: Tensor) -> Tensor:
        call = self._call
        call.points[kind] = (count := call.points.get(kind, 0)) + 1
        return self.visit(site_name(call.name, f"{kind}{count or ''}"), kind, tensor)

    def _product_with_weight(self, func: Any, input: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        name = self.weights.get(id(weight))
        if name is None:
            return self._product_with_rows(func, input, weight, *args, **kwargs)
        input_name = input_site(name)
        self.on_product(input_name, Product(input, lambda other: func(other, weight, *args, **kwargs)))
        channels = OUTPUT_CHANNELS.get(func)
        self.on_product(name, Product(weight, lambda other: func(input, other, *args, **kwargs), channels))
        visited = self.visit(input_name, INPUT, input), self.visit(name, WEIGHT, weight)
        with self.counted_as(name, input_name, name):
            return func(*visited, *args, **kwargs)

    def _product_with_rows(self, func: Any, input: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """A product with some rows of a weight: the whole weight is visited, and each input is a site of its own."""
        whole, rows = weight._base, _rows_of_base(weight)
        name = self.weights.get(id(whole))
        if name is None or whole is None or rows is None:
            return self._left_over(func, input, weight, *args, **kwargs)
        input_name = f"{input_site(name)}_rows{rows.start}"
        self.on_product(input_name, Product(input, lambda other: func(other, weight, *args, **kwargs)))
        visited = self.visit(input_name, INPUT, input), self.visit(name, WEIGHT, whole)[rows]
        with self.counted_as(name, input_name, name):
            return func(*visited, *args, **kwargs)

    def _product_of_activations(self, func: Any, args: tuple, kwargs: dict[str, Any]) -> Tensor:
        equation, operands = (args[:1], args[1:]) if func is torch.einsum else ((), args)
        if len(operands) != 2 or kwargs or any(id(operand) in self.weights for operand in operands):
            return self._left_over(func, *args, **kwargs)
        call = self._call
        name = site_name(call.name, f"{PRODUCT}{call.products}")
        call.products += 1
        left, right = operands
        self.on_product(f"{name}_left", Product(left, lambda other: func(*equation, other, right)))
        self.on_product(f"{name}_right", Product(right, lambda other: func(*equation, left, other)))
        visited = (
            self.visit(f"{name}_{side}", SOFTMAX if maker_of(operand) == SOFTMAX else PRODUCT, operand)
            for side, operand in zip(("left", "right"), operands, strict=True)
        )
        with self.counted_as(f"{name}_right", f"{name}_left", f"{name}_right"):
            return func(*equation, *visited)

    def _left_over(self, func: Any, *args: Any, **kwargs: Any) -> Any:
        """A product whose operands stay as they are."""
        call, what = self._call, getattr(func, "__name__", str(func)).strip("_")
        name = site_name(call.name, what + (str(call.leftovers) if call.leftovers else ""))
        call.leftovers += 1
        self.on_leftover(name, what)
        with self.counted_as(name):
            return func(*args, **kwargs)


@contextmanager
def _not_counted(*_: str) -> Iterator[None]:
    """What is counted without a counter: nothing."""
    yield


def _rows_of_base(weight: Tensor) -> slice | None:
    """Which rows of another tensor a tensor is a view of; ``None`` for any other view and for no view."""
    whole = weight._base
    if whole is None or whole.stride() != weight.stride() or whole.shape[1:] != weight.shape[1:] or not whole.stride(0):
        return None
    first, rest = divmod(int(weight.storage_offset() - whole.storage_offset()), whole.stride(0))
    return None if rest else slice(first, first + len(weight))


def _positional(args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """The arguments with the operands that were given by name in their places."""
    named = [name for name in ("input", "other", "mat2") if name in kwargs]
    return (*args, *(kwargs[name] for name in named)), {key: kwargs[key] for key in kwargs if key not in named}


def _is_branch(summand: Any, skip: Tensor) -> bool:
    """Whether a summand can be the branch of a residual sum: floating point, and the sum has the shape of the skip."""
    if not isinstance(summand, Tensor) or not (skip.is_floating_point() and summand.is_floating_point()):
        return False
    return summand.ndim > 1 and torch.broadcast_shapes(skip.shape, summand.shape) == skip.shape
