"""How long the cells of a bench will take, from the rows that are there."""

from collections.abc import Iterable
from statistics import mean
from typing import Any


def seconds_of(axes: dict[str, Any], rows: Iterable[dict[str, Any]]) -> float | None:
    """The seconds that a cell will take at most: the mean over the finished rows with the most equal values of axes.

    A stage that a row reused counts with the seconds of the rows that computed it.

    Args:
        axes: the cell's value of each axis.
        rows: as plain data.

    Returns:
        ``None`` without finished rows.
    """
    done = [row for row in rows if row.get("error") is None and row.get("stages")]
    if not done:
        return None
    return sum(_stage_seconds(name, axes, done) for name in done[0]["stages"])


def _stage_seconds(name: str, axes: dict[str, Any], rows: list[dict[str, Any]]) -> float:
    computed = [row for row in rows if name in row["stages"] and not row["stages"][name]["reused"]]
    if not computed:
        return 0.0
    alike = [sum(row["axes"].get(axis) == value for axis, value in axes.items()) for row in computed]
    nearest = [row for row, equal in zip(computed, alike, strict=True) if equal == max(alike)]
    return mean(row["stages"][name]["seconds"] for row in nearest)
