"""The report: one HTML page without scripts or anything to fetch, built from a run folder alone."""

import json
from importlib.resources import files
from pathlib import Path
from typing import Any

from spdfq.errors import DataError
from spdfq.report.curves import curves
from spdfq.report.markup import facts, percent, picture, seconds, section, text
from spdfq.report.measures import MEASURES_FILE, measures
from spdfq.report.pictures import SHOWN
from spdfq.report.sites import site_tables

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="description" content="{accuracy}">
<title>{name} - spdfq</title>
<style>
{style}</style>
</head>
<body>
<main>
{body}
</main>
</body>
</html>
"""


def write_report(folder: Path) -> Path:
    """Write ``report.html`` from what a run folder holds; pieces that are not there are left out.

    Args:
        folder: a run folder with at least ``run.json``.

    Returns:
        The path of the page.

    Raises:
        DataError: ``run.json`` is missing, or a file of the folder is damaged.
    """
    run = _read_json(folder / "run.json")
    if run is None:
        raise DataError(f"{folder}: has no run.json; give the folder of a finished run")
    try:
        page = _page(folder, run, _read_json(folder / "sites.json") or {})
    except KeyError as error:
        raise DataError(
            f"{folder}: run.json, sites.json or {MEASURES_FILE} lacks {error}; run the recipe again with --fresh"
        ) from None
    path = folder / "report.html"
    path.write_text(page, encoding="utf-8")
    return path


def _page(folder: Path, run: dict[str, Any], sites: dict[str, Any]) -> str:
    parts = [
        _header(run),
        section("Warnings", *(f'<p class="warning">{text(line)}</p>' for line in run.get("warnings", ()))),
        _images(folder, run),
        measures(_read_json(folder / MEASURES_FILE)),
        _attention(folder),
        _losses(folder),
        _timings(run),
        site_tables(sites),
        _recipe(folder / "recipe.toml"),
        section("Environment", facts(_environment(run))),
    ]
    return _PAGE.format(
        accuracy=text(accuracy_line(run)),
        name=text(run["name"]),
        style=files(__package__).joinpath("style.css").read_text(encoding="utf-8"),
        body="\n".join(part for part in parts if part),
    )


def accuracy_line(run: dict[str, Any]) -> str:
    """One line from the contents of a ``run.json``: both accuracies, on how many images, and the agreement."""
    metrics = run["metrics"]
    full, low = percent(metrics["fp"]["top1"]), percent(metrics["quantized"]["top1"])
    return f"FP {full} → {run['backend']['label']} {low} {_measured(metrics)}"


def _measured(metrics: dict[str, Any]) -> str:
    simulated = " (simulated)" if metrics.get("simulated") else ""
    agreement = percent(metrics.get("agreement"))
    return f"{metrics.get('measure', 'top-1')}{simulated}, {metrics['images']} images" + (
        f", agreement {agreement}" if agreement else ""
    )


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise DataError(f"{path}: not valid JSON ({error}); run the recipe again with --fresh") from None
    if not isinstance(found, dict):
        raise DataError(f"{path}: damaged; run the recipe again with --fresh")
    return found


def _header(run: dict[str, Any]) -> str:
    metrics, label = run["metrics"], run["backend"]["label"]
    full, low = metrics["fp"], metrics["quantized"]
    return f"""<header>
<p class="over">spdfq run</p>
<h1>{text(run["name"])}</h1>
<p class="model">{text(_model(run["model"]))}</p>
<p class="accuracy"><span><small>FP</small> {percent(full["top1"])}</span> <span class="arrow">→</span>
<span class="low"><small>{text(label)}</small> {percent(low["top1"])}</span></p>
<p class="unit">{text(_measured(metrics))}</p>
{facts(_outcome(run))}
</header>"""


def _model(model: dict[str, Any]) -> str:
    size = " × ".join(map(str, model["input_size"]))
    parameters = f"{model['parameters'] / 1e6:.2f} M parameters"
    head = f"{model['num_classes']} classes" if model["num_classes"] else "no head"
    return f"{model['name']}, {parameters}, {size} input, {head}"


def _outcome(run: dict[str, Any]) -> list[tuple[str, Any]]:
    metrics = run["metrics"]
    full, low = metrics["fp"], metrics["quantized"]
    # of the rounded values, so that it is the difference of the two numbers shown
    change = f"{round(low['top1'], 1) - round(full['top1'], 1):+.1f} points".replace("-", "\N{MINUS SIGN}")
    both = [percent(side["top5"]) or "" for side in (full, low) if side.get("top5") is not None]
    return [
        ("Change", change),
        ("Top-5", " → ".join(both) if len(both) == 2 else None),
        ("Feature similarity", f"{metrics['similarity']:.4f}" if "similarity" in metrics else None),
        ("Images", f"{run['images']['count']}, {run['images']['type']}"),
        ("Back-end", ", ".join(run["backend"]["steps"])),
        ("Placement", run["backend"].get("placement")),
        ("Published", _published(run.get("published"))),
    ]


def _published(found: dict[str, Any] | None) -> str | None:
    if not found:
        return None
    row = "" if found["top1"] is None else f"; {found['method']}, {found['paper']}"
    return f"{found['line']}{row}"


def _images(folder: Path, run: dict[str, Any]) -> str:
    count = run["images"]["count"]
    caption = f"{count} calibration images as the model sees them, normalisation undone"
    shown = f"; the first {SHOWN} are shown" if count > SHOWN else ""
    told = "Grid of the calibration images"
    return section("Images", picture(folder / "synthetic.png", "", told, f"{caption}{shown}."))


def _attention(folder: Path) -> str:
    caption = (
        "The prior drawn for the first head of a block, beside the attention that this head reached. Both are shares "
        "of their sum; a pair has one scale, from dark at zero to pale at the higher peak of the two."
    )
    told = "Heat maps of attention priors, each beside the attention that was reached"
    return section("Attention", picture(folder / "attention.png", "wide", told, caption))


def _losses(folder: Path) -> str:
    drawn = curves(folder / "losses.csv")
    note = "Each loss before its weight; total is the weighted sum, gradient the norm of its gradient to the images."
    return section("Losses", drawn, f"<p>{note}</p>" if drawn else "")


def _timings(run: dict[str, Any]) -> str:
    stages = run.get("stages", {})
    if not stages:
        return ""
    longest = max(stage["seconds"] for stage in stages.values()) or 1
    rows = "".join(_stage(name, stage, longest) for name, stage in stages.items())
    total = seconds(sum(stage["seconds"] for stage in stages.values()))
    return section("Time", f'<div class="stages">{rows}<b>total</b><b class="number">{total}</b></div>')


def _stage(name: str, stage: dict[str, Any], longest: float) -> str:
    share = 100 * stage["seconds"] / longest
    reused = '<em title="taken from the store of earlier runs">reused</em>'
    bar = reused if stage["reused"] else f'<i style="width:{share:.1f}%"></i>'
    time = f'<span class="number">{seconds(stage["seconds"])}</span>'
    return f'<span>{text(name)}</span>{time}<span class="bar">{bar}</span>'


def _recipe(path: Path) -> str:
    if not path.is_file():
        return ""
    lines = [text(line) for line in path.read_text(encoding="utf-8").splitlines()]
    shown = "\n".join(f"<b>{line}</b>" if line.startswith("[") else line for line in lines)
    return section("Recipe", f'<pre class="box" tabindex="0">{shown}</pre>')


def _environment(run: dict[str, Any]) -> list[tuple[str, Any]]:
    device = ", ".join(dict.fromkeys(filter(None, (run.get("device"), run.get("device_name")))))
    return [
        ("Started", run["started"].replace("T", " ", 1) if "started" in run else None),
        ("Device", device or None),
        ("Precision", run.get("precision")),
        ("Threads", run.get("threads")),
        ("Seed", run.get("seed")),
        *run.get("versions", {}).items(),
        ("Commit", (run.get("git_commit") or "")[:12] or None),
    ]
