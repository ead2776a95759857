"""The exact solution of a small multiple-choice knapsack: one choice for each item, of least loss within a budget.

No dependency offers this: NumPy and PyTorch have no integer programming, and a package that has it (SciPy, OR-Tools)
would be one more to install for the forty lines below.
"""

import math
from collections.abc import Sequence

import numpy as np
from attrs import frozen


@frozen
class Choice:
    """One of the choices of an item.

    Args:
        cost: a whole number above 0.
        loss: number to be minimised; the losses of all items add up.
    """

    cost: int
    loss: float


def least_loss(items: Sequence[Sequence[Choice]], budget: int) -> list[int] | None:
    """The index of the choice of each item, of least total loss among those whose total cost is at most ``budget``.

    Dynamic programming: item by item, it keeps the pairs of total cost and total loss that no other pair beats in both.
    The result is exact. The time is at most proportional to the number of different costs within the budget times the
    number of all choices. Among equal losses the cheaper one is taken.

    Returns:
        ``None`` if even the cheapest choices exceed the budget.
    """
    cheapest = [min(choice.cost for choice in item) for item in items]
    left = budget - sum(cheapest)
    if left < 0:
        return None
    # costs above the cheapest choices, in multiples of their greatest common divisor
    costs, losses = np.zeros(1, dtype=np.int64), np.zeros(1)
    unit = math.gcd(*(choice.cost - base for item, base in zip(items, cheapest, strict=True) for choice in item)) or 1
    steps = []
    for item, base in zip(items, cheapest, strict=True):
        extra = np.array([(choice.cost - base) // unit for choice in item], dtype=np.int64)
        total = (costs[:, None] + extra).ravel()
        loss = (losses[:, None] + np.array([choice.loss for choice in item])).ravel()
        kept = _unbeaten(total, loss, left // unit)
        steps.append((kept // len(item), kept % len(item)))
        costs, losses = total[kept], loss[kept]
    return _traced_back(steps, len(costs) - 1)


def _unbeaten(cost: np.ndarray, loss: np.ndarray, budget: int) -> np.ndarray:
    """Indices, by rising cost, of the pairs within the budget whose loss is below that of all cheaper or equal ones."""
    order = np.lexsort((loss, cost))
    order = order[cost[order] <= budget]
    best = np.minimum.accumulate(loss[order])
    first = np.ones(len(order), dtype=bool)
    first[1:] = best[1:] < best[:-1]
    return order[first]


def _traced_back(steps: list[tuple[np.ndarray, np.ndarray]], last: int) -> list[int]:
    """The choices that led to pair ``last`` of the last item; a step holds each pair's parent and its choice."""
    chosen = []
    for parents, choices in reversed(steps):
        chosen.append(int(choices[last]))
        last = int(parents[last])
    return chosen[::-1]
