"""Mixed precision: a bit-width for each site, within a budget, by what its quantization does to the output."""

from collections import Counter
from collections.abc import Iterable
from fractions import Fraction
from itertools import product
from math import ceil, floor, prod

import torch
from attrs import frozen
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from spdfq.backends.budget.knapsack import Choice, least_loss
from spdfq.errors import RecipeError
from spdfq.quantized.model import QuantizedModel, Site
from spdfq.quantized.products import KEY, PRODUCT, QUERY, SOFTMAX, VALUE, WEIGHT, input_site
from spdfq.quantizers import Product
from spdfq.recipe import Budget

Sensitivity = dict[tuple[str, int], float]
"""What quantizing one site alone, to so many bits, does to the output."""


@frozen
class Item:
    """A product of two sites, or a weight.

    Args:
        sites: its one or two sites.
        size: how often its bits, or the product of them, count.
    """

    sites: tuple[str, ...]
    size: int


def items(model: QuantizedModel, budget: Budget, example: Tensor) -> list[Item]:
    """What the budget counts: every quantized weight, or every product of two quantized sites.

    Args:
        model: with its quantizers placed.
        budget: of ``weights`` or ``operations``.
        example: one image ``[1, C, H, W]``.

    Raises:
        RecipeError: operations are counted, and the placement quantizes what a layer multiplies at another site.
    """
    if budget.weights is not None:
        return [Item((name,), prod(model.sites[name].shape)) for name in model.weight_names()]
    if missing := [name for name in model.weight_names() if input_site(name) not in model.sites]:
        raise RecipeError(
            [
                f"quantization.budget.operations: what {missing[0]} multiplies is quantized elsewhere under this "
                "placement; set quantization.placement = 'matmul_inputs', or give a budget of weights"
            ]
        )
    sizes = _multiplications(model, example)
    return [Item(pair, sizes[pair[0]]) for pair in _multiplied(model.sites) if set(pair) <= model.quantizers.keys()]


def _multiplied(sites: dict[str, Site]) -> Iterable[tuple[str, str]]:
    """The two sites of each product."""
    for name, site in sites.items():
        owner, _, leaf = name.rpartition(".")
        dot = f"{owner}." if owner else ""
        if site.kind == WEIGHT:
            yield input_site(name), name
        elif site.kind == QUERY:
            yield name, dot + leaf.replace(QUERY, KEY, 1)
        elif site.kind == SOFTMAX and leaf.startswith(SOFTMAX):
            yield name, dot + leaf.replace(SOFTMAX, VALUE, 1)
        elif leaf.startswith(PRODUCT) and leaf.endswith("_left"):
            yield name, f"{name.removesuffix('left')}right"


@torch.no_grad()
def _multiplications(model: QuantizedModel, example: Tensor) -> Counter[str]:
    """How many numbers one image has multiplied at each site that goes into a product."""
    found: Counter[str] = Counter()

    def count(name: str, product: Product) -> None:
        with FlopCounterMode(display=False) as counter:
            product.output(product.operand)
        found[name] += counter.get_total_flops() // 2  # a multiplication and an addition

    with model.visiting(lambda _, __, tensor: tensor, count):
        model.network(example)
    return found


def least_cost(items: list[Item], budget: Budget, fixed: dict[str, int]) -> int:
    """What the items cost at least, in bits or bit operations; ``fixed`` sites have their bits."""
    smallest = min(budget.choices)
    return sum(item.size * prod(fixed.get(site, smallest) for site in item.sites) for item in items)


def check_budget(model: QuantizedModel, budget: Budget, fixed: dict[str, int], example: Tensor) -> list[Item]:
    """What the budget counts.

    Raises:
        RecipeError: nothing can be chosen, or the budget cannot be reached.
    """
    found = items(model, budget, example)
    key = "weights" if budget.weights is not None else "operations"
    if not any(site not in fixed for item in found for site in item.sites):
        raise RecipeError([f"quantization.budget: every site that {key} counts is in float or has bits of its own"])
    if _allowed(found, budget) < (low := least_cost(found, budget, fixed)):
        lowest = ceil(Fraction(1000 * low, _total(found))) / 1000
        raise RecipeError([f"quantization.budget.{key}: {_limit(budget)} cannot be reached; the least is {lowest:.3f}"])
    return found


def _limit(budget: Budget) -> float:
    value = budget.weights if budget.weights is not None else budget.operations
    return float(value or 0.0)


def _total(items: list[Item]) -> int:
    return sum(item.size for item in items)


def _allowed(items: list[Item], budget: Budget) -> int:
    """What the items may cost, a whole number: of the budget as it is written, not as a binary fraction next to it."""
    # a millionth of a bit: a budget printed with 16 digits from a cost is met by that cost
    return floor(Fraction(str(_limit(budget))) * _total(items) + Fraction(1, 10**6))


def allocated(items: list[Item], budget: Budget, fixed: dict[str, int], sensitivity: Sensitivity) -> dict[str, int]:
    """Bits of the sites that are not ``fixed``, of least total sensitivity within the budget."""
    options = [list(product(*(_widths(site, budget, fixed) for site in item.sites))) for item in items]
    choices = [
        [
            Choice(
                item.size * prod(bits), sum(sensitivity.get(pair, 0.0) for pair in zip(item.sites, bits, strict=True))
            )
            for bits in widths
        ]
        for item, widths in zip(items, options, strict=True)
    ]
    dearest = sum(max(choice.cost for choice in item) for item in choices)
    chosen = least_loss(choices, min(_allowed(items, budget), dearest))
    assert chosen is not None  # check_budget has seen to it
    found = {
        site: bits
        for item, widths, index in zip(items, options, chosen, strict=True)
        for site, bits in zip(item.sites, widths[index], strict=True)
    }
    return {site: bits for site, bits in found.items() if site not in fixed}


def _widths(site: str, budget: Budget, fixed: dict[str, int]) -> tuple[int, ...]:
    return (fixed[site],) if site in fixed else budget.choices
