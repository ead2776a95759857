"""Merging the rows of several machines or shards into one bench."""

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from attrs import evolve

from spdfq.bench.page import write_page
from spdfq.bench.plan import Plan, read_plan
from spdfq.bench.row_files import rows_in
from spdfq.bench.rows import Metrics, Row
from spdfq.bench.run import write_results
from spdfq.errors import DataError, SpdfqError


def merge_bench(
    source: str,
    folders: Sequence[Path] = (),
    *,
    out: Path | None = None,
    prefer_first: bool = False,
    announce: Callable[[str], None] = lambda line: None,
) -> tuple[Plan, Path, list[Row]]:
    """Merge the rows of a bench that ran in shards or on several machines, and write its table and its page.

    Args:
        source: path of the bench file.
        folders: of the bench, from each machine; by default ``out`` alone, with the files of its shards.
        out: where ``results.jsonl``, ``table.md`` and ``report.html`` are written; by default ``runs/`` and the file's
            name.
        prefer_first: where rows of one cell disagree, keep that of the first folder and say so, instead of refusing.
        announce: called with a line for each disagreement and for the cells that are missing.

    Returns:
        The plan, the folder, and the rows in the order of the plan.

    Raises:
        DataError: a folder has no rows, or a file of rows is damaged.
        SpdfqError: rows of one cell disagree.
    """
    plan = read_plan(source)
    folder = out or Path("runs") / plan.name
    given = [Path(each) for each in folders] or [folder]
    cells = [(combination.values, seed) for combination in plan.combinations for seed in plan.seeds]
    found: dict[int, list[Row]] = {}
    for each in given:
        rows = rows_in(each)
        if not rows:
            raise DataError(f"{each}: has no rows of a bench; give the folder of a bench")
        strange = 0
        for row in rows:
            cell = (row.axes, row.seed)
            if cell in cells:
                path = os.path.relpath(each / (row.folder or ""), folder)
                found.setdefault(cells.index(cell), []).append(evolve(row, folder=Path(path).as_posix()))
            else:
                strange += 1
        if strange:
            announce(f"warning: {each}: {strange} rows are of no cell of {source}; they are left out")
    problems = [line for index in sorted(found) for line in _disagreements(found[index])]
    if problems and not prefer_first:
        raise SpdfqError("\n".join([*problems, "run these cells again, or use --prefer-first to keep the first row"]))
    for line in problems:
        announce(f"warning: {line}; the first is kept")
    rows = [_best(found[index]) for index in sorted(found)]
    announce(f"{len(cells)} cells, {len(rows)} with a row, {sum(row.error is not None for row in rows)} failed")
    folder.mkdir(parents=True, exist_ok=True)
    write_results(folder, plan, rows)
    write_page(folder, plan, rows)
    return plan, folder, rows


def _best(rows: list[Row]) -> Row:
    """The first row that has not failed, or the first one."""
    return next((row for row in rows if row.error is None), rows[0])


def _disagreements(rows: list[Row]) -> list[str]:
    """A line for each later row of a cell that differs from the first one."""
    done = [row for row in rows if row.error is None]
    found = []
    for other in done[1:]:
        if other.key != done[0].key:
            found.append(f"{_cell(other)}: its rows depend on different code, data, weights or versions")
        elif _result(other.measured) != _result(done[0].measured):
            found.append(
                f"{_cell(other)}: top-1 {done[0].measured.quantized.top1} on {_machine(done[0])}, but "
                f"{other.measured.quantized.top1} on {_machine(other)}"
            )
    return found


def _result(metrics: Metrics) -> tuple[object, ...]:
    return metrics.fp, metrics.quantized, metrics.agreement, metrics.images


def _machine(row: Row) -> str:
    return f"{row.device_name or 'a machine'} ({row.precision})"


def _cell(row: Row) -> str:
    return f"{json.dumps(row.axes)}, seed {row.seed}"
