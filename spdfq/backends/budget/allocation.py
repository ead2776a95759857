"""Mixed precision: gives each site a bit-width within a budget, so that the output changes least."""

from collections import Counter
from collections.abc import Iterable
from fractions import Fraction
from itertools import product
from math import ceil, floor, prod
from pathlib import Path

import torch
from attrs import frozen
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from spdfq.backends.base import Calibration
from spdfq.backends.budget.knapsack import Choice, least_loss
from spdfq.backends.budget.sensitivity import Sensitivity, measured_sensitivity
from spdfq.errors import RecipeError
from spdfq.quantized.model import QuantizedModel
from spdfq.quantized.place import override_bits, place
from spdfq.quantized.sites import KEY, PRODUCT, QUERY, SOFTMAX, VALUE, WEIGHT, Site, input_site
from spdfq.quantized.visiting import unchanged
from spdfq.quantizers import Product
from spdfq.recipe import Budget, Quantization
from spdfq.runtime import Runtime
from spdfq.teacher import Teacher


def bits_within(
    budget: Budget, teacher: Teacher, images: Tensor, spec: Quantization, runtime: Runtime, folder: Path | None = None
) -> dict[str, int]:
    """The bits of every site that has a choice, of least total sensitivity within the budget.

    The sensitivity of a site is measured with that site alone quantized; the sensitivities of all sites are assumed to
    add up.

    Args:
        budget: the recipe's.
        teacher: the float model.
        images: ``[n, C, H, W]``, normalised.
        spec: the recipe's quantization section; its last ``calibrate`` steps say how ranges are chosen.
        runtime: progress.
        folder: where measurements are stored, so that a killed run can continue.

    Raises:
        RecipeError: the budget cannot be reached.
        NonFiniteError: the output is not finite.
        DataError: the folder holds the measurements of other work.
    """
    placed = place(teacher, spec)
    fixed = override_bits(teacher, spec, placed.sites)
    items = check_budget(placed, budget, fixed, images[:1])
    sites = [site for item in items for site in item.sites if site not in fixed]
    calibration = Calibration(teacher=teacher, images=images, runtime=runtime, folder=folder)
    return allocated(items, budget, fixed, measured_sensitivity(sites, spec, budget, calibration))


@frozen
class Item:
    """What a budget counts: a weight, or a product of two sites.

    Args:
        sites: its one or two sites.
        size: how many times the bits of the weight, or the product of the bits of the two sites, are counted.
    """

    sites: tuple[str, ...]
    size: int


def budget_items(model: QuantizedModel, budget: Budget, example: Tensor) -> list[Item]:
    """What the budget counts: every quantized weight, or every product of two quantized sites.

    Args:
        model: placed.
        budget: of ``weights`` or ``operations``.
        example: one image ``[1, C, H, W]``.

    Raises:
        RecipeError: the budget is of operations, and the placement quantizes the input of a layer at an earlier site.
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
    return [Item(pair, sizes[pair[0]]) for pair in _product_pairs(model.sites) if set(pair) <= model.quantizers.keys()]


def _product_pairs(sites: dict[str, Site]) -> Iterable[tuple[str, str]]:
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
    """The number of multiplications that each operand takes part in, for one image."""
    found: Counter[str] = Counter()

    def count(name: str, product: Product) -> None:
        with FlopCounterMode(display=False) as counter:
            product.output(product.operand)
        found[name] += counter.get_total_flops() // 2  # it counts a multiplication and an addition

    with model.visiting(unchanged, count):
        model.network(example)
    return found


def least_cost(items: list[Item], budget: Budget, fixed: dict[str, int]) -> int:
    """The least cost of the items, in bits or bit operations; ``fixed`` sites keep their bits."""
    smallest = min(budget.choices)
    return sum(item.size * prod(fixed.get(site, smallest) for site in item.sites) for item in items)


def check_budget(model: QuantizedModel, budget: Budget, fixed: dict[str, int], example: Tensor) -> list[Item]:
    """What the budget counts, after a check that the budget can be reached.

    Raises:
        RecipeError: no site has a choice, or the budget cannot be reached.
    """
    items = budget_items(model, budget, example)
    key = "weights" if budget.weights is not None else "operations"
    if not any(site not in fixed for item in items for site in item.sites):
        raise RecipeError([f"quantization.budget: every site that {key} counts is in float or has bits of its own"])
    if _allowed_cost(items, budget) < (low := least_cost(items, budget, fixed)):
        lowest = ceil(Fraction(1000 * low, _total_size(items))) / 1000
        raise RecipeError([f"quantization.budget.{key}: {_limit(budget)} cannot be reached; the least is {lowest:.3f}"])
    return items


def _limit(budget: Budget) -> float:
    value = budget.weights if budget.weights is not None else budget.operations
    return float(value or 0.0)


def _total_size(items: list[Item]) -> int:
    return sum(item.size for item in items)


def _allowed_cost(items: list[Item], budget: Budget) -> int:
    """The largest total cost within the budget, a whole number.

    The budget counts as the decimal number that is written in the recipe, not as the binary fraction next to it.
    """
    # a tolerance of a millionth of a bit, so that a cost printed with 16 digits fits into a budget of that number
    return floor(Fraction(str(_limit(budget))) * _total_size(items) + Fraction(1, 10**6))


def allocated(items: list[Item], budget: Budget, fixed: dict[str, int], sensitivity: Sensitivity) -> dict[str, int]:
    """The bits of the sites that are not ``fixed``, of least total sensitivity within the budget."""
    options = [list(product(*(_choices(site, budget, fixed) for site in item.sites))) for item in items]
    choices = [
        [
            Choice(
                item.size * prod(bits), sum(sensitivity.get(pair, 0.0) for pair in zip(item.sites, bits, strict=True))
            )
            for bits in widths
        ]
        for item, widths in zip(items, options, strict=True)
    ]
    largest = sum(max(choice.cost for choice in item) for item in choices)
    chosen = least_loss(choices, min(_allowed_cost(items, budget), largest))
    assert chosen is not None  # check_budget has made sure of it
    found = {
        site: bits
        for item, widths, index in zip(items, options, chosen, strict=True)
        for site, bits in zip(item.sites, widths[index], strict=True)
    }
    return {site: bits for site, bits in found.items() if site not in fixed}


def _choices(site: str, budget: Budget, fixed: dict[str, int]) -> tuple[int, ...]:
    return (fixed[site],) if site in fixed else budget.choices
