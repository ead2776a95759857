"""Accuracy over bits as an SVG: a line for each combination of the other settings."""

import re
from collections.abc import Callable
from statistics import mean, stdev
from typing import Any

from markupsafe import Markup, escape

from spdfq.bench.groups import Group, deciding

_LABEL = re.compile(r"W(\d+)A(\d+)")
_WIDTH, _HEIGHT = 640, 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 44, 20, 12, 34
COLOURS = 8


def over_bits(groups: list[Group], named: Callable[[object], Markup]) -> Markup:
    """A plot of the mean top-1 over the bits; empty unless two rows differ in them alone.

    Args:
        groups: finished rows, by combination.
        named: marks up a value of an axis.
    """
    lines = _lines(groups)
    labels = sorted({label for line in lines.values() for label in line}, key=_bits)
    if len(labels) < 2 or all(len(line) < 2 for line in lines.values()):
        return Markup()
    every = [
        value for line in lines.values() for top1, spread in line.values() for value in (top1 - spread, top1 + spread)
    ]
    full = [row.measured.fp.top1 for group in groups for row in group.rows.values() if row.measured.fp.top1 is not None]
    low, high = min(every), max(every + full)
    step = next(step for step in (1, 2, 5, 10, 20, 50) if (high - low) / step <= 6)
    low, high = step * (low // step), step * -(-high // step)

    def y(value: float) -> float:
        return _TOP + (high - value) / ((high - low) or 1) * (_HEIGHT - _TOP - _BOTTOM)

    def x(label: str) -> float:
        return _LEFT + (labels.index(label) + 0.5) / len(labels) * (_WIDTH - _LEFT - _RIGHT)

    ticks = [low + step * index for index in range(round((high - low) / step) + 1)]
    drawn = [
        *(
            f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y(tick):.1f}" y2="{y(tick):.1f}"/>'
            f'<text x="{_LEFT - 8}" y="{y(tick) + 4:.1f}" text-anchor="end">{tick:g}</text>'
            for tick in ticks
        ),
        *(
            f'<text x="{x(label):.1f}" y="{_HEIGHT - 8}" text-anchor="middle">{escape(label)}</text>'
            for label in labels
        ),
    ]
    if full and max(full) - min(full) < 0.005:
        drawn.append(
            f'<line class="full" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y(full[0]):.1f}" y2="{y(full[0]):.1f}"/>'
        )
    for index, line in enumerate(lines.values()):
        points = [(x(label), *line[label]) for label in labels if label in line]
        drawn.append(_drawn(index, [(at, y(top1), y(top1 + spread), y(top1 - spread)) for at, top1, spread in points]))
    told = "; ".join(_told(values, line, labels) for values, line in lines.items())
    legend = "".join(_legend(index, values, named) for index, values in enumerate(lines))
    return Markup(
        f'<svg class="over-bits" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(told)}">'
        f'{"".join(drawn)}</svg><p class="legend">{legend}</p>'
    )


def _lines(groups: list[Group]) -> dict[tuple[Any, ...], dict[str, tuple[float, float]]]:
    """For each combination of the other settings the mean and deviation of the top-1 by the label of the bits."""
    axes = deciding(groups, _label)
    found: dict[tuple[Any, ...], dict[str, tuple[float, float]]] = {}
    for group in groups:
        if label := _label(group):
            rest = tuple(value for axis, value in group.axes.items() if axis not in axes)
            top1 = group.top1()
            found.setdefault(rest, {})[label] = mean(top1), stdev(top1) if len(top1) > 1 else 0.0
    return found


def _label(group: Group) -> str | None:
    return next(iter(group.rows.values())).backend.label


def _bits(label: str) -> tuple[int, ...]:
    found = _LABEL.match(label)
    return tuple(map(int, found.groups())) if found else ()


def _drawn(index: int, points: list[tuple[float, ...]]) -> str:
    """A line through the means ``x, y, high, low``, with a whisker at each."""
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y, _, _ in points)
    whiskers = "".join(
        f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{high:.1f}" y2="{low:.1f}"/>' for x, _, high, low in points
    )
    dots = "".join(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5"/>' for x, y, _, _ in points)
    return f'<g class="series c{index % COLOURS}"><polyline points="{path}"/>{whiskers}{dots}</g>'


def _legend(index: int, values: tuple[Any, ...], named: Callable[[object], Markup]) -> Markup:
    shown = Markup(" / ").join(map(named, values)) or Markup("top-1")
    return Markup('<span><span class="key c{}"></span>{}</span>').format(index % COLOURS, shown)


def _told(values: tuple[Any, ...], line: dict[str, tuple[float, float]], labels: list[str]) -> str:
    points = ", ".join(f"{label} {line[label][0]:.1f} %" for label in labels if label in line)
    return f"{' / '.join(map(str, values)) or 'top-1'}: {points}"
