"""Options that several commands share."""

import json
from collections.abc import Callable
from typing import Any

import click

overrides = click.option(
    "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a dotted recipe key; the value is TOML."
)
device = click.option(
    "--device", type=click.Choice(["auto", "cpu", "cuda"]), help="Where it runs, instead of the recipe's choice."
)


def _named(_: click.Context, __: click.Parameter, value: str | None) -> str | None:
    if value == "":
        raise click.BadParameter("the name of the folder is empty")
    return value


out = click.option(
    "--out", type=click.Path(file_okay=False), callback=_named, metavar="DIR", help="Folder of the results."
)
quiet = click.option("--quiet", is_flag=True, help="No progress bars, and no lines but warnings.")
as_json = click.option("--json", "as_json", is_flag=True, help="The result as JSON on standard output, nothing else.")


def progress(quiet: bool) -> Any:
    """Bars on standard error, or none."""
    from spdfq.runtime import RichProgress, silent

    return silent if quiet else RichProgress()


def announce(quiet: bool) -> Callable[[str], None]:
    """Lines on standard error; warnings alone where it has to be quiet."""
    return (lambda line: note(line) if line.startswith("warning:") else None) if quiet else note


def note(line: str) -> None:
    """One line on standard error."""
    click.echo(line, err=True)


def print_json(result: Any) -> None:
    """The machine result on standard output."""
    click.echo(json.dumps(result, indent=2))
