"""Two stages of a run as functions that take your own teacher: make images, and quantize on them."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import Tensor

from spdfq.backends import quantize as run_backend
from spdfq.backends.quantized_student import student_factory
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
    """Make calibration images with a recipe's synthesis section.

    Args:
        teacher: replaces the recipe's model.
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
    """Make a recipe's images. A source that needs a student gets one from the recipe's quantization section.

    Args:
        recipe: its synthesis section is used, and its quantization section for a student.
        teacher: on the runtime's device.
        runtime: device, precision and seeds.
        folder: for the state of unfinished work, from which a later call continues.
    """
    source: Any = recipe.synthesis
    options = {"student": student_factory(teacher, recipe.quantization, runtime)} if source.needs_student else {}
    with runtime.own_modes():
        images: SyntheticImages = source.synthesize(teacher, runtime, folder, **options)
    return images


@own_threads()
def quantize(
    teacher: Teacher, images: Tensor, recipe: AnyRecipe, *, overrides: Iterable[str] = (), seed: int | None = None
) -> QuantizedModel:
    """Quantize a copy of the teacher's network with a recipe's quantization section. The teacher does not change.

    Args:
        teacher: replaces the recipe's model.
        images: ``[n, C, H, W]``, normalised for the teacher.
        recipe: as in `synthesize`.
        overrides: ``dotted.key=value`` pairs.
        seed: replaces the recipe's own.

    Returns:
        The fake-quantized network: it computes in float, with the rounding of integers.
    """
    checked = load_recipe(recipe, overrides, seed)
    return run_backend(teacher, images, checked.quantization, make_runtime(checked.runtime, checked.seed))
