"""The leaderboard: one self-contained HTML page of all rows, that sorts and filters without a network.

python docs/generate.py writes it to docs/leaderboard.html.
"""

import json
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import jinja2
from result_rows import RESULTS
from results_page import IMAGES, machine_of

from spdfq.bench.groups import Group, difference
from spdfq.bench.intervals import Difference
from spdfq.bench.rows import Row, read_rows

HERE = Path(__file__).parent
PAGE = HERE / "leaderboard.html"
TEMPLATE = HERE / "leaderboard.template.html"
NOISE = "gaussian_noise"
# heading, key of the data, whether it is a number
COLUMNS = (
    ("model", "model", False),
    ("images", "images", False),
    ("back-end", "backend", False),
    ("bits", "bits", False),
    ("top-1", "top1", True),
    ("±", "spread", True),
    ("seeds", "seeds", True),
    ("drop", "drop", True),
    ("over noise", "over", True),
    ("agreement", "agreement", True),
    ("test images", "tested", True),
    ("seconds", "seconds", True),
    ("how", "how", False),
    ("machine", "machine", False),
    ("commit", "commit", False),
    ("file", "file", False),
)


def leaderboard_page() -> str:
    """The whole page."""
    lines = [line for path in sorted(RESULTS.glob("*.jsonl")) for line in _lines(path)]
    lines.sort(key=lambda line: (line["model"], line["bits"], -line["top1"]))
    data = json.dumps(lines, ensure_ascii=False, separators=(",", ":")).replace("</", "<\\/")
    environment = jinja2.Environment(autoescape=True, keep_trailing_newline=True)
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    rows = sum(len(line["all"]) for line in lines)
    return template.render(data=data, columns=COLUMNS, lines=len(lines), rows=rows)


def _lines(path: Path) -> list[dict[str, Any]]:
    """One line for each combination, machine and commit of a file, with the accuracy of every seed."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in read_rows(path):
        if row.error is None:
            groups.setdefault(_key(row, row.axes), []).append(row)
    return [_line(path.stem, rows, _over_noise(rows, groups)) for rows in groups.values()]


def _key(row: Row, axes: dict[str, Any]) -> tuple[Any, ...]:
    return json.dumps(axes, sort_keys=True), row.device_name, row.precision, row.git_commit


def _over_noise(rows: list[Row], groups: dict[tuple[Any, ...], list[Row]]) -> Difference | None:
    """The difference to Gaussian noise with all else equal, also the machine and the commit."""
    first = rows[0]
    noise = groups.get(_key(first, {**first.axes, "images": NOISE}))
    if noise is None or first.axes.get("images") == NOISE:
        return None
    one, two = (Group("", each[0].axes, {row.seed: row for row in each}) for each in (rows, noise))
    return difference(one, two)


def _line(file: str, rows: list[Row], over: Difference | None) -> dict[str, Any]:
    first, top1 = rows[0], [row.top1 for row in rows]
    axes, metrics = first.axes, first.measured
    images = str(axes.get("images", ""))
    rest = [str(value) for name, value in axes.items() if name not in ("images", "model")]
    steps = " + ".join(first.backend.steps or ())
    full = metrics.fp.top1
    return {
        "model": first.model.name,
        "images": IMAGES.get(images, images).replace("`", ""),
        "backend": ", ".join(rest).replace("`", "") or steps,
        "bits": first.backend.label or "",
        "top1": round(mean(top1), 2),
        "spread": round(stdev(top1), 2) if len(top1) > 1 else None,
        "seeds": len(top1),
        "drop": None if full is None else round(full - mean(top1), 2),
        "over": None if over is None else round(over.mean, 2),
        "interval": "" if over is None else f"[{over.low:.1f}, {over.high:.1f}]{'' if over.images else '*'}",
        "agreement": _mean([row.measured.agreement for row in rows]),
        "tested": metrics.images,
        "seconds": _mean([row.seconds for row in rows]),
        "how": f"measured in {first.integer_file.runtime}" if first.integer_file else "simulated",
        "machine": machine_of(first) if first.device_name else "",
        "commit": (first.git_commit or "")[:7],
        "file": file,
        "all": [[row.seed, round(row.top1, 2)] for row in rows],
    }


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return round(mean(known), 2) if known else None
