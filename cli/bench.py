"""The bench command."""

import sys
from pathlib import Path
from typing import Any

import click
from spdfq_cli import options


def _shard(_: click.Context, __: click.Parameter, value: str | None) -> tuple[int, int] | None:
    if value is None:
        return None
    first, slash, second = value.partition("/")
    if not (slash and first.isdecimal() and second.isdecimal() and 1 <= int(first) <= int(second)):
        raise click.BadParameter("expected i/n with i from 1 to n, for example 1/4")
    return int(first), int(second)


@click.command()
@click.argument("files", metavar="FILE.toml | merge FILE.toml [FOLDER...]", nargs=-1, required=True)
@click.option("--jobs", type=click.IntRange(min=1), default=1, show_default=True, help="Cells to run at a time.")
@click.option("--shard", callback=_shard, metavar="I/N", help="Run every N-th cell only, starting with the I-th one.")
@click.option("--dry-run", is_flag=True, help="Run nothing; estimate the time from finished rows.")
@click.option("--launcher", type=click.Choice(["submitit"]), help="Submit the shards to a cluster, as a SLURM array.")
@click.option("--shards", type=click.IntRange(min=1), help="Number of jobs of the launcher.")
@click.option("--launcher-option", "launcher_options", multiple=True, metavar="KEY=VALUE", help="For the launcher.")
@click.option("--prefer-first", is_flag=True, help="merge: keep the first of rows that disagree.")
@options.out
@options.device
@options.quiet
@options.as_json
@click.pass_context
def bench(
    ctx: click.Context,
    files: tuple[str, ...],
    jobs: int,
    shard: tuple[int, int] | None,
    dry_run: bool,
    launcher: str | None,
    shards: int | None,
    launcher_options: tuple[str, ...],
    prefer_first: bool,
    out: str | None,
    device: str | None,
    quiet: bool,
    as_json: bool,
) -> None:
    """Run all combinations of a bench file.

    Finished runs are kept: run the same command again to resume, or to retry runs that failed.

    "merge" joins the rows of shards, or of the folders of several machines, into one table. It refuses rows of one
    cell that disagree.
    """
    folder, announce = Path(out) if out else None, options.announce(quiet)
    if files == ("merge",):
        raise click.UsageError("merge needs the bench file: spdfq bench merge FILE.toml [FOLDER...]")
    if files[0] == "merge":
        _merge(files[1], files[2:], folder, prefer_first, announce, as_json)
        return
    if len(files) > 1:
        raise click.UsageError(f"one bench file at a time; got {', '.join(files)}")
    if launcher:
        _launch(files[0], shards, folder, launcher_options, device, jobs, as_json)
        return
    if dry_run:
        _forecast(files[0], folder, device, jobs, shard, announce, as_json)
        return
    from spdfq.bench.run import run_bench

    result = run_bench(
        files[0],
        out=folder,
        device=device,
        jobs=jobs,
        shard=shard,
        progress=_progress(quiet),
        announce=announce,
    )
    if as_json:
        options.print_json({"folder": str(result.folder), "cells": [row.to_dict() for row in result.rows]})
    elif shard:
        _print_shard(files[0], shard, result)
    else:
        _print_table(result)
    if quiet and not as_json:
        for row in result.rows:
            if row.error:
                click.echo(f"failed: {row.folder}: {row.error}", err=True)
    ctx.exit(1 if result.failed else 0)


def _progress(quiet: bool) -> Any:
    """Bars in a terminal; without one, what the log says every 30 seconds."""
    if quiet or sys.stderr.isatty():
        return options.progress(quiet)
    from spdfq.bench.log import LogProgress

    return LogProgress()


def _merge(
    source: str, folders: tuple[str, ...], out: Path | None, prefer_first: bool, announce: Any, as_json: bool
) -> None:
    from spdfq.bench.merge import merge_bench
    from spdfq.bench.run import BenchResult

    plan, folder, rows = merge_bench(
        source, [Path(each) for each in folders], out=out, prefer_first=prefer_first, announce=announce
    )
    if as_json:
        options.print_json({"folder": str(folder), "cells": [row.to_dict() for row in rows]})
    else:
        _print_table(BenchResult(folder, plan, rows, len(rows), 0))


def _print_shard(source: str, shard: tuple[int, int], result: Any) -> None:
    from spdfq.bench.launch import merge_command
    from spdfq.bench.row_files import file_of

    click.echo(f"lines   {result.folder / file_of(shard)}")
    click.echo(f"then    {merge_command(source, result.folder)}")


def _launch(
    source: str,
    shards: int | None,
    out: Path | None,
    given: tuple[str, ...],
    device: str | None,
    jobs: int,
    as_json: bool,
) -> None:
    from spdfq.bench.launch import launch, merge_command

    if shards is None:
        raise click.UsageError("--launcher needs --shards: the number of jobs")
    more = [*(["--device", device] if device else []), "--jobs", str(jobs)]
    folder, submitted = launch(source, shards, out=out, options=given, arguments=more)
    ids = [job.job_id for job in submitted]
    if as_json:
        options.print_json({"folder": str(folder), "jobs": ids})
        return
    click.echo(f"jobs    {', '.join(ids)}")
    click.echo(f"logs    {folder / 'launcher'}")
    click.echo(f"then    {merge_command(source, folder)}")


def _forecast(
    source: str,
    out: Path | None,
    device: str | None,
    jobs: int,
    shard: tuple[int, int] | None,
    announce: Any,
    as_json: bool,
) -> None:
    from spdfq.bench.forecast import forecast_bench
    from spdfq.runtime.progress import clock

    found = forecast_bench(source, out=out, device=device, jobs=jobs, shard=shard, announce=announce)
    if as_json:
        options.print_json({"reused": found.reused, "to_run": found.to_run, "seconds": found.seconds})
        return
    for name, seconds in found.to_run.items():
        click.echo(f"{'' if seconds is None else clock(seconds):>8}  {name}")
    time = "not known: no row is finished" if found.seconds is None else f"at most about {clock(found.seconds)}"
    click.echo(f"{found.reused} cells reused, {len(found.to_run)} to run; time {time}")


def _print_table(result: Any) -> None:
    from spdfq.bench.table import BOLD, caption, table

    shown = table(result.plan, result.rows)
    text = " ".join([caption(result.plan, result.rows), *([BOLD] if any(shown.best) else []), *shown.notes])
    console = print_table(shown, text)
    console.print(f"table   {result.folder / 'table.md'}", soft_wrap=True)
    console.print(f"lines   {result.folder / 'results.jsonl'}", soft_wrap=True)
    console.print(f"report  {result.folder / 'report.html'}", soft_wrap=True)


def print_table(shown: Any, caption: str) -> Any:
    """Print a `spdfq.bench.table.Table` on standard output, and return the console."""
    from rich.box import SIMPLE
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
    console = options.console()
    console.print(printed)
    return console
