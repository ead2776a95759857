"""The measure command."""

from pathlib import Path
from typing import Any

import click
from spdfq_cli import options


@click.command()
@click.argument("folders", metavar="RUN...", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "--sheet",
    type=click.Path(path_type=Path),
    metavar="FILE.png",
    help="Also write a picture with images of each run.",
)
@options.overrides
@options.device
@options.quiet
@options.as_json
def measure(
    folders: tuple[Path, ...],
    sheet: Path | None,
    overrides: tuple[str, ...],
    device: str | None,
    quiet: bool,
    as_json: bool,
) -> None:
    """Measure the calibration images of finished runs.

    They are compared with the real images of the run's own evaluation. The measures are also written to each run
    folder and its report.
    """
    from spdfq.runs.inspection import measure_runs

    rows = measure_runs(folders, overrides=overrides, device=device, sheet=sheet, progress=options.progress(quiet))
    if as_json:
        options.print_json(rows)
    else:
        _print_table(rows, sheet)


def _print_table(rows: list[dict[str, Any]], sheet: Path | None) -> None:
    from rich.box import SIMPLE
    from rich.table import Table

    from spdfq.report.image_quality import COLUMNS, two_decimals

    real = ", ".join(dict.fromkeys(str(row["real_images"]) for row in rows if row["real_images"]))
    aligned = f"; alignment to the classes of {real} real images" if real else ""
    caption = f"Top-1 of the quantized model in percent, simulated{aligned}."
    table = Table(box=SIMPLE, pad_edge=False, caption=caption, caption_justify="left")
    for heading in ("run", "source"):
        table.add_column(heading, overflow="fold")
    for heading in ("top-1", *(heading for heading, _, _ in COLUMNS)):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        cells = [two_decimals(row[key]) or "-" for _, key, _ in COLUMNS]
        table.add_row(row["name"], row["source"], f"{row['quantized_top1']:.2f}", *cells)
    console = options.console()
    console.print(table)
    for line in dict.fromkeys(f"{row['name']}: {note}" for row in rows for note in row["notes"]):
        options.note(line)
    if sheet:
        console.print(f"sheet   {sheet}", soft_wrap=True)
