"""The bench command."""

from pathlib import Path
from typing import Any

import click
from spdfq_cli import options

_PIPED = 160


@click.command()
@click.argument("file", metavar="FILE.toml")
@options.out
@options.device
@options.quiet
@options.as_json
@click.pass_context
def bench(ctx: click.Context, file: str, out: str | None, device: str | None, quiet: bool, as_json: bool) -> None:
    """Run all combinations of a bench file.

    Finished runs are kept: run the same command again to resume, or to retry runs that failed.
    """
    from spdfq.bench.run import run_bench

    result = run_bench(
        file,
        out=Path(out) if out else None,
        device=device,
        progress=options.progress(quiet),
        announce=options.announce(quiet),
    )
    if as_json:
        options.print_json({"folder": str(result.folder), "cells": [row.to_dict() for row in result.rows]})
    else:
        _print_table(result)
    if quiet and not as_json:
        for row in result.rows:
            if row.error:
                click.echo(f"failed: {row.folder}: {row.error}", err=True)
    ctx.exit(1 if result.failed else 0)


def _print_table(result: Any) -> None:
    from spdfq.bench.table import BOLD, caption, table

    shown = table(result.plan, result.rows)
    text = " ".join([caption(result.plan, result.rows), *([BOLD] if any(shown.best) else []), *shown.notes])
    console = print_table(shown, text)
    console.print(f"table   {result.folder / 'table.md'}", soft_wrap=True)
    console.print(f"lines   {result.folder / 'results.jsonl'}", soft_wrap=True)


def print_table(shown: Any, caption: str) -> Any:
    """Print a `spdfq.bench.table.Table` on standard output, and return the console."""
    from rich.box import SIMPLE
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    printed = Table(box=SIMPLE, pad_edge=False, caption=caption, caption_justify="left")
    for column in shown.headings:
        if column in shown.numbers:
            printed.add_column(column.replace(" ", "\n"), justify="right", no_wrap=True)
        else:
            printed.add_column(column, overflow="fold")
    for cells, best in zip(shown.rows, shown.best, strict=True):
        printed.add_row(*(Text(cell, style="bold" if best else "") for cell in cells))
    console = Console()
    if not console.is_terminal:
        console.width = _PIPED
    console.print(printed)
    return console
