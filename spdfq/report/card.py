"""The model card of a run: a README.md for the Hugging Face hub, from the files of the run folder."""

import hashlib
import math
from functools import cache
from pathlib import Path
from typing import Any

from attrs import frozen
from jinja2 import Environment, PackageLoader

from spdfq.errors import DataError
from spdfq.report.exports import known_exports, products
from spdfq.report.page import bits_label, percent
from spdfq.runtime.files import write_text

CARD_FILE = "README.md"
_MARK = "<!-- written by spdfq card; sha256 of the text above: "
_FILES = {
    "quantized/model.safetensors": "packed integers, for `spdfq.load_quantized`",
    "quantized/config.json": "how to rebuild the network from them",
    "synthetic.safetensors": "the calibration images",
    "recipe.toml": "the recipe",
    "sites.json": "every quantized tensor, and what is not quantized",
    "report.html": "the report of the run",
}
_FORMATS = {
    "onnx": "ONNX with integers, for onnxruntime and OpenVINO",
    "pt2": "a program of torch.export with integer weights",
    "safetensors": "float32 weights with the values of the quantized ones, for timm",
}


@frozen(kw_only=True)
class CardFacts:
    """What a card says besides what the run folder says.

    Args:
        front_matter: YAML.
        base: the model that was quantized, in Markdown.
        data_free: whether no real image took part.
        dataset: what the accuracy was measured on.
        teacher: the description of the input in ``quantized/config.json``.
        mode: Pillow's mode of the model's channels; ``None`` if it has none.
        recipe: the sections on images and quantization, as TOML.
        limits: lines.
    """

    front_matter: str
    base: str
    data_free: bool
    dataset: str
    teacher: dict[str, Any]
    mode: str | None
    recipe: str
    limits: tuple[str, ...]


def exported_files(folder: Path) -> dict[str, dict[str, Any]]:
    """The exported files in a run folder that are still there, by name."""
    return {name: entry for name, entry in known_exports(folder).items() if _inside(folder, name)}


def check_card(folder: Path) -> None:
    """Check that a README.md in a folder may be replaced.

    Raises:
        DataError: it was written or changed by somebody else.
    """
    path = folder / CARD_FILE
    if path.exists() and not _unchanged(path):
        raise DataError(f"{path}: was not written by 'spdfq card', or was edited since; move it, and run this again")


def write_card(folder: Path, run: dict[str, Any], facts: CardFacts) -> Path:
    """Write ``README.md`` into a run folder.

    Args:
        folder: of the run.
        run: the contents of its ``run.json``.
        facts: the rest.

    Returns:
        The path of the card.

    Raises:
        DataError: a README.md of somebody else is there, a file of the folder is damaged, or there is no room.
    """
    check_card(folder)
    try:
        text = _templates().get_template("card.md").render(_content(folder, run, facts)).rstrip() + "\n"
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise DataError(f"{folder}: run.json or exports.json is damaged ({error}); run the recipe again") from None
    write_text(folder / CARD_FILE, f"{text}\n{_MARK}{_digest(text)} -->\n")
    return folder / CARD_FILE


@cache
def _templates() -> Environment:
    return Environment(
        loader=PackageLoader("spdfq.report"),
        autoescape=False,  # it is Markdown
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )


def _content(folder: Path, run: dict[str, Any], facts: CardFacts) -> dict[str, Any]:
    exports = exported_files(folder)
    onnx = next((name for name, entry in exports.items() if entry["format"] == "onnx"), None)
    checked = any(entry["measured"] for entry in exports.values())
    return {
        "front_matter": facts.front_matter.strip(),
        "title": folder.resolve().name,
        "label": bits_label(run["backend"]),
        "base": facts.base,
        "data_free": facts.data_free,
        "images": run["images"],
        "measure": run["metrics"].get("measure", "top-1"),
        "measured": _measured(run, exports),
        "dataset": facts.dataset,
        "checked": checked,
        "kernels": _kernels(exports),
        "files": _files(folder, exports),
        "onnx": onnx,
        "pillow": _pillow(facts),
        "headless": not run["model"]["num_classes"],
        "backend": run["backend"],
        "seed": run["seed"],
        "device": f"{run['device_name']}, {run['precision']}, {run['threads']} threads",
        "versions": run["versions"],
        "version_line": ", ".join(f"{name} {number}" for name, number in run["versions"].items()),
        "recipe_digest": run["recipe_digest"],
        "recipe": facts.recipe.strip(),
        "limits": facts.limits,
    }


def _measured(run: dict[str, Any], exports: dict[str, dict[str, Any]]) -> list[tuple[str, ...]]:
    metrics, torch = run["metrics"], f"torch {run['versions']['torch']}"
    count = f"{metrics['images']:,}"
    where = f"simulated in {torch}" if metrics.get("simulated") else torch
    agreement = f"{percent(metrics['agreement'])}, compared with full precision"
    rows: list[tuple[str, ...]] = [
        ("full precision", torch, percent(metrics["fp"]["top1"]), "", count),
        ("quantized", where, percent(metrics["quantized"]["top1"]), agreement, count),
    ]
    for name, entry in exports.items():
        for row in entry["measured"]:
            same = f"{percent(row['agreement'])}, compared with the simulation"
            runtime = f"measured in {row['runtime']} {row['version']}"
            rows.append((f"`{name}`", runtime, percent(row["top1"]), same, f"{row['images']:,}"))
    return rows


def _kernels(exports: dict[str, dict[str, Any]]) -> list[str]:
    """How many quantized products of each measured file are integer kernels, and what is computed in float."""
    return [
        f"`{name}` in {row['runtime']} {row['version']}: {products(row)} quantized products are integer kernels"
        + (f"; in float: {', '.join(row['float_products'])}" if row["float_products"] else "")
        for name, entry in exports.items()
        for row in entry["measured"]
        if row["integer_products"] is not None
    ]


def _files(folder: Path, exports: dict[str, dict[str, Any]]) -> list[tuple[str, str, str]]:
    named = {name: _FORMATS.get(entry["format"], entry["format"]) for name, entry in exports.items()} | _FILES
    return [
        (f"`{name}`", what, f"{(folder / name).stat().st_size / 1e6:.2f}")
        for name, what in named.items()
        if (folder / name).is_file()
    ]


def _pillow(facts: CardFacts) -> dict[str, Any] | None:
    """How Pillow prepares a picture as timm does; ``None`` for ways that take more than a resize and a crop."""
    teacher = facts.teacher
    height, width = teacher["input_size"][1:]
    squash, crop = teacher.get("crop_mode") == "squash", teacher.get("crop_pct", 1.0)
    if facts.mode is None or crop > 1 or not (squash or (teacher.get("crop_mode") == "center" and height == width)):
        return None
    return {
        "mode": facts.mode,
        "squash": squash,
        "height": height,
        "width": width,
        "high": math.floor(height / crop),
        "wide": math.floor(width / crop),
        "interpolation": teacher["interpolation"].upper(),
    }


def _inside(folder: Path, name: str) -> bool:
    return not Path(name).is_absolute() and (folder / name).is_file()


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _unchanged(path: Path) -> bool:
    text, mark, rest = path.read_text(encoding="utf-8", errors="replace").rpartition(f"\n{_MARK}")
    return bool(mark) and rest == f"{_digest(text)} -->\n"
