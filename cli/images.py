"""The images command."""

from pathlib import Path
from typing import Any

import click
from spdfq_cli import options


@click.command()
@click.argument("folder", metavar="RUN", type=click.Path(path_type=Path))
@click.option("--to", required=True, metavar="FILE.npz|DIR", help="A file of arrays, or a folder of PNG pictures.")
@options.as_json
def images(folder: Path, to: str, as_json: bool) -> None:
    """Write the calibration images of a finished run for other tools.

    FILE.npz holds the images as the model takes them: float32, normalised. The pictures in DIR have 8 bits.
    """
    from spdfq.runs.calibration_images import export_images

    done = export_images(folder, to)
    if as_json:
        options.print_json(done)
    else:
        click.echo("\n".join(lines(done)))


def lines(done: dict[str, Any]) -> list[str]:
    """Where the images are, what they are, and what rounding has changed."""
    height, width = done["size"]
    found = [
        f"written    {done['file']}",
        f"images     {done['images']} of {height} × {width} pixels, source {done['source']}",
        f"mean, std  {_numbers(done['mean'])}; {_numbers(done['std'])}",
    ]
    if lost := done["rounding"]:
        found.append(
            f"8 bits     change a value of the model's input by {lost['mean']:.4f} on average and at most "
            f"{lost['largest']:.4f}; {lost['clipped']:.2f} % of the values were outside black to white"
        )
    return found


def _numbers(values: list[float]) -> str:
    return ", ".join(f"{value:g}" for value in values)
