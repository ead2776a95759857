"""Commands that work on one recipe: run, evaluate, check."""

import shlex
from pathlib import Path
from typing import Any

import click
from spdfq_cli import options


@click.command()
@click.argument("recipe", metavar="NAME|FILE.toml")
@options.overrides
@click.option("--seed", type=click.IntRange(min=0), help="Seed of every random draw.")
@options.out
@options.device
@click.option("--fresh", is_flag=True, help="Do every stage again instead of reusing finished ones.")
@options.quiet
@options.as_json
def run(
    recipe: str,
    overrides: tuple[str, ...],
    seed: int | None,
    out: str | None,
    device: str | None,
    fresh: bool,
    quiet: bool,
    as_json: bool,
) -> None:
    """Run a recipe and write its run folder."""
    from spdfq.runs import pipeline
    from spdfq.runs.finished import finished_record
    from spdfq.runtime.ranks import join

    result = pipeline.run(
        recipe,
        overrides=overrides,
        seed=seed,
        out=Path(out) if out else None,
        device=device,
        fresh=fresh,
        progress=options.progress(quiet),
        announce=options.announce(quiet),
    )
    if not join().leads:
        return
    record = finished_record(result.folder)
    if as_json:
        options.print_json({**record, "folder": str(result.folder)})
    else:
        click.echo("\n".join(summary(record, result.folder, recipe)))


@click.command()
@click.argument("measured", metavar="RUN|FILE.onnx", type=click.Path(path_type=Path))
@click.option("--on", metavar="DIR", type=click.Path(path_type=Path), help="A folder with a subfolder for each class.")
@options.overrides
@options.device
@options.quiet
@options.as_json
def evaluate(
    measured: Path, on: Path | None, overrides: tuple[str, ...], device: str | None, quiet: bool, as_json: bool
) -> None:
    """Measure a finished run again, or an exported file.

    A run is simulated, on its own images unless --on or --set names others. A file is run in onnxruntime, on the images
    that --on or --set names, for example --set 'evaluation.dataset={type="image_list", root="val", labels="val.txt"}'.
    """
    from spdfq.runs import pipeline
    from spdfq.runs.evaluate_file import evaluate_file
    from spdfq.runtime.ranks import join

    is_run = measured.is_dir() or not measured.suffix
    metrics = (pipeline.evaluate_run if is_run else evaluate_file)(
        measured,
        on=on,
        overrides=overrides,
        device=device,
        progress=options.progress(quiet),
        announce=options.announce(quiet),
    )
    if not join().leads:
        return
    if as_json:
        options.print_json({"folder" if is_run else "file": str(measured), "metrics": metrics})
    else:
        click.echo("\n".join(accuracy(metrics) if is_run else measured_in_runtime(measured, metrics)))


@click.command()
@click.argument("recipe", metavar="NAME|FILE.toml")
@options.overrides
def check(recipe: str, overrides: tuple[str, ...]) -> None:
    """Check a recipe; all problems at once."""
    from spdfq.runs import pipeline

    warnings, in_float = pipeline.check_and_count(recipe, overrides=overrides)
    for warning in warnings:
        click.echo(f"warning: {warning}")
    click.echo(f"{in_float:.2f} % of the multiplications have an operand in float")
    click.echo("ok")


def summary(record: dict[str, Any], folder: Path, recipe: str) -> list[str]:
    """The last lines of a run: accuracy, controls, size, where the results are, and what to type next."""
    from spdfq.report.page import bits_label

    backend, stages = record["backend"], record["stages"]
    size = {name: f"{count / 1e6:.2f} MB" for name, count in record["size"].items()}
    return [
        f"{record['name']}: {bits_label(backend)} of {record['model']['name']}, placement {backend['placement']}",
        *accuracy(record["metrics"]),
        *controls(record),
        *([f"published  {record['published']['line']}"] if record.get("published") else []),
        f"size       {size['float']} in float32 -> {size['quantized']} packed",
        f"seconds    {_seconds(stages)}",
        f"folder     {folder}",
        f"report     {folder / 'report.html'}",
        f"next       {_next(recipe, folder)}",
    ]


def accuracy(metrics: dict[str, Any]) -> list[str]:
    """The accuracy before and after."""
    from spdfq.evaluation.accuracy import left_out

    before, after = metrics["fp"]["top1"], metrics["quantized"]["top1"]
    simulated = " (simulated)" if metrics.get("simulated") else ""
    by, close = metrics.get("measure", "top-1"), metrics.get("similarity")
    damaged = metrics.get("damaged")
    return [
        f"{by:<10} {before:.2f} % FP -> {after:.2f} % quantized{simulated}, {metrics['images']} images",
        f"agreement  {metrics['agreement']:.2f} % of the images get the same first class",
        *([] if close is None else [f"similarity {close:.4f} mean cosine of quantized to full-precision features"]),
        *([f"damaged    {left_out(damaged)}"] if damaged else []),
    ]


def measured_in_runtime(file: Path, metrics: dict[str, Any]) -> list[str]:
    """The accuracy of an exported file."""
    from spdfq.evaluation.accuracy import left_out

    where = f"measured in {metrics['runtime']} {metrics['version']}, {metrics['images']} images"
    simulated = metrics["simulated"] or {}
    said = simulated.get("top1") is not None
    return [
        f"file       {file}",
        f"top-1      {metrics['top1']:.2f} % {where}",
        *([f"top-5      {metrics['top5']:.2f} %"] if "top5" in metrics else []),
        *([f"simulated  {simulated['top1']:.2f} % top-1 in its run, {simulated['images']} images"] if said else []),
        *([f"damaged    {left_out(metrics['damaged'])}"] if metrics["damaged"] else []),
    ]


def controls(record: dict[str, Any]) -> list[str]:
    """The run's own row and those of its controls, which differ in their images alone."""
    if not record["controls"]:
        return []
    rows = [("this run", record["metrics"]), *((row["name"], row["metrics"]) for row in record["controls"])]
    width = max(len(name) for name, _ in rows)
    return [
        f"{'controls   ' if index == 0 else ' ' * 11}{name:<{width}}  {metrics['quantized']['top1']:6.2f} %, agreement "
        f"{metrics['agreement']:6.2f} %"
        for index, (name, metrics) in enumerate(rows)
    ]


def _seconds(stages: dict[str, dict[str, Any]]) -> str:
    """The seconds of each stage; those of all controls as one sum."""
    own = {name: stage for name, stage in stages.items() if ": " not in name}
    shown = [_stage(name, stage) for name, stage in own.items()]
    if len(own) < len(stages):
        shown.append(f"controls {sum(stage['seconds'] for name, stage in stages.items() if name not in own):.1f}")
    return ", ".join(shown)


def _stage(name: str, stage: dict[str, Any]) -> str:
    return f"{name} {stage['seconds']:.1f}" + (" (reused)" if stage["reused"] else "")


def _next(recipe: str, folder: Path) -> str:
    """What a user would type after this run."""
    if recipe.endswith(".toml"):
        return f"spdfq measure {shlex.quote(str(folder))}   (the quality of its images)"
    return f"spdfq init {recipe} > my.toml && spdfq run my.toml   (edit my.toml in between)"
