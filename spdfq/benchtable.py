"""The table of a bench: one line for each combination, mean and spread over the seeds."""

import statistics
from collections.abc import Iterable
from typing import Any

from spdfq.benchfile import Plan

Row = dict[str, Any]
MEASURES = ("FP top-1", "quantized top-1", "agreement", "seconds")


def headings(plan: Plan) -> list[str]:
    """Names of the columns."""
    return [*(axis.column for axis in plan.axes), *MEASURES]


def lines(plan: Plan, rows: list[Row]) -> list[list[str]]:
    """The cells of the table, one list for each combination."""
    table = []
    for combination in plan.combinations:
        own = [row for row in rows if row["axes"] == combination.values]
        table.append([*map(str, combination.values.values()), *_measures(own)])
    return table


def caption(rows: list[Row]) -> str:
    """What the numbers are of, and what they are not."""
    done = [row for row in rows if row["error"] is None]
    if not done:
        return "No cell has finished."
    measure = _distinct(row["metrics"].get("measure", "Top-1") for row in done)
    return (
        f"{measure} and agreement with the float model in percent on "
        f"{_distinct(row['metrics']['images'] for row in done)} "
        "images; quantization is simulated in floating point; mean ± sample standard deviation over seeds (number of "
        f"seeds). Model {_distinct(row['model'] for row in done)}, "
        f"placement {_distinct(row['backend']['placement'] for row in done)}, "
        f"device {_distinct(_device(row) for row in done)}. Seconds of a run: a stage shared with an earlier run costs "
        "only its loading."
    )


def markdown(plan: Plan, rows: list[Row]) -> str:
    """The table and its caption in Markdown."""
    body = [headings(plan), ["---"] * len(plan.axes) + ["---:"] * len(MEASURES), *lines(plan, rows)]
    failed = [f"- {row['folder']}: {row['error']}" for row in rows if row["error"] is not None]
    table = ["| " + " | ".join(map(_escaped, cells)) + " |" for cells in body]
    return "\n".join([caption(rows), "", *table, *(["", "Failed:", "", *failed] if failed else [])]) + "\n"


def _measures(rows: list[Row]) -> list[str]:
    done = [row for row in rows if row["error"] is None]
    if not done:
        return ["", "failed" if rows else "not run yet", "", ""]
    metrics = [row["metrics"] for row in done]
    return [
        f"{statistics.mean(m['fp']['top1'] for m in metrics):.2f}",
        _spread([m["quantized"]["top1"] for m in metrics]),
        f"{statistics.mean(m['agreement'] for m in metrics):.2f}",
        f"{statistics.mean(row['seconds'] for row in done):.1f}",
    ]


def _spread(values: list[float]) -> str:
    deviation = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{deviation} ({len(values)})"


def _device(row: Row) -> str:
    return f"{row['device']} ({row['device_name']}, {row['precision']})"


def _distinct(values: Iterable[Any]) -> str:
    return ", ".join(map(str, dict.fromkeys(values)))


def _escaped(text: str) -> str:
    return text.replace("|", "\\|")
