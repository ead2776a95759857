"""Finished runs: their recipe, their record, and whether a model is still their teacher."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from spdfq.data.classes import class_names
from spdfq.errors import AGAIN, DataError, RecipeError, shown
from spdfq.recipe import Recipe, load_recipe
from spdfq.recipe.files import listed
from spdfq.recipe.toml import value
from spdfq.report.json_file import read_json
from spdfq.teacher import Teacher


def finished_recipe(folder: str | Path, overrides: Iterable[str] = ()) -> Recipe:
    """The recipe of a finished run, with changes to its evaluation or runtime section.

    Raises:
        RecipeError: not a run folder, or an override of another section.
    """
    overrides = listed(overrides)
    if fixed := [line for line in overrides if not line.strip().startswith(("evaluation", "runtime"))]:
        raise RecipeError([f"--set {line}: cannot change a finished run; run its recipe.toml again" for line in fixed])
    path = Path(folder) / "recipe.toml"
    if not path.is_file():
        raise RecipeError([f"{folder}: not a run folder (it holds no recipe.toml); give the folder a run printed"])
    return load_recipe(str(path), overrides)


def measured_on(folder: str | Path | None, overrides: Iterable[str]) -> tuple[str, ...]:
    """Overrides with the one that measures on a folder with a subfolder of images for each class.

    Args:
        folder: ``None`` for the overrides alone.
        overrides: further ones, such as ``evaluation.dataset.limit=500``.

    Raises:
        RecipeError: the overrides name another dataset.
    """
    overrides = listed(overrides)
    if folder is None:
        return overrides
    if not isinstance(folder, (str, Path)):
        raise RecipeError([f"on: expected the path of a folder, got {shown(folder)}"])
    if other := [line for line in overrides if line.partition("=")[0].strip() in ("evaluation", "evaluation.dataset")]:
        raise RecipeError(
            [f"--set {line}: --on {folder} says what to measure on; leave one of them out" for line in other]
        )
    return (f"evaluation.dataset={value({'type': 'image_folder', 'root': str(folder)})}", *overrides)


def check_teacher(folder: str | Path, found: dict[str, Any], fingerprint: str) -> None:
    """Check that a model is the one that a finished run quantized.

    Args:
        folder: of the run.
        found: its `run_record`.
        fingerprint: of the model.

    Raises:
        DataError: the recipe in the folder or the weights have changed since.
    """
    model = found.get("model", {})
    if not isinstance(model, dict):
        raise DataError(f"{Path(folder) / 'run.json'}: damaged; {AGAIN}")
    if model.get("fingerprint") not in (None, fingerprint):
        raise DataError(
            f"{folder}: recipe.toml or the weights have changed, so its model is no longer the one that was quantized; "
            "run it again"
        )


def finished_record(folder: str | Path, remedy: str = "give the folder of a finished run") -> dict[str, Any]:
    """The contents of a run folder's ``run.json``.

    Args:
        folder: of the run.
        remedy: the end of the message if there is no ``run.json``.

    Raises:
        DataError: it is missing or damaged.
    """
    path = Path(folder) / "run.json"
    if not path.is_file():
        raise DataError(f"{folder}: has no run.json; {remedy}")
    found = read_json(path)
    if not found:
        raise DataError(f"{path}: damaged (it is empty); {AGAIN}")
    for section in ("model", "metrics"):
        if not isinstance(found.get(section, {}), dict):
            raise DataError(f"{path}: damaged ({section}: expected an object, got {shown(found[section])}); {AGAIN}")
    return found


def saved_class_names(record: dict[str, Any], teacher: Teacher, recipe: Recipe) -> list[str]:
    """The names of the classes that a run saved; for a run of an older version, as it would save them now."""
    return record.get("model", {}).get("class_names") or class_names(teacher, recipe.evaluation.dataset)


def run_record(folder: str | Path) -> dict[str, Any]:
    """The contents of a run folder's ``run.json``; empty if it is missing or damaged."""
    try:
        return read_json(Path(folder) / "run.json")
    except DataError:
        return {}
