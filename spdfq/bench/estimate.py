"""How long the cells of a bench will take, from the rows that are there."""

from collections.abc import Iterable
from statistics import mean
from typing import Any

from spdfq.bench.rows import Row


def seconds_of(axes: dict[str, Any], rows: Iterable[Row]) -> float | None:
    """The seconds that a cell will take at most: the mean over the finished rows with the most equal values of axes.

    A stage that a row reused counts with the seconds of the rows that computed it.

    Args:
        axes: the cell's value of each axis.
        rows: of the bench.

    Returns:
        ``None`` without finished rows.
    """
    done = [(row, row.stages) for row in rows if row.error is None and row.stages]
    if not done:
        return None
    return sum(_stage_seconds(name, axes, done) for name in done[0][1])


def _stage_seconds(name: str, axes: dict[str, Any], rows: list[tuple[Row, dict[str, Any]]]) -> float:
    computed = [(row, stages[name]) for row, stages in rows if name in stages and not stages[name]["reused"]]
    if not computed:
        return 0.0
    alike = [sum(row.axes.get(axis) == value for axis, value in axes.items()) for row, _ in computed]
    return mean(stage["seconds"] for (_, stage), equal in zip(computed, alike, strict=True) if equal == max(alike))
