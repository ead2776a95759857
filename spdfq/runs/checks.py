"""Everything that can be wrong with a run and be seen before anything is computed."""

from pathlib import Path
from typing import Any

from spdfq.backends.quantize import check_quantization
from spdfq.errors import RecipeError
from spdfq.evaluation.evaluator import evaluator_for
from spdfq.recipe import Recipe
from spdfq.runs.finished import run_record
from spdfq.runs.provenance import data_fingerprints
from spdfq.teacher import Teacher, load_teacher


def spare(source: Any, folder: Path) -> None:
    """Raises RecipeError where a run would write its own recipe.toml over the one it was given."""
    given = isinstance(source, (str, Path)) and Path(source).resolve() == (folder / "recipe.toml").resolve()
    if given and not run_record(folder):
        raise RecipeError([f"{source}: the run's own recipe.toml would replace it; choose another --out"])


def checked_teacher(recipe: Recipe) -> tuple[Teacher, list[str]]:
    """The teacher, and the warnings, after everything that can be wrong with the recipe was looked at."""
    data_fingerprints((recipe.synthesis, recipe.evaluation))  # first: a missing folder costs no download of weights
    teacher = load_teacher(recipe.model)
    return teacher, [*check_fit(recipe, teacher), *_shared_images(recipe)]


def check_fit(recipe: Recipe, teacher: Teacher) -> list[str]:
    """Raise everything in the recipe that this teacher cannot have, all at once, or return the warnings."""
    problems: list[str] = []
    told = recipe.warnings()
    for attempt in (
        lambda: recipe.synthesis.check(teacher),
        lambda: told.extend(check_quantization(teacher, recipe.quantization)),
        lambda: evaluator_for(teacher).check(recipe.evaluation, teacher),
    ):
        try:
            attempt()
        except RecipeError as error:
            problems += error.problems
    if problems:
        raise RecipeError(problems)
    return told


def _shared_images(recipe: Recipe) -> list[str]:
    """A warning where real images to calibrate on are among those that the accuracy is measured on."""
    dataset = getattr(recipe.synthesis, "dataset", None)
    if not (shared := dataset and set(dataset.identities()) & set(recipe.evaluation.dataset.identities())):
        return []
    first = f"the first of them {min(shared)}"
    return [f"synthesis.dataset: {len(shared):,} of its images are evaluation.dataset's too, {first}; give others"]
