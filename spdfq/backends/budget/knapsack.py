"""One choice for each item, of least loss within a budget: solved exactly."""

import math
from collections.abc import Sequence

import numpy as np
from attrs import frozen


@frozen
class Choice:
    """What an item may be.

    Args:
        cost: a whole number above 0.
        loss: what is to be kept small; losses of items add up.
    """

    cost: int
    loss: float


def least_loss(items: Sequence[Sequence[Choice]], budget: int) -> list[int] | None:
    """The position of the choice of each item, of least total loss among those that cost ``budget`` at most.

    Dynamic programming over the pairs of cost and loss that no other pair beats in both: exact, and no slower than the
    number of different costs within the budget times that of all choices. Among equals the cheaper one is taken.

    Returns:
        ``None`` where even the cheapest choices exceed the budget.
    """
    cheapest = [min(choice.cost for choice in item) for item in items]
    left = budget - sum(cheapest)
    if left < 0:
        return None
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
    return _traced(steps, len(costs) - 1)


def _unbeaten(cost: np.ndarray, loss: np.ndarray, budget: int) -> np.ndarray:
    """Positions, by rising cost, of the pairs within the budget that no cheaper or equal one beats."""
    order = np.lexsort((loss, cost))
    order = order[cost[order] <= budget]
    best = np.minimum.accumulate(loss[order])
    first = np.ones(len(order), dtype=bool)
    first[1:] = best[1:] < best[:-1]
    return order[first]


def _traced(steps: list[tuple[np.ndarray, np.ndarray]], last: int) -> list[int]:
    chosen = []
    for parents, choices in reversed(steps):
        chosen.append(int(choices[last]))
        last = int(parents[last])
    return chosen[::-1]
