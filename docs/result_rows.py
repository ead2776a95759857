"""The rows of benchmarks/results, for the generated tables."""

from collections.abc import Callable, Iterable
from pathlib import Path

from spdfq.bench.groups import Group
from spdfq.bench.rows import Row, read_rows
from spdfq.recipe import load_recipe

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"


def rows_of(*names: str) -> list[Row]:
    """The rows of files, by their names without the suffix."""
    return [row for name in names for row in read_rows(RESULTS / f"{name}.jsonl")]


def groups_by(rows: Iterable[Row], of: Callable[[Row], str]) -> dict[str, Group]:
    """The seeds of each kind of rows, in the order of the rows."""
    groups: dict[str, Group] = {}
    for row in rows:
        groups.setdefault(of(row), Group("", row.axes, {})).rows[row.seed] = row
    return groups


def iterations_of(part: str) -> int:
    """The iterations of a shipped part that optimises images."""
    return int(load_recipe({"extends": ["models/vit_fmnist", part, "backends/minmax"]}).synthesis.iterations)


def machines(rows: Iterable[Row]) -> str:
    """The machines and precisions of rows, each once, with the number of rows if there are several."""
    counted: dict[str, int] = {}
    for row in rows:
        threads = f", {row.threads} thread{'s' * (row.threads != 1)}" if row.threads is not None else ""
        said = f"{row.device_name or 'not recorded'}{f', {row.precision}' if row.precision else ''}{threads}"
        counted[said] = counted.get(said, 0) + 1
    if len(counted) == 1:
        return next(iter(counted))
    return "; ".join(f"{said} ({count} rows)" for said, count in sorted(counted.items()))
