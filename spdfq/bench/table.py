"""The table of a bench: one line for each combination, mean and spread over the seeds."""

import statistics
from collections.abc import Iterable
from typing import Any

from spdfq.bench.plan import Gap, Plan
from spdfq.evaluation.accuracy import left_out

Row = dict[str, Any]


def measures(plan: Plan) -> list[str]:
    """Names of the columns that hold numbers."""
    return ["FP top-1", "quantized top-1", "agreement", *(["gap closed"] if plan.gap else []), "seconds"]


def headings(plan: Plan) -> list[str]:
    """Names of the columns."""
    return [*(axis.column for axis in plan.axes), *measures(plan)]


def lines(plan: Plan, rows: list[Row]) -> list[list[str]]:
    """The cells of the table, one list for each combination."""
    table = []
    for combination in plan.combinations:
        cells = _measures(_of(rows, combination.values))
        if plan.gap:
            cells.insert(-1, _closed(plan.gap, rows, combination.values))
        table.append([*map(str, combination.values.values()), *cells])
    return table


def caption(plan: Plan, rows: list[Row]) -> str:
    """What the numbers are of, and what they are not."""
    done = [row for row in rows if row["error"] is None]
    if not done:
        return "No cell has finished."
    measure = _distinct(row["metrics"].get("measure", "Top-1") for row in done)
    damaged = dict.fromkeys(name for row in done for name in row["metrics"].get("damaged", ()))
    gap = f"Gap closed: share of the way from {plan.gap.floor} to {plan.gap.ceiling}. " if plan.gap else ""
    unread = f" In the evaluation {left_out(tuple(damaged))}." if damaged else ""
    return (
        f"{measure} and agreement with the float model in percent on "
        f"{_distinct(row['metrics']['images'] for row in done)} "
        "images; quantization is simulated in floating point; mean ± sample standard deviation over seeds (number of "
        f"seeds). Model {_distinct(row['model'] for row in done)}, "
        f"placement {_distinct(row['backend']['placement'] for row in done)}, "
        f"device {_distinct(_device(row) for row in done)}. {gap}Seconds of a run: a stage shared with an earlier run "
        f"costs only its loading.{unread}"
    )


def markdown(plan: Plan, rows: list[Row]) -> str:
    """The table and its caption in Markdown."""
    body = [headings(plan), ["---"] * len(plan.axes) + ["---:"] * len(measures(plan)), *lines(plan, rows)]
    failed = [f"- {row['folder']}: {row['error']}" for row in rows if row["error"] is not None]
    table = ["| " + " | ".join(map(_escaped, cells)) + " |" for cells in body]
    return "\n".join([caption(plan, rows), "", *table, *(["", "Failed:", "", *failed] if failed else [])]) + "\n"


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


def _of(rows: list[Row], values: Row) -> list[Row]:
    return [row for row in rows if row["axes"] == values]


def _closed(gap: Gap, rows: list[Row], values: Row) -> str:
    """The share of the gap that a combination closes, over the seeds finished of it and of both ends."""
    if values[gap.axis] in (gap.floor, gap.ceiling):
        return ""
    triple = [{**values, gap.axis: gap.floor}, values, {**values, gap.axis: gap.ceiling}]
    found = [{row["seed"]: _top1(row) for row in _of(rows, each) if row["error"] is None} for each in triple]
    seeds = set.intersection(*map(set, found))
    if not seeds:
        return ""
    floor, own, ceiling = (statistics.mean(each[seed] for seed in sorted(seeds)) for each in found)
    return f"{(own - floor) / (ceiling - floor):z.0%}" if ceiling > floor else ""


def _top1(row: Row) -> float:
    return float(row["metrics"]["quantized"]["top1"])


def _spread(values: list[float]) -> str:
    deviation = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{deviation} ({len(values)})"


def _device(row: Row) -> str:
    return f"{row['device']} ({row['device_name']}, {row['precision']})"


def _distinct(values: Iterable[Any]) -> str:
    return ", ".join(map(str, dict.fromkeys(values)))


def _escaped(text: str) -> str:
    return text.replace("|", "\\|")
