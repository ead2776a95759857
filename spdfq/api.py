"""Two stages as plain functions for a teacher of one's own: images from a model, a quantized model from images."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import Tensor

from spdfq.backends import quantize as run_backend
from spdfq.backends.learning.student import student_factory
from spdfq.quantized.model import QuantizedModel
from spdfq.recipe import Recipe, load_recipe
from spdfq.runtime import Runtime, make_runtime, own_threads
from spdfq.synth import SyntheticImages
from spdfq.teacher import Teacher

AnyRecipe = Recipe | str | Path | dict[str, Any]


@own_threads()
def synthesize(
    teacher: Teacher, recipe: AnyRecipe, *, overrides: Iterable[str] = (), seed: int | None = None
) -> Tensor:
    """Calibration images by a recipe's synthesis section.

    Args:
        teacher: takes the place of the recipe's model.
        recipe: a `Recipe`, a shipped recipe's name, a ``.toml`` path, or plain data.
        overrides: ``dotted.key=value`` pairs.
        seed: replaces the recipe's own.

    Returns:
        float32 ``[n, C, H, W]`` on the CPU, normalised for the teacher.
    """
    checked = load_recipe(recipe, overrides, seed)
    runtime = make_runtime(checked.runtime, checked.seed)
    teacher.module.to(runtime.device)
    return make_images(checked, teacher, runtime).images


def make_images(recipe: Recipe, teacher: Teacher, runtime: Runtime, folder: Path | None = None) -> SyntheticImages:
    """A recipe's images, and how they came about; a source that wants a student gets that of the recipe's back-end.

    Args:
        recipe: whose synthesis and, for a student, quantization sections are used.
        teacher: on the runtime's device.
        runtime: device, precision and seed streams.
        folder: where unfinished work is kept and taken up again.
    """
    source: Any = recipe.synthesis
    options = {"student": student_factory(teacher, recipe.quantization, runtime)} if source.needs_student else {}
    images: SyntheticImages = source.synthesize(teacher, runtime, folder, **options)
    return images


@own_threads()
def quantize(
    teacher: Teacher, images: Tensor, recipe: AnyRecipe, *, overrides: Iterable[str] = (), seed: int | None = None
) -> QuantizedModel:
    """A fake-quantized copy of the teacher's network by a recipe's quantization section; the teacher is not touched.

    Args:
        teacher: takes the place of the recipe's model.
        images: ``[n, C, H, W]``, normalised for the teacher.
        recipe: as in `synthesize`.
        overrides: ``dotted.key=value`` pairs.
        seed: replaces the recipe's own.
    """
    checked = load_recipe(recipe, overrides, seed)
    return run_backend(teacher, images, checked.quantization, make_runtime(checked.runtime, checked.seed))
