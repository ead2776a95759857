"""The doctor command."""

from pathlib import Path
from typing import Any

import click
from spdfq_cli import options


@click.command()
@click.argument("folder", metavar="RUN", type=click.Path(path_type=Path))
@click.option(
    "--images", type=click.IntRange(min=1), default=32, show_default=True, help="Calibration images for each site."
)
@click.option(
    "--heldout", type=click.IntRange(min=1), default=256, show_default=True, help="Evaluation images, evenly spaced."
)
@options.overrides
@options.device
@options.quiet
@options.as_json
def doctor(
    folder: Path,
    images: int,
    heldout: int,
    overrides: tuple[str, ...],
    device: str | None,
    quiet: bool,
    as_json: bool,
) -> None:
    """Find which sites cost a finished run its accuracy.

    Each site alone is left in float, and each alone is quantized. The result is also written to the run folder and its
    report, with more bits for some sites as a file for the extends of a recipe. The bits are chosen on the calibration
    images; evaluation images only show the gain.
    """
    from spdfq.runs.diagnosing import diagnose_run

    found = diagnose_run(
        folder,
        images=images,
        heldout=heldout,
        overrides=overrides,
        device=device,
        progress=options.progress(quiet),
        announce=options.announce(quiet),
    )
    if as_json:
        options.print_json(found)
    else:
        _print(found)


def _print(found: dict[str, Any]) -> None:
    from rich.box import SIMPLE
    from rich.table import Table

    from spdfq.report.diagnosis import BLOCKS, COLUMNS, block_rows, facts, predicted, site_rows

    console = options.console(highlight=False)
    for name, value in facts(found).items():
        console.print(f"{name.lower():<24} {value}", soft_wrap=True)
    for columns, rows in ((COLUMNS, site_rows(found)), (BLOCKS, block_rows(found))):
        if rows:
            table = Table(box=SIMPLE, pad_edge=False)
            for index, column in enumerate(columns):
                table.add_column(column, justify="right" if index else "left", overflow="fold", no_wrap=bool(index))
            for row in rows:
                table.add_row(*row)
            console.print(table)
    for line in (*found["findings"], *found["notes"], *predicted(found)):
        console.print(f"* {line}", soft_wrap=True, markup=False)
    if found["file"]:
        console.print(f"\n{found['suggestion']['fragment']}", soft_wrap=True, markup=False, end="")
        console.print(f"\nfragment  {found['file']}", soft_wrap=True)
        console.print(f"report    {Path(found['folder']) / 'report.html'}", soft_wrap=True)
