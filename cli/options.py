"""Options that several commands share."""

import json
from collections.abc import Callable
from typing import Any

import click

_PIPED = 160

overrides = click.option(
    "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a dotted recipe key; the value is TOML."
)
device = click.option(
    "--device", type=click.Choice(["auto", "cpu", "cuda"]), help="Device to run on, instead of the recipe's."
)


def _named(_: click.Context, __: click.Parameter, value: str | None) -> str | None:
    if value == "":
        raise click.BadParameter("the folder name is empty")
    return value


out = click.option("--out", type=click.Path(), callback=_named, metavar="DIR", help="Folder for the results.")
quiet = click.option("--quiet", is_flag=True, help="No progress bars, and no messages except warnings.")
as_json = click.option("--json", "as_json", is_flag=True, help="Print only the result, as JSON, on standard output.")


def progress(quiet: bool) -> Any:
    """Progress bars on standard error; none if quiet."""
    from spdfq.runtime import RichProgress, silent

    return silent if quiet else RichProgress()


def announce(quiet: bool) -> Callable[[str], None]:
    """Prints lines on standard error; if quiet, only warnings."""
    return (lambda line: note(line) if line.startswith("warning:") else None) if quiet else note


def note(line: str) -> None:
    """Print one line on standard error."""
    click.echo(line, err=True)


def console(highlight: bool = True) -> Any:
    """A console on standard output; wide where it is no terminal, so that tables keep their lines."""
    from rich.console import Console

    found = Console(highlight=highlight)
    if not found.is_terminal:
        found.width = _PIPED
    return found


def print_json(result: Any) -> None:
    """Print a result as JSON on standard output."""
    click.echo(json.dumps(result, indent=2))
