"""The card command."""

import shlex
from pathlib import Path

import click
from spdfq_cli import options


@click.command()
@click.argument("folder", metavar="RUN", type=click.Path(path_type=Path))
@options.as_json
def card(folder: Path, as_json: bool) -> None:
    """Write a model card for the Hugging Face hub.

    It is README.md in the folder of a finished run. Export the model first: the card names the files and what was
    measured in their runtimes.
    """
    from spdfq.runs.card import card_run

    done = card_run(folder)
    for line in done["notes"]:
        options.note(f"note: {line}")
    if as_json:
        options.print_json(done)
        return
    click.echo(f"written    {done['file']}")
    click.echo(f"data-free  {'yes' if done['data_free'] else 'no'}")
    click.echo(f"base       {done['base_model'] or 'not on the hub'}, licence {done['license'] or 'not known'}")
    click.echo(f"upload     hf upload USER/NAME {shlex.quote(str(folder))} . --exclude .lock")
