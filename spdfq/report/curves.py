"""Loss curves as inline SVG, read from a run's ``losses.csv``.

The SVG is formatted here and not in a template, because nearly all of it is computed coordinates.
"""

import csv
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup, escape

from spdfq.errors import reading

Array = np.ndarray[Any, Any]

_POINTS = 160
_LOG_ABOVE = 20.0
_WIDTH, _HEIGHT = 270, 154
_LEFT, _RIGHT, _TOP, _BOTTOM = 42, 13, 10, 38


def curves(path: Path, named: Callable[[str], Markup] = escape) -> Markup:
    """A panel for each column of a ``losses.csv``, and a legend; empty without the file or without values.

    Args:
        path: of the file.
        named: marks up the name of a column.

    Raises:
        DataError: the file is damaged.
    """
    if not path.is_file():
        return Markup()
    with reading(path):
        names, values = _read(path)
        groups, iterations = values.shape[:2]
        if not values.size:
            return Markup()
        panels = [_panel(name, named(name), values[..., index]) for index, name in enumerate(names)]
    # the names are escaped
    return Markup(f'<div class="panels">{"".join(panels)}</div>{_legend(groups, iterations)}')


def _read(path: Path) -> tuple[list[str], Array]:
    """The names of the columns, and their values ``[groups, iterations, columns]``."""
    with open(path, newline="", encoding="utf-8") as handle:
        rows = csv.reader(handle)
        names = next(rows, [])[2:]
        lines = list(rows)
    groups = len({line[0] for line in lines}) or 1
    values = np.array([line[2:] for line in lines], dtype=float)
    if not np.isfinite(values).all():
        raise ValueError("a value is not finite")
    return names, values.reshape(groups, len(lines) // groups, len(names))


def _panel(name: str, shown: Markup, values: Array) -> str:
    """One column ``[groups, iterations]``: a line for the mean over groups, a band from the lowest to the highest."""
    iterations = values.shape[1]
    edges = np.linspace(0, iterations, min(iterations, _POINTS) + 1).astype(int)[:-1]
    low = np.minimum.reduceat(values.min(0), edges)
    high = np.maximum.reduceat(values.max(0), edges)
    counts = np.diff([*edges, iterations])
    mean = np.add.reduceat(values.mean(0), edges) / counts
    x = _LEFT + (edges + counts / 2) / iterations * (_WIDTH - _LEFT - _RIGHT)
    axis = _Axis(float(low.min()), float(high.max()))
    band = [*zip(x, axis.place(high), strict=True), *zip(x[::-1], axis.place(low)[::-1], strict=True)]
    drawn = [
        *(_level(axis, tick) for tick in axis.ticks),
        *(_mark(tick, iterations) for tick in _marks(iterations)),
        f'<polygon class="band" points="{_points(band)}"/>',
        f'<polyline class="line" points="{_points(zip(x, axis.place(mean), strict=True))}"/>',
        f'<text x="{_WIDTH - _RIGHT}" y="{_HEIGHT - 3}" text-anchor="end">iteration</text>',
    ]
    told = f"{name}: {mean[0]:.3g} at the start, {mean[-1]:.3g} at the end of {iterations} iterations"
    svg = f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(told)}">{"".join(drawn)}</svg>'
    return f'<div><p class="name">{shown}{" (log scale)" if axis.log else ""}</p>{svg}</div>'


class _Axis:
    """The vertical axis: logarithmic if all values are positive and spread widely."""

    def __init__(self, low: float, high: float) -> None:
        self.log = low > 0 and high / low > _LOG_ABOVE
        if high - low <= 1e-9 * abs(high):
            low, high = low - (abs(low) or 1) / 2, high + (abs(high) or 1) / 2
        self.ticks = _decades(low, high) if self.log else _steps(low, high)
        self.low, self.high = (min(low, self.ticks[0]), max(high, self.ticks[-1]))

    def place(self, values: Any) -> Array:
        """Vertical positions of values."""
        scale = np.log10 if self.log else np.asarray
        low, high = scale(self.low), scale(self.high)
        share = (scale(np.asarray(values, dtype=float)) - low) / (high - low)
        return _HEIGHT - _BOTTOM - share * (_HEIGHT - _TOP - _BOTTOM)


def _steps(low: float, high: float) -> list[float]:
    """A few round values in a range."""
    rough = (high - low) / 4
    magnitude = 10.0 ** math.floor(math.log10(rough))
    step = magnitude * min((1, 2, 5, 10), key=lambda factor: abs(math.log(rough / magnitude / factor)))
    return [step * index for index in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _decades(low: float, high: float) -> list[float]:
    """Powers of ten; also 2 and 5 times each power if the range has few decades."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    stride = max(1, len(decades) // 5)
    factors = (1, 2, 5) if math.log10(high / low) < 2 else (1,)
    ticks = [factor * 10.0**decade for decade in decades[::stride] for factor in factors]
    return [tick for tick in ticks if low <= tick <= high]


def _marks(iterations: int) -> list[int]:
    return [int(tick) for tick in _steps(0, iterations) if tick == int(tick)]


def _level(axis: _Axis, tick: float) -> str:
    y = float(axis.place(tick))
    line = f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
    return f'{line}<text x="{_LEFT - 6}" y="{y + 3.5:.1f}" text-anchor="end">{_short(tick)}</text>'


def _mark(tick: int, iterations: int) -> str:
    x = _LEFT + tick / iterations * (_WIDTH - _LEFT - _RIGHT)
    return f'<text x="{x:.1f}" y="{_HEIGHT - _BOTTOM + 16}" text-anchor="middle">{tick}</text>'


def _short(value: float) -> str:
    """A short form of a number, usually at most five characters: ``0.05``, ``2k``, ``1e-4``."""
    size = abs(value)
    if size >= 1e6 or 0 < size < 1e-3:
        mantissa, exponent = f"{value:.2e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    return f"{value / 1000:.4g}k" if size >= 1e4 else f"{value:.4g}"


def _points(pairs: Iterable[tuple[float, float]]) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in pairs)


def _legend(groups: int, iterations: int) -> str:
    neighbours = -(-iterations // _POINTS)
    over = [f"{groups} groups"] * (groups > 1) + [f"up to {neighbours} neighbouring iterations"] * (neighbours > 1)
    line = '<span class="key line"></span>' + ("mean" if over else "value of each iteration")
    band = f'<span class="key band"></span>lowest to highest over {" and ".join(over)}' if over else ""
    return f'<p class="legend"><span>{line}</span>{f"<span>{band}</span>" if band else ""}</p>'
