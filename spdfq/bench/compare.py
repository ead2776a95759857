"""Compare finished runs or benches: accuracies, differences with intervals, and how the recipes differ."""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from attrs import asdict, evolve, frozen

from spdfq.bench.groups import Group, best, closed, difference, partner, without_hits
from spdfq.bench.intervals import Difference
from spdfq.bench.plan import Baseline, Gap
from spdfq.bench.recipe_keys import KeyDifference, differing_keys
from spdfq.bench.rows import Row, read_rows, row_of_run
from spdfq.bench.table import BOLD, COMPARED, Table, comparison, described, number_columns, numbers
from spdfq.errors import DataError, SpdfqError
from spdfq.recipe.structure import structure
from spdfq.report.json_file import read_json
from spdfq.runs.finished import finished_record

_AT_MOST = 5


@frozen
class Comparison:
    """The result of a comparison.

    Args:
        table: as text.
        caption: what the numbers are.
        keys: recipe keys that differ.
        rows: the same as plain data, one for each group.
        recipes_missing: labels of the groups whose recipe is not there.
    """

    table: Table
    caption: str
    keys: list[KeyDifference]
    rows: list[dict[str, Any]]
    recipes_missing: list[str]


def compare(sources: Sequence[str | Path], over_label: str | None = None) -> Comparison:
    """Compare runs, or the rows of one or several benches, over seeds and test images.

    Runs whose recipes differ in the seed alone are one group. The rows of a bench are grouped by its axes; several
    benches share a gap and a baseline.

    Args:
        sources: run folders; or folders of benches and ``.jsonl`` files of rows.
        over_label: the group that the others are compared with, by its label. By default the ``[baseline]`` of a
            bench, or the first group.

    Raises:
        SpdfqError: nothing to compare, or runs that cannot be paired; the message says why.
    """
    if not sources:
        raise SpdfqError("give the folders of finished runs, or of a bench")
    paths = [Path(source) for source in sources]
    benches = [path for path in paths if _is_bench(path)]
    if benches and len(benches) < len(paths):
        raise SpdfqError(
            f"{next(path for path in paths if path not in benches)} is a run and {benches[0]} a bench; compare one kind"
        )
    groups = _of_benches(benches) if benches else _of_runs(paths)
    if len(groups) < 2:
        raise SpdfqError(f"{paths[0]}: only one kind of result, {groups[0].label}; give at least two to compare")
    gap, baseline = _shared(benches, "gap", Gap), _shared(benches, "baseline", Baseline)
    reference = _named(groups, over_label) if over_label or not baseline else None
    return _compared(groups, gap, None if reference else baseline, reference)


def _compared(groups: list[Group], gap: Gap | None, baseline: Baseline | None, reference: Group | None) -> Comparison:
    axis = next((each.axis for each in (baseline, gap) if each), None)
    ends = (gap.floor, gap.ceiling) if gap and gap.axis == axis else ()
    if axis:
        winners = best(groups, axis, ends)
    else:
        winners = best([evolve(group, axes={"": group.label}) for group in groups], "")
    won = {winner.label for winner in winners}
    notes: list[str] = []
    lines, data = [], []
    for group in groups:
        cells = numbers(group)
        found = _difference(groups, group, baseline, reference, notes)
        share = [comparison(gap, groups, group, notes)] if gap else []
        cells[-1:-1] = [*share, "" if found is None else str(found)]
        lines.append([group.label, *cells])
        data.append(_plain(group, found, closed(gap, groups, group) if gap else None, group.label in won))
    if old := without_hits(groups):
        shown = ", ".join(old[:_AT_MOST]) + (f" and {len(old) - _AT_MOST} more" if len(old) > _AT_MOST else "")
        notes.append(f"No per-image results in {shown}: intervals over the seeds only.")
    name = reference.label if reference else baseline.value if baseline else ""
    columns = number_columns(gap is not None, name)
    rows = [row for group in groups for row in group.rows.values()]
    shares = f" Gap closed: 0 % is the top-1 of {gap.floor}, 100 % that of {gap.ceiling}." if gap else ""
    bold = f" {BOLD}" if won else ""
    table = Table(["", *columns], columns, lines, [group.label in won for group in groups], list(dict.fromkeys(notes)))
    keys, missing = differing_keys(groups)
    return Comparison(table, f"{described(rows)}{shares} {COMPARED}{bold}", keys, data, missing)


def _difference(
    groups: list[Group], group: Group, baseline: Baseline | None, reference: Group | None, notes: list[str]
) -> Difference | None:
    """The difference of a group to what it is compared with; a note if there is none."""
    if reference is None:
        assert baseline
        if group.axes.get(baseline.axis) == baseline.value:
            return None
        reference = partner(groups, group, baseline.axis, baseline.value)
        if reference is None:
            notes.append(f"{group.label}: no bench has {baseline.value} with the same back-end or images.")
            return None
    if group is reference:
        return None
    found = difference(group, reference)
    if found is None:
        shared = "only one seed" if set(group.rows) & set(reference.rows) else "no seed"
        notes.append(f"{group.label}: no interval; it shares {shared} with {reference.label}.")
    return found


def _plain(group: Group, found: Difference | None, share: float | None, wins: bool) -> dict[str, Any]:
    return {
        "label": group.label,
        "axes": group.axes,
        "seeds": sorted(group.rows),
        "top1": group.top1(),
        "difference": None if found is None else asdict(found),
        "gap_closed": share,
        "best": wins,
    }


def _is_bench(path: Path) -> bool:
    if path.suffix == ".jsonl" or (path / "results.jsonl").is_file():
        return True
    if not path.exists():
        raise SpdfqError(f"{path}: no such folder; give the folder of a finished run or of a bench")
    return False


def _of_runs(paths: list[Path]) -> list[Group]:
    """Runs whose recipes differ in the seed alone, as groups that are named after their first folder."""
    groups: dict[tuple[Any, ...], Group] = {}
    for path in paths:
        record = finished_record(path)
        try:
            row = row_of_run(record, folder=str(path))
        except DataError as error:
            raise DataError(f"{path}: {error}") from None
        _add(groups, _identity(row), row, Group(path.resolve().name, {}, {}), path)
    for group in groups.values():
        if len(group.rows) > 1:
            group.label = group.label.removesuffix(f"-s{next(iter(group.rows))}")
    return _distinct(list(groups.values()))


def _of_benches(paths: list[Path]) -> list[Group]:
    """The rows of benches, grouped by their axes; the same cell in two benches is one group."""
    groups: dict[tuple[Any, ...], Group] = {}
    every = [row.axes for path in paths for row in read_rows(_rows_file(path))]
    varying = {name for axes in every for name in axes if any(other.get(name) != axes[name] for other in every)}
    for path in paths:
        file = _rows_file(path)
        origin = file.stem if path.suffix == ".jsonl" else path.resolve().name
        for row in read_rows(file):
            if row.error is not None:
                continue
            label = " / ".join(str(value) for name, value in row.axes.items() if name in varying) or origin
            own = _identity(row) if row.images.digest and row.backend.digest else (origin,)
            key = (json.dumps(row.axes, sort_keys=True), *own)
            _add(groups, key, row, Group(label, row.axes, {}, origin), file.parent / (row.folder or ""))
    if not groups:
        raise SpdfqError(f"{paths[0]}: has no finished row; run the bench first")
    return _distinct(list(groups.values()))


def _rows_file(bench: Path) -> Path:
    return bench if bench.suffix == ".jsonl" else bench / "results.jsonl"


def _add(groups: dict[tuple[Any, ...], Group], key: tuple[Any, ...], row: Row, new: Group, folder: Path) -> None:
    group = groups.setdefault(key, new)
    if row.seed in group.rows:
        before = group.rows[row.seed].top1
        raise SpdfqError(
            f"{group.label}: seed {row.seed} is given twice (top-1 {before:.2f} and {row.top1:.2f}, the second in "
            f"{folder}); leave one out"
        )
    group.rows[row.seed] = row
    if (folder / "recipe.toml").is_file():
        group.folders.append(folder)


def _identity(row: Row) -> tuple[Any, ...]:
    found = row.measured
    # rows from before the precision of the evaluation was recorded have the default one, as far as is known
    measured = (found.test_images, found.bank_images, found.precision or "float32")
    return (row.model.fingerprint, row.images.digest, row.backend.digest, *measured, row.precision)


def _distinct(groups: list[Group]) -> list[Group]:
    """The groups, each with a label of its own: equal ones get the name of the bench, or a number."""
    labels = Counter(group.label for group in groups)
    for group in groups:
        if labels[group.label] > 1 and group.origin:
            group.label = f"{group.origin}: {group.label}"
    seen: Counter[str] = Counter()
    for group in groups:
        seen[group.label] += 1
        if seen[group.label] > 1:
            group.label = f"{group.label} ({seen[group.label]})"
    return groups


def _named(groups: list[Group], label: str | None) -> Group:
    if label is None:
        return groups[0]
    found = [group for group in groups if group.label == label]
    if not found:
        raise SpdfqError(f"--over {label}: is not among {', '.join(group.label for group in groups)}")
    return found[0]


def _shared(benches: list[Path], name: str, cls: type) -> Any:
    """The gap or baseline of the benches.

    Raises:
        SpdfqError: two benches have different ones.
    """
    found: dict[str, Any] = {}
    for path in benches:
        file = path / "bench.json"
        data = read_json(file, "run the bench again").get(name) if file.is_file() else None
        if data:
            problems: list[str] = []
            found.setdefault(json.dumps(data), structure(cls, data, f"{file}: {name}", problems))
            if problems:
                raise DataError(f"{problems[0]}; run the bench again")
    if len(found) > 1:
        raise SpdfqError(f"the benches have different [{name}] tables ({' and '.join(found)}); compare them one by one")
    return next(iter(found.values()), None)
