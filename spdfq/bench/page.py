"""The report of a bench: one HTML page like that of a run, from its rows and the files of its cells."""

import base64
from collections.abc import Callable
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from markupsafe import Markup

from spdfq.bench.groups import Group, deciding, over
from spdfq.bench.over_bits import over_bits
from spdfq.bench.plan import Plan
from spdfq.bench.rows import Row
from spdfq.bench.table import BOLD, caption, groups_of, table
from spdfq.errors import SpdfqError
from spdfq.recipe import shipped
from spdfq.recipe.describe import recipe_summary
from spdfq.report.explained import EXPLAINED_FILE, Explained
from spdfq.report.page import PAGE, duration, percent, style, templates
from spdfq.report.pictures import SHOWN, tiles_of
from spdfq.runtime.files import write_text

_PICTURES = 8


def write_page(folder: Path, plan: Plan, rows: list[Row]) -> Path:
    """Write ``report.html`` into the folder of a bench.

    Args:
        folder: of the bench, with the run folders of its cells as far as they are there.
        plan: of the bench.
        rows: of ``results.jsonl``.

    Returns:
        The path of the page.

    Raises:
        DataError: a file of a cell is damaged, or the page cannot be written.
    """
    path = folder / PAGE
    write_text(path, templates().get_template("bench.html").render(_content(folder, plan, rows)))
    return path


def _content(folder: Path, plan: Plan, rows: list[Row]) -> dict[str, Any]:
    """The values of the template's variables."""
    groups, shown = groups_of(plan, rows), table(plan, rows)
    done = [row for row in rows if row.error is None]
    finished = [group for group in groups if group.rows]
    names = Explained(_explanations(folder, rows))
    return {
        "style": style(),
        "names": names,
        "name": plan.name,
        "models": ", ".join(dict.fromkeys(row.model.name for row in done)),
        "full": _full(done),
        "best": [_best(group) for group, best in zip(groups, shown.best, strict=True) if best],
        "cells": f"{len(done)} of {len(plan.combinations) * len(plan.seeds)} cells finished",
        "strips_": _strips(finished, shown.best, groups, names),
        "differences": _differences(plan, groups, names),
        "baseline": plan.baseline.value if plan.baseline else "",
        "heat": _heat_map(plan, groups),
        "bits": over_bits(finished, names.name),
        "pictures": _pictures(folder, finished, names),
        "table_": shown,
        "runs": [_runs(folder, group) for group in groups],
        "caption": " ".join([caption(plan, rows), *([BOLD] if any(shown.best) else []), *shown.notes]),
        "failed": [f"{row.folder}: {row.error}" for row in rows if row.error is not None],
        "environment": _environment(done),
    }


def _explanations(folder: Path, rows: list[Row]) -> dict[str, str]:
    """What the shipped parts of recipes are, and the components of the cells."""
    found = {Path(name).stem: f"Recipe part {name}: {recipe_summary(name)}" for name in shipped() if "/" in name}
    for row in rows:
        if row.folder and (folder / row.folder / EXPLAINED_FILE).is_file():
            found = {**Explained.of(folder / row.folder).names, **found}
    return found


def _label(group: Group, names: Explained) -> Markup:
    return Markup(" / ").join(names.name(value) for value in group.axes.values()) or Markup("base")


def _full(done: list[Row]) -> str:
    """Top-1 in full precision; empty if it is not the same in all rows."""
    found = {row.measured.fp.top1 for row in done}
    return percent(one) if len(found) == 1 and (one := next(iter(found))) is not None else ""


def _best(group: Group) -> dict[str, str]:
    return {"label": group.label, "top1": percent(mean(group.top1())), "seeds": f"mean of {len(group.rows)} seeds"}


def _strips(finished: list[Group], best: list[bool], groups: list[Group], names: Explained) -> dict[str, Any]:
    """Mean and spread of each combination on one scale, with its full precision."""
    winners = [group for group, wins in zip(groups, best, strict=True) if wins]
    rows = []
    for group in finished:
        top1, full = group.top1(), [row.measured.fp.top1 for row in group.rows.values()]
        spread = stdev(top1) if len(top1) > 1 else 0.0
        known = [value for value in full if value is not None]
        rows.append((group, mean(top1), spread, mean(known) if known else None))
    ends = [value for _, middle, spread, full in rows for value in (middle - spread, middle + spread, full or middle)]
    return _scaled(
        [
            {
                "label": _label(group, names),
                "at": middle,
                "low": middle - spread,
                "high": middle + spread,
                "mark": full,
                "text": f"{middle:.2f}" + (f" ± {spread:.2f}" if len(group.rows) > 1 else ""),
                "own": group in winners,
            }
            for group, middle, spread, full in rows
        ],
        ends,
        "{:.0f} %",
    )


def _differences(plan: Plan, groups: list[Group], names: Explained) -> dict[str, Any]:
    """The difference of each combination to the baseline, with its interval; notes for those that have none."""
    rows: list[dict[str, Any]] = []
    baseline = plan.baseline
    for group in groups if baseline else ():
        try:
            found = over(groups, baseline, group) if baseline else None
        except SpdfqError:  # the table says why
            continue
        if found is not None:
            shown = {"at": found.mean, "low": found.low, "high": found.high, "mark": 0.0, "own": found.better}
            rows.append({"label": _label(group, names), "text": str(found), **shown})
    return _scaled(rows, [0.0, *(row[key] for row in rows for key in ("low", "high"))], "{:+.0f}")


def _scaled(rows: list[dict[str, Any]], ends: list[float], shown: str) -> dict[str, Any]:
    """Rows whose positions are shares of a common scale, in percent."""
    if not rows:
        return {}
    low, high = min(ends), max(ends)
    margin = 0.06 * (high - low) or 1.0
    low, high = low - margin, high + margin

    def place(value: float | None) -> str | None:
        return None if value is None else f"{100 * (value - low) / (high - low):.2f}"

    found = [
        {
            **row,
            "width": f"{100 * (row['high'] - row['low']) / (high - low):.2f}",
            **{key: place(row[key]) for key in ("at", "low", "mark")},
        }
        for row in rows
    ]
    return {"lines": found, "ends": (shown.format(low), shown.format(high))}


def _heat_map(plan: Plan, groups: list[Group]) -> dict[str, Any] | None:
    """Mean top-1 over two axes; ``None`` for a bench with another number of axes."""
    if len(plan.axes) != 2 or not any(group.rows for group in groups):
        return None
    down, across = ([choice.label for choice in axis.choices] for axis in plan.axes)
    first, second = (axis.name for axis in plan.axes)
    means = {(group.axes[first], group.axes[second]): mean(group.top1()) if group.rows else None for group in groups}
    known = [value for value in means.values() if value is not None]
    worst, best = min(known), max(known)

    def cell(value: float | None) -> dict[str, Any]:
        noisy = None if value is None else (best - value) / ((best - worst) or 1)
        return {"shown": "–" if value is None else f"{value:.1f}", "noisy": noisy}

    rows = [(label, [cell(means.get((label, other))) for other in across]) for label in down]
    return {"lines": rows, "across": across, "ends": (f"{best:.1f}", f"{worst:.1f}")}


def _pictures(folder: Path, finished: list[Group], names: Explained) -> list[dict[str, Any]]:
    """The first images of each kind of calibration images, from the cell of the first seed that is there."""
    axes = deciding(finished, _images)
    found: dict[Any, dict[str, Any]] = {}
    for group in finished:
        row = next(iter(group.rows.values()))
        sheet = folder / (row.folder or "") / "synthetic.png"
        if _images(group) in found or not (row.folder and row.images.count and sheet.is_file()):
            continue
        tiles = tiles_of(sheet, min(row.images.count, SHOWN))[:_PICTURES]
        values = [group.axes[axis] for axis in axes] or [row.images.type or group.label]
        found[_images(group)] = {
            "label": Markup(" / ").join(names.name(value) for value in values),
            "images": [base64.b64encode(tile).decode() for tile in tiles if tile],
        }
    return list(found.values())


def _images(group: Group) -> Any:
    row = next(iter(group.rows.values()))
    return row.model.name, row.images.digest


def _runs(folder: Path, group: Group) -> list[dict[str, str]]:
    """The reports of a combination's runs that are there, by seed; paths are relative to the page."""
    return [
        {"seed": str(seed), "path": f"{row.folder}/{PAGE}"}
        for seed, row in group.rows.items()
        if row.folder and (folder / row.folder / PAGE).is_file()
    ]


def _environment(done: list[Row]) -> dict[str, str]:
    """What the rows were measured with; several values where they differ."""

    def every(of: Callable[[Row], Any]) -> str:
        return "; ".join(dict.fromkeys(str(value) for row in done if (value := of(row)) not in (None, "")))

    values = {
        "Device": every(lambda row: row.device_name),
        "Precision": every(lambda row: row.precision),
        "Threads": every(lambda row: row.threads),
        "Versions": every(lambda row: ", ".join(f"{key} {each}" for key, each in (row.versions or {}).items())),
        "Commit": every(lambda row: (row.git_commit or "")[:12]),
        "Time": duration(sum(row.seconds or 0 for row in done)) if done else "",
    }
    return {name: value for name, value in values.items() if value}
