"""The export command."""

from pathlib import Path
from typing import Any

import click
from spdfq_cli import options


@click.command()
@click.argument("folder", metavar="RUN", type=click.Path(path_type=Path))
@click.option("--format", "format_", default="onnx", show_default=True, help="onnx, pt2 or safetensors.")
@click.option(
    "--softmax",
    type=click.Choice(["float", "uniform8"]),
    default="float",
    show_default=True,
    help="Quantizers of activations that are not uniform: float operations, or 8-bit integers instead.",
)
@click.option("--check", is_flag=True, help="Run the file on the run's evaluation images.")
@click.option("--out", type=click.Path(path_type=Path), metavar="FILE", help="The file to write.")
@options.quiet
@options.as_json
def export(folder: Path, format_: str, softmax: str, check: bool, out: Path | None, quiet: bool, as_json: bool) -> None:
    """Write the model of a finished run for other software.

    By default the file is model.onnx in the run folder. It holds integers.
    """
    from spdfq.runs.exporting import export_run

    done = export_run(
        folder,
        format=format_,
        softmax=softmax,
        out=out,
        check=check,
        progress=options.progress(quiet),
        announce=lambda line: options.note(f"note: {line}"),
    )
    if as_json:
        options.print_json(done)
    else:
        click.echo("\n".join(lines(done)))


def lines(done: dict[str, Any]) -> list[str]:
    """The file, its size, and what each runtime measured."""
    found = [f"file       {done['file']}", f"size       {done['size'] / 1e6:.2f} MB"]
    for row in done["measured"]:
        found += _measured(row)
    return found


def _measured(row: dict[str, Any]) -> list[str]:
    from spdfq.report.exports import float_products, products

    cost = "" if row["simulated_top1"] == row["run_top1"] else f"; the run's own simulation {row['run_top1']:.2f} %"
    found = [
        f"top-1      {row['top1']:.2f} % measured in {row['runtime']} {row['version']}, {row['images']} images "
        f"(simulated {row['simulated_top1']:.2f} %{cost})",
        f"agreement  {row['agreement']:.2f} % of the images get the same first class as in the simulation",
    ]
    if row["integer_products"] is not None:
        found.append(f"integers   {products(row)} (quantized products that are integer kernels)")
    found.append(
        f"speed      {row['milliseconds']:.2f} ms for one image, {row['float_milliseconds']:.2f} ms in full precision "
        f"in torch (threads: {row['threads']})"
    )
    if row["float_products"]:
        found.append(f"in float   {float_products(row)}")
    return found
