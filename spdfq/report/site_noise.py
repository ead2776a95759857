"""The noise of the quantized sites as a heat map over depth, with a histogram for each site, as the page shows it."""

import math
from collections.abc import Sequence
from typing import Any

from attrs import frozen
from markupsafe import Markup

NOISE_FILE = "site_noise.json"
_WIDTH, _HEIGHT, _FOOT = 320, 150, 34
_WEIGHT = "weight"


@frozen
class Cell:
    """A site in the heat map.

    Args:
        id: of its panel in the page.
        site: its name.
        shown: its signal-to-noise ratio in dB; a dash where it is not known.
        noisy: from 0 at the highest ratio among the blocks to 1 at the lowest; ``None`` where it is not known.
        about: kind, bits and ratio, in a sentence.
        histogram: an SVG of its values and levels.
        notes: sentences on what the histogram shows.
    """

    id: str
    site: str
    shown: str
    noisy: float | None
    about: str
    histogram: Markup
    notes: tuple[str, ...]


@frozen
class HeatMap:
    """Sites over depth.

    Args:
        images: number of images that the values are from.
        depths: headings of the columns: the numbers of the blocks.
        rows: for each place in a block its name, and a cell for each block, ``None`` where the block lacks it.
        others: sites outside the blocks.
        ends: highest and lowest ratio among the blocks, in dB.
        unknown: whether the ratio of a weight is not known.
    """

    images: int
    depths: list[str]
    rows: list[tuple[str, list[Cell | None]]]
    others: list[Cell]
    ends: tuple[float, float]
    unknown: bool

    @property
    def cells(self) -> list[Cell]:
        """All of them."""
        return [cell for _, row in self.rows for cell in row if cell] + self.others


def heat_map(found: dict[str, Any], diagnosis: dict[str, Any] | None) -> HeatMap | None:
    """The heat map of a ``site_noise.json``; ``None`` without sites.

    Args:
        found: the contents of the file.
        diagnosis: that of ``diagnosis.json``, whose ratios are preferred: it knows the float values of learned weights.

    Raises:
        KeyError: a value is missing.
    """
    sites, blocks = found["sites"], found["blocks"]
    if not sites:
        return None
    measured = {each["site"]: each["snr"] for each in diagnosis["values"]} if diagnosis else {}
    ratios = {site["site"]: measured.get(site["site"], site["snr"]) for site in sites}
    places = {site["site"]: _place(site["site"], blocks) for site in sites}
    inside = [ratios[name] for name, place in places.items() if place and ratios[name] is not None]
    known = inside or [ratio for ratio in ratios.values() if ratio is not None] or [0.0]
    best, worst = max(known), min(known)
    rows: dict[str, list[Cell | None]] = {}
    others = []
    for index, site in enumerate(sites):
        cell = _cell(f"site{index}", site, ratios[site["site"]], best, worst)
        if place := places[site["site"]]:
            rows.setdefault(place[1], [None] * len(blocks))[place[0]] = cell
        else:
            others.append(cell)
    unknown = any(site["kind"] == _WEIGHT and ratios[site["site"]] is None for site in sites)
    return HeatMap(found["images"], _depths(blocks), list(rows.items()), others, (best, worst), unknown)


def _place(site: str, blocks: Sequence[str]) -> tuple[int, str] | None:
    """The index of a site's block, and its name inside; ``None`` outside the blocks."""
    return next(((at, site[len(block) + 1 :]) for at, block in enumerate(blocks) if site.startswith(f"{block}.")), None)


def _depths(blocks: Sequence[str]) -> list[str]:
    """The numbers in the names of the blocks: ``3`` for ``blocks.3``, ``1.0`` for ``layers.1.blocks.0``."""
    return [
        ".".join(part.rpartition("_")[2] for part in block.split(".") if part.rpartition("_")[2].isdigit()) or block
        for block in blocks
    ]


def _cell(id: str, site: dict[str, Any], ratio: float | None, best: float, worst: float) -> Cell:
    noisy = None if ratio is None else min(1.0, max(0.0, (best - ratio) / ((best - worst) or 1)))
    known = "signal-to-noise ratio not known" if ratio is None else f"{ratio:.1f} dB"
    about = f"{site['kind']}, {site['bits']} bits, {known}"
    return Cell(
        id, site["site"], "–" if ratio is None else f"{ratio:.0f}", noisy, about, _histogram(site), _notes(site)
    )


def _notes(site: dict[str, Any]) -> tuple[str, ...]:
    outer = site["counts"][0] + site["counts"][-1]
    beyond = f"; {outer:,} of {sum(site['counts']):,} values lie in or beyond the outermost bins" if outer else ""
    scale = "Each channel has its own range, shown from 0 to 1." if site["relative"] else ""
    levels = "Lines: the levels of the quantizer." if site["levels"] else "The levels are too many to be drawn."
    lines = (scale, f"Bars: number of values, on a logarithmic scale{beyond}.", levels)
    return tuple(line for line in lines if line)


def _histogram(site: dict[str, Any]) -> Markup:
    """Bars for the values, and a line for each level of the quantizer."""
    counts, low, high = site["counts"], site["low"], site["high"]
    most, step = math.log1p(max(counts)) or 1, _WIDTH / len(counts)
    foot, heights = _HEIGHT - _FOOT, [math.log1p(count) for count in counts]
    bars = "".join(
        f"M{index * step:.1f} {foot}V{foot - (foot - 4) * height / most:.1f}h{step - 0.8:.1f}V{foot}z"
        for index, height in enumerate(heights)
        if height
    )

    def place(value: float) -> float:
        return (value - low) / (high - low) * _WIDTH

    ticks = "".join(f"M{place(level):.1f} 0V{foot + 5}" for level in site["levels"] or ())
    middle, ends = (low + high) / 2, (low, high)
    texts = "".join(
        f'<text x="{x}" y="{_HEIGHT - 12}" text-anchor="{anchor}">{value:.3g}</text>'
        for x, anchor, value in ((0, "start", ends[0]), (_WIDTH / 2, "middle", middle), (_WIDTH, "end", ends[1]))
    )
    return Markup(
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="Histogram of the values">'
        f'<path class="bars" d="{bars}"/><path class="levels" d="{ticks}"/>'
        f'<line class="grid" x1="0" x2="{_WIDTH}" y1="{foot}" y2="{foot}"/>{texts}</svg>'
    )
