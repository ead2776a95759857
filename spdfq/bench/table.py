"""The table of a bench: one row for each combination, with mean, standard deviation and comparisons over the seeds."""

import statistics
from collections.abc import Iterable
from typing import Any

from attrs import frozen

from spdfq.bench.groups import Group, best, closed, over, without_hits
from spdfq.bench.plan import Combination, Plan
from spdfq.bench.rows import Row
from spdfq.errors import SpdfqError
from spdfq.evaluation.accuracy import left_out


@frozen
class Table:
    """The text of a table.

    Args:
        headings: of all columns.
        numbers: headings of the columns that contain numbers.
        rows: the text of the cells.
        best: for each row, whether it is the best of its group by the interval.
        notes: a line for each comparison that was not possible.
    """

    headings: list[str]
    numbers: list[str]
    rows: list[list[str]]
    best: list[bool]
    notes: list[str]


def groups_of(plan: Plan, rows: list[Row]) -> list[Group]:
    """The finished rows of each combination, in the order of the plan."""
    return [Group(_label(each), each.values, _finished(_of(rows, each.values))) for each in plan.combinations]


def table(plan: Plan, rows: list[Row]) -> Table:
    """The table of a bench.

    Args:
        plan: of the bench.
        rows: of ``results.jsonl``.
    """
    groups = groups_of(plan, rows)
    references = (plan.gap.floor, plan.gap.ceiling) if plan.gap and plan.gap.axis == plan.compared else ()
    winners = best(groups, plan.compared, references) if plan.compared else []
    notes: list[str] = []
    found = []
    for combination, group in zip(plan.combinations, groups, strict=True):
        cells = numbers(group, bool(_of(rows, combination.values)))
        cells[-1:-1] = [comparison(each, groups, group, notes) for each in (plan.gap, plan.baseline) if each]
        found.append([*map(str, combination.values.values()), *cells])
    if (plan.baseline or winners) and (old := without_hits(groups)):
        notes.append(f"No per-image results in {', '.join(old)}: intervals over the seeds only.")
    columns = number_columns(plan.gap is not None, plan.baseline.value if plan.baseline else None)
    headings = [*(axis.column for axis in plan.axes), *columns]
    return Table(headings, columns, found, [group in winners for group in groups], list(dict.fromkeys(notes)))


def number_columns(gap: bool, baseline: Any) -> list[str]:
    """Headings of the columns that contain numbers.

    Args:
        gap: whether there is a column for the share of the gap.
        baseline: the label of what rows are compared with, or ``None``.
    """
    difference = [] if baseline is None else [f"over {baseline}"]
    return ["FP top-1", "quantized top-1", "agreement", *(["gap closed"] if gap else []), *difference, "seconds"]


def numbers(group: Group, started: bool = True) -> list[str]:
    """The cells of the number columns without the comparisons: FP, quantized, agreement, seconds."""
    done = list(group.rows.values())
    if not done:
        return ["", "failed" if started else "not run yet", "", ""]
    full = [row.measured.fp.top1 for row in done]
    return [
        mean_of(full, 2),
        f"{spread([row.top1 for row in done])} ({len(done)})",
        mean_of([row.measured.agreement for row in done], 2),
        mean_of([row.seconds for row in done], 1),
    ]


def comparison(of: Any, groups: list[Group], group: Group, notes: list[str]) -> str:
    """The share of a gap, or the difference to a baseline; empty, with a note, where there is none."""
    try:
        if hasattr(of, "ceiling"):
            share = closed(of, groups, group)
            return "" if share is None else f"{share:z.0%}"
        found = over(groups, of, group)
        return "" if found is None else str(found)
    except SpdfqError as error:
        notes.append(f"Not compared: {error}.")
        return ""


def spread(values: list[float], digits: int = 2) -> str:
    """The mean and the sample standard deviation; the number alone if there is one."""
    deviation = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{deviation}"


def mean_of(values: Iterable[float | None], digits: int) -> str:
    """The mean of the numbers that are known; empty if there are none."""
    known = [value for value in values if value is not None]
    return f"{statistics.mean(known):.{digits}f}" if known else ""


def caption(plan: Plan, rows: list[Row]) -> str:
    """A paragraph that says what the numbers are and how they were measured."""
    done = [row for row in rows if row.error is None]
    if not done:
        return "No cell has finished."
    damaged = dict.fromkeys(name for row in done for name in row.measured.damaged or ())
    gap = f"Gap closed: 0 % is the top-1 of {plan.gap.floor}, 100 % that of {plan.gap.ceiling}. " if plan.gap else ""
    baseline = f"{COMPARED} " if plan.baseline else ""
    unread = f" In the evaluation {left_out(tuple(damaged))}." if damaged else ""
    return (
        f"{described(done)} {gap}{baseline}Seconds per run; a stage reused from an earlier "
        f"run counts only with the time to load it.{unread}"
    )


COMPARED = (
    "Over: mean of the paired differences in percentage points, with a 95 % interval over seeds and test images "
    "(bootstrap over the images, Student's t over the seeds)."
)
BOLD = "Bold: better than every other row of its group, by the interval."


def described(done: list[Row]) -> str:
    """What the rows measure, and how."""
    measure = _distinct("Top-1" if row.measured.measure == "top-1" else row.measured.measure for row in done)
    simulated = {row.measured.simulated for row in done}
    how = {True: "quantization is simulated in floating point", False: "measured in an integer runtime"}
    return (
        f"{measure} and agreement with the float model in percent on {_distinct(row.measured.images for row in done)} "
        f"images; {' or '.join(how[each] for each in sorted(simulated, reverse=True))}; mean ± sample standard "
        f"deviation over seeds (number of seeds). Model {_distinct(row.model.name for row in done)}, placement "
        f"{_distinct(row.backend.placement for row in done)}, device {_distinct(_device(row) for row in done)}."
    )


def markdown(plan: Plan, rows: list[Row]) -> str:
    """The table and its caption in Markdown."""
    shown = table(plan, rows)
    failed = [f"- {row.folder}: {row.error}" for row in rows if row.error is not None]
    lines = markdown_lines(shown)
    bold = f" {BOLD}" if any(shown.best) else ""
    notes = "".join(f" {note}" for note in shown.notes)
    return (
        "\n".join(
            [f"{caption(plan, rows)}{bold}{notes}", "", *lines, *(["", "Failed:", "", *failed] if failed else [])]
        )
        + "\n"
    )


def markdown_lines(shown: Table) -> list[str]:
    """The lines of a table in Markdown; the best rows are bold."""
    rules = ["---:" if heading in shown.numbers else "---" for heading in shown.headings]
    at = shown.headings.index("quantized top-1")
    rows = [
        [f"**{cell}**" if wins and index == at else cell for index, cell in enumerate(cells)]
        for cells, wins in zip(shown.rows, shown.best, strict=True)
    ]
    return ["| " + " | ".join(map(_escaped, cells)) + " |" for cells in (shown.headings, rules, *rows)]


def _label(combination: Combination) -> str:
    return " / ".join(map(str, combination.values.values())) or "base"


def _of(rows: list[Row], values: dict[str, Any]) -> list[Row]:
    return [row for row in rows if row.axes == values]


def _finished(rows: list[Row]) -> dict[int, Row]:
    return {row.seed: row for row in rows if row.error is None}


def _device(row: Row) -> str:
    threads = "" if row.threads is None else f", {row.threads} thread{'s' * (row.threads != 1)}"
    return f"{row.device} ({row.device_name}, {row.precision}{threads})"


def _distinct(values: Iterable[Any]) -> str:
    return ", ".join(map(str, dict.fromkeys(values)))


def _escaped(text: str) -> str:
    return text.replace("|", "\\|")
