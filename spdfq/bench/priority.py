"""Which cells of a bench run first."""

from collections.abc import Sequence
from typing import Any

SEED = "seed"


def priority(first: Sequence[dict[str, Any]], values: dict[str, Any], seed: int) -> int:
    """The position of the first pattern that a cell matches, or their number.

    Args:
        first: patterns, each a value for some axes or for ``seed``.
        values: the cell's value of each axis.
        seed: of the cell.
    """
    own = {**values, SEED: seed}
    return next((index for index, pattern in enumerate(first) if pattern.items() <= own.items()), len(first))


def check_first(first: Sequence[Any], values: dict[str, list[Any]], seeds: Sequence[int], problems: list[str]) -> None:
    """Add a problem for each pattern that no cell can match.

    Args:
        first: as in `priority`.
        values: the values of each axis.
        seeds: of the bench.
        problems: where lines are added.
    """
    known = {**values, SEED: list(seeds)}
    for index, pattern in enumerate(first):
        if not isinstance(pattern, dict) or not pattern:
            problems.append(f"first.{index}: expected a value of an axis, for example {{ seed = 0 }}")
            continue
        for axis, value in pattern.items():
            if axis not in known:
                problems.append(f"first.{index}: this file has no axis {axis!r} (axes: {', '.join(known)})")
            elif value not in known[axis]:
                shown = ", ".join(map(str, known[axis]))
                problems.append(f"first.{index}: {value!r} is not a value of {axis} (values: {shown})")
