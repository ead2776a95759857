"""Everything that can be wrong with a run and be seen before anything is computed."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from spdfq.backends.quantize import check_quantization
from spdfq.errors import MissingDataError, RecipeError, SpdfqError
from spdfq.evaluation.evaluator import evaluator_for
from spdfq.recipe import Recipe
from spdfq.runs.finished import run_record
from spdfq.runs.provenance import data_fingerprints
from spdfq.teacher import Teacher, load_teacher
from spdfq.teacher.architectures import notes


def refuse_own_recipe(source: Any, folder: Path) -> None:
    """Refuse a run that would overwrite the recipe.toml it was given.

    Raises:
        RecipeError: the folder holds that recipe and no finished run.
    """
    given = isinstance(source, (str, Path)) and Path(source).resolve() == (folder / "recipe.toml").resolve()
    if given and not run_record(folder):
        raise RecipeError([f"{source}: the run's own recipe.toml would replace it; choose another --out"])


def checked_teacher(recipe: Recipe) -> tuple[Teacher, list[str]]:
    """Check the whole recipe, and return the teacher and the warnings.

    Raises:
        SpdfqError: with every problem found.
    """
    # data first: a missing folder is reported before weights are downloaded
    data_fingerprints((recipe.synthesis, recipe.controls, recipe.evaluation))
    teacher = load_teacher(recipe.model)
    doubts = [
        line
        for key, source in recipe.sources()
        for line in (*_shared_images(key, source, recipe), *_other_task(key, source, recipe, teacher))
    ]
    return teacher, [*check_fit(recipe, teacher), *notes(recipe.model, teacher.module), *doubts]


def check_fit(recipe: Recipe, teacher: Teacher) -> list[str]:
    """Check that the recipe's parts work with this teacher, and return the warnings.

    The classes of the evaluation images are checked if the images are there.

    Raises:
        RecipeError: with every problem found.
    """
    problems: list[str] = []
    warnings = recipe.warnings()

    def attempt(check: Callable[[], object], key: str = "") -> None:
        try:
            check()
        except MissingDataError:
            pass
        except SpdfqError as error:
            problems.extend(placed(problem, key) for problem in str(error).splitlines())

    for key, source in recipe.sources():
        attempt(partial(source.check, teacher), key)
    attempt(lambda: warnings.extend(check_quantization(teacher, recipe.quantization)))
    attempt(lambda: evaluator_for(teacher).check(recipe.evaluation, teacher))
    attempt(lambda: warnings.extend(check_classes(recipe, teacher)))
    if recipe.runtime.tracker is not None:
        attempt(recipe.runtime.tracker.check)
    if problems:
        raise RecipeError(problems)
    return warnings


def check_classes(recipe: Recipe, teacher: Teacher) -> list[str]:
    """Check that the labels of the evaluation images are positions in the teacher's list of classes.

    Returns:
        A line for each doubt.

    Raises:
        DataError: they are not.
        MissingDataError: the images are missing.
    """
    if teacher.headless:
        return []
    recipe.evaluation.dataset.check_classes(teacher)
    return recipe.evaluation.dataset.class_warnings(teacher)


def placed(problem: str, key: str) -> str:
    """A problem of a source of images, which says ``synthesis`` or no key at all, with the key of that source."""
    if key in ("", "synthesis"):
        return problem
    return key + problem.removeprefix("synthesis") if problem.startswith("synthesis") else f"{key}: {problem}"


def _shared_images(key: str, source: Any, recipe: Recipe) -> list[str]:
    """A warning if real calibration images are also among the images that the accuracy is measured on."""
    dataset = getattr(source, "dataset", None)
    if not (shared := dataset and set(dataset.identities()) & set(recipe.evaluation.dataset.identities())):
        return []
    first = f"the first of them {min(shared)}"
    return [f"{key}.dataset: {len(shared):,} of its images are evaluation.dataset's too, {first}; give others"]


def _other_task(key: str, source: Any, recipe: Recipe, teacher: Teacher) -> list[str]:
    """A warning if real calibration images are of another dataset than the evaluation's, with other classes."""
    dataset = getattr(source, "dataset", None)
    if dataset is None or teacher.headless or type(dataset) is type(recipe.evaluation.dataset):
        return []
    if dataset.classes in (None, 1, teacher.num_classes):  # 1: a folder of calibration images
        return []
    return [
        f"{key}.dataset: has {dataset.classes:,} classes, {teacher.name} knows {teacher.num_classes:,}; give images "
        "that the model is meant for, or leave this source out"
    ]
