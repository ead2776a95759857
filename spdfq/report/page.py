"""The report: one HTML page without scripts or anything to fetch, built only from the files of a run folder.

This module collects what the page says; the templates say how it looks.
"""

import base64
from collections.abc import Callable
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, TypeVar

from jinja2 import Environment, PackageLoader
from markupsafe import Markup

from spdfq.errors import DataError, reading
from spdfq.report.curves import curves
from spdfq.report.diagnosis import DIAGNOSIS_FILE, diagnosis_section
from spdfq.report.explained import Explained
from spdfq.report.exports import EXPORT_AGAIN, EXPORTS_FILE, exports_section, known_exports, measured_lines
from spdfq.report.image_quality import MEASURES_FILE, quality_section
from spdfq.report.images import pictures
from spdfq.report.json_file import read_json
from spdfq.report.pictures import SHOWN
from spdfq.report.site_noise import NOISE_FILE, heat_map
from spdfq.report.sites import site_tables

T = TypeVar("T")

PAGE = "report.html"
"""Name of the page in the folder of a run, and of a bench."""


def write_report(folder: Path) -> Path:
    """Write ``report.html`` from the files of a run folder; sections whose file is missing are left out.

    Args:
        folder: a run folder with at least ``run.json``.

    Returns:
        The path of the page.

    Raises:
        DataError: ``run.json`` is missing, a file of the folder is damaged, or the page cannot be written.
    """
    from spdfq.runtime.files import write_text  # imports torch, which this package does not need otherwise

    path = folder / "run.json"
    if not path.is_file():
        raise DataError(f"{folder}: has no run.json; give the folder of a finished run")
    run = read_json(path)
    with reading(path):  # the other files are checked as they are read
        text = templates().get_template("page.html").render(_content(folder, run))
    write_text(folder / PAGE, text)
    return folder / PAGE


@cache
def templates() -> Environment:
    """The environment of all pages."""
    return Environment(
        loader=PackageLoader("spdfq.report"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        finalize=lambda value: "" if value is None else value,
    )


def _content(folder: Path, run: dict[str, Any]) -> dict[str, Any]:
    """The values of the template's variables."""
    metrics, stages, names = run["metrics"], run.get("stages", {}), Explained.of(folder)
    with reading(folder / EXPORTS_FILE, EXPORT_AGAIN):
        exports = known_exports(folder)
        files, export_tables = measured_lines(exports), exports_section(exports)
    diagnosis = _read(folder / DIAGNOSIS_FILE, lambda found: found)
    return {
        "style": style(),
        "names": names,
        "name": run["name"],
        "accuracy": accuracy_line(run),
        "model": _model(run["model"]),
        "label": bits_label(run["backend"]),
        "full": percent(metrics["fp"]["top1"]),
        "low": percent(metrics["quantized"]["top1"]),
        "measured": _measured(metrics),
        "bars_of_controls": _bars(run),
        "outcome": _outcome(run),
        "files": files,
        "warnings": run.get("warnings", ()),
        "controls": _controls(run),
        "measure": metrics.get("measure", "top-1"),
        "pictures": pictures(folder, list(run["model"].get("class_names") or ())),
        "images": _encoded(folder / "synthetic.png"),
        "images_caption": _images_caption(run["images"]["count"]),
        "measures": _read(folder / MEASURES_FILE, quality_section),
        "diagnosis": _read(folder / DIAGNOSIS_FILE, diagnosis_section),
        "noise": _read(folder / NOISE_FILE, lambda found: heat_map(found, diagnosis)),
        "exports": export_tables,
        "attention": _encoded(folder / "attention.png"),
        "losses": curves(folder / "losses.csv", names.name),
        "stages": _stages(stages),
        "total_time": duration(sum(stage["seconds"] for stage in stages.values())),
        "sites": _read(folder / "sites.json", site_tables) or site_tables({}),
        "recipe": list(names.recipe(_lines(folder / "recipe.toml"))),
        "environment": _environment(run),
    }


def style() -> Markup:
    """The style sheet of all pages."""
    return Markup(files(__package__).joinpath("style.css").read_text(encoding="utf-8"))


def accuracy_line(run: dict[str, Any]) -> str:
    """One line from the contents of a ``run.json``: both accuracies, on how many images, and the agreement."""
    metrics = run["metrics"]
    full, low = percent(metrics["fp"]["top1"]), percent(metrics["quantized"]["top1"])
    return f"FP {full} → {bits_label(run['backend'])} {low} {_measured(metrics)}"


def bits_label(backend: dict[str, Any]) -> str:
    """The bits of the ``backend`` of a ``run.json``, with the share of multiplications in float if it is above 1 %."""
    percent = backend.get("percent_in_float", 0.0)
    weights_only = backend["label"].endswith("A32")  # which says it already
    return f"{backend['label']} ({percent:.1f} % in float)" if percent > 1 and not weights_only else backend["label"]


def percent(value: float) -> str:
    """``89.86 %``."""
    return f"{value:.2f} %"


def duration(seconds: float) -> str:
    """``4.2 s``, ``87 s``, ``12 min 05 s``."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{int(seconds) // 60} min {int(seconds) % 60:02d} s"


def _read(path: Path, shown: Callable[[dict[str, Any]], T]) -> T | None:
    """What the page shows of a JSON file; ``None`` without the file."""
    if not path.is_file():
        return None
    with reading(path):
        return shown(read_json(path))


def _encoded(path: Path) -> str | None:
    """A PNG file in base64; ``None`` without the file."""
    return base64.b64encode(path.read_bytes()).decode() if path.is_file() else None


def _lines(path: Path) -> list[str]:
    if not path.is_file():
        return []
    with reading(path):
        return path.read_text(encoding="utf-8").splitlines()


def _given(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def _model(model: dict[str, Any]) -> str:
    size = " × ".join(map(str, model["input_size"]))
    parameters = f"{model['parameters'] / 1e6:.2f} M parameters"
    head = f"{model['num_classes']} classes" if model["num_classes"] else "no head"
    return f"{model['name']}, {parameters}, {size} input, {head}"


def _measured(metrics: dict[str, Any]) -> str:
    simulated = " (simulated)" if metrics.get("simulated") else ""
    agreement = f", agreement {percent(metrics['agreement'])}" if "agreement" in metrics else ""
    return f"{metrics.get('measure', 'top-1')}{simulated}, {metrics['images']} images{agreement}"


def _outcome(run: dict[str, Any]) -> dict[str, Any]:
    metrics = run["metrics"]
    full, low = metrics["fp"], metrics["quantized"]
    # from the rounded values, so that it equals the difference of the two numbers shown
    change = f"{round(low['top1'], 2) - round(full['top1'], 2):+.2f} points".replace("-", "\N{MINUS SIGN}")
    both = [side["top5"] for side in (full, low) if side.get("top5") is not None]
    return _given(
        {
            "Change": change,
            "Top-5": " → ".join(map(percent, both)) if len(both) == 2 else None,
            "Feature similarity": f"{metrics['similarity']:.4f}" if "similarity" in metrics else None,
            "Calibration images": f"{run['images']['count']}, {run['images']['type']}",
            "Back-end": ", ".join(run["backend"]["steps"]),
            "Placement": run["backend"].get("placement"),
            "Size": _size(run),
            "Published": _published(run.get("published")),
        }
    )


def _bars(run: dict[str, Any]) -> list[dict[str, Any]]:
    """Top-1 of full precision, of this run and of each control, for the head of the page; none without controls."""
    if not run.get("controls"):
        return []
    named = [("FP", run["metrics"]["fp"]), ("this run", run["metrics"]["quantized"])]
    named += [(each["name"], each["metrics"]["quantized"]) for each in run["controls"]]
    return [
        {"name": name, "own": name == "this run", "value": percent(found["top1"]), "width": f"{found['top1']:.2f}"}
        for name, found in named
    ]


def _controls(run: dict[str, Any]) -> list[list[Any]]:
    """A row for the run's own images and one for those of each control; none without controls."""
    if not run.get("controls"):
        return []
    own = {"name": "this run", **run["images"], "metrics": run["metrics"]}

    def row(of: dict[str, Any]) -> list[Any]:
        metrics = of["metrics"]
        accuracy = percent(metrics["quantized"]["top1"]), percent(metrics["agreement"])
        return [of["name"], of["type"], of["count"], *accuracy]

    return [row(own), *map(row, run["controls"])]


def _size(run: dict[str, Any]) -> str | None:
    """``2.75 MB → 0.35 MB packed``."""
    if "size" not in run:
        return None
    before, after = (f"{run['size'][key] / 1e6:.2f} MB" for key in ("float", "quantized"))
    return f"{before} → {after} packed"


def _published(found: dict[str, Any] | None) -> str | None:
    if not found:
        return None
    row = "" if found["top1"] is None else f"; {found['method']}, {found['paper']}"
    return f"{found['line']}{row}"


def _images_caption(count: int) -> str:
    shown = f"; the first {SHOWN} are shown" if count > SHOWN else ""
    return f"{count} calibration images as the model sees them, without the normalisation{shown}."


def _stages(stages: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    longest = max((stage["seconds"] for stage in stages.values()), default=0) or 1
    return [
        {
            "name": name,
            "time": duration(stage["seconds"]),
            "reused": stage["reused"],
            "percent": f"{100 * stage['seconds'] / longest:.1f}",
        }
        for name, stage in stages.items()
    ]


def _environment(run: dict[str, Any]) -> dict[str, Any]:
    device = ", ".join(dict.fromkeys(filter(None, (run.get("device"), run.get("device_name")))))
    return _given(
        {
            "Started": run["started"].replace("T", " ", 1) if "started" in run else None,
            "Device": device or None,
            "Precision": run.get("precision"),
            "Threads": run.get("threads"),
            "Seed": run.get("seed"),
            **run.get("versions", {}),
            "Commit": (run.get("git_commit") or "")[:12] or None,
        }
    )
