"""The compare command."""

from typing import Any

import click
from spdfq_cli import options
from spdfq_cli.bench import print_table

_SIDE_BY_SIDE = 4
_AT_MOST = 5


@click.command()
@click.argument("sources", metavar="RUN RUN...|BENCH...", nargs=-1, required=True)
@click.option("--over", metavar="LABEL", help="What the others are compared with; by default the first, or [baseline].")
@options.as_json
def compare(sources: tuple[str, ...], over: str | None, as_json: bool) -> None:
    """Compare runs or benches, with intervals.

    The intervals cover seeds and test images. Also shows in which keys the recipes differ. Runs that differ in their
    seed alone are one row. A BENCH is the folder of a bench, or a file of result rows; several benches share one gap
    and one baseline.
    """
    from spdfq.bench.compare import compare as compared

    found = compared(sources, over)
    if as_json:
        keys = {each.key: each.values for each in found.keys}
        options.print_json({"rows": found.rows, "recipes": keys, "notes": found.table.notes})
        return
    print_table(found.table, " ".join([found.caption, *found.table.notes]))
    _print_keys(found)


def _print_keys(found: Any) -> None:
    """Keys that differ: a column for each row, or, with many rows, the rows that share a value."""
    from spdfq.bench.table import Table

    labels = list(dict.fromkeys(label for each in found.keys for label in each.values))
    if found.recipes_missing:
        first, more = found.recipes_missing[:_AT_MOST], len(found.recipes_missing) - _AT_MOST
        listed = ", ".join(first) + (f" and {more} more" if more > 0 else "")
        click.echo(f"recipes    not there for {listed}; only their axes are known")
    if labels and len(labels) <= _SIDE_BY_SIDE:
        rows = [[each.key, *(each.values[label] for label in labels)] for each in found.keys]
        print_table(
            Table(["recipe key", *labels], [], rows, [False] * len(rows), []), "Keys in which the recipes differ."
        )
        return
    for each in found.keys:
        shared: dict[str, list[str]] = {}
        for label, value in each.values.items():
            shared.setdefault(value, []).append(label)
        click.echo(f"{each.key}: " + "; ".join(f"{value} ({', '.join(who)})" for value, who in shared.items()))
