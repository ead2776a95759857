"""The table of a bench: one row for each combination, with mean and standard deviation over the seeds."""

import statistics
from collections.abc import Iterable
from typing import Any

from spdfq.bench.plan import Gap, Plan
from spdfq.evaluation.accuracy import left_out

Row = dict[str, Any]


def number_columns(plan: Plan) -> list[str]:
    """Headings of the columns that contain numbers."""
    return ["FP top-1", "quantized top-1", "agreement", *(["gap closed"] if plan.gap else []), "seconds"]


def headings(plan: Plan) -> list[str]:
    """Headings of all columns."""
    return [*(axis.column for axis in plan.axes), *number_columns(plan)]


def table_rows(plan: Plan, rows: list[Row]) -> list[list[str]]:
    """The text of the table's cells, one list for each combination.

    Args:
        plan: of the bench.
        rows: of ``results.jsonl``.
    """
    found = []
    for combination in plan.combinations:
        numbers = _numbers(_of(rows, combination.values))
        if plan.gap:
            numbers.insert(-1, _closed(plan.gap, rows, combination.values))
        found.append([*map(str, combination.values.values()), *numbers])
    return found


def caption(plan: Plan, rows: list[Row]) -> str:
    """A paragraph that says what the numbers are and how they were measured."""
    done = [row for row in rows if row["error"] is None]
    if not done:
        return "No cell has finished."
    measure = _distinct(row["metrics"].get("measure", "Top-1") for row in done)
    damaged = dict.fromkeys(name for row in done for name in row["metrics"].get("damaged", ()))
    gap = f"Gap closed: 0 % is the top-1 of {plan.gap.floor}, 100 % that of {plan.gap.ceiling}. " if plan.gap else ""
    unread = f" In the evaluation {left_out(tuple(damaged))}." if damaged else ""
    return (
        f"{measure} and agreement with the float model in percent on "
        f"{_distinct(row['metrics']['images'] for row in done)} "
        "images; quantization is simulated in floating point; mean ± sample standard deviation over seeds (number of "
        f"seeds). Model {_distinct(row['model'] for row in done)}, "
        f"placement {_distinct(row['backend']['placement'] for row in done)}, "
        f"device {_distinct(_device(row) for row in done)}. {gap}Seconds per run; a stage reused from an earlier "
        f"run counts only with the time to load it.{unread}"
    )


def markdown(plan: Plan, rows: list[Row]) -> str:
    """The table and its caption in Markdown."""
    rules = ["---"] * len(plan.axes) + ["---:"] * len(number_columns(plan))
    failed = [f"- {row['folder']}: {row['error']}" for row in rows if row["error"] is not None]
    lines = [
        "| " + " | ".join(map(_escaped, cells)) + " |" for cells in (headings(plan), rules, *table_rows(plan, rows))
    ]
    return "\n".join([caption(plan, rows), "", *lines, *(["", "Failed:", "", *failed] if failed else [])]) + "\n"


def _numbers(rows: list[Row]) -> list[str]:
    """The cells of the number columns, without the gap, for the rows of one combination."""
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
    """The share of the gap that a combination closes, over the seeds that it and both ends have finished."""
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
