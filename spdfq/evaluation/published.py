"""Comparison with published numbers: the full-precision check before a run, and the quantized accuracy after it."""

import math
from typing import Any

from torch import Tensor

from spdfq.errors import ModelError
from spdfq.evaluation.accuracy import ENOUGH_PER_CLASS, accuracy, renamed
from spdfq.recipe import Published, PublishedRow, Recipe, load_recipe
from spdfq.recipe.structure import unstructure
from spdfq.teacher import Teacher

TOLERANCE = 0.3
_STANDARD_ERRORS = 3
# keys of a dataset that do not change its images
_PLACES = ("root", "workers")


def standard_error(top1: float, images: int, total: int) -> float:
    """Binomial standard error, in percentage points, of a top-1 accuracy that was measured on some of the images.

    Args:
        top1: in percent.
        images: number of images measured, drawn without replacement, so that the error is 0 for all images.
        total: number of images in the dataset.
    """
    share, left = top1 / 100, max(total - images, 0) / max(total - 1, 1)
    return 100 * math.sqrt(share * (1 - share) / images * left)


def check_full_precision(recipe: Recipe, teacher: Teacher, logits: Tensor, labels: Tensor) -> str | None:
    """Compare the teacher's top-1 with the published one, before anything is computed from the teacher.

    Args:
        recipe: without ``[published]``, or with that of another model, nothing is checked.
        teacher: its input description is part of an error's message.
        logits: ``[n, K]``, for the evaluation images.
        labels: int64 ``[n]``.

    Returns:
        A line with both numbers and the tolerance; ``None`` if nothing was checked.

    Raises:
        ModelError: the difference is more than 0.3 points plus, for a part of the images, three standard errors.
    """
    spec = _own(recipe)
    if spec is None:
        return None
    here, count = accuracy(logits, labels)["top1"], len(labels)
    sampling = _STANDARD_ERRORS * standard_error(spec.fp, count, spec.images)
    allowed = f"allowed ±{TOLERANCE + sampling:.2f} points"
    if sampling:
        allowed += f": {TOLERANCE} and {_STANDARD_ERRORS} standard errors of {count} of {spec.images} images"
    if round(abs(here - spec.fp), 6) <= TOLERANCE + sampling:
        paper = f", in the paper {spec.paper_fp:.2f} %" if spec.paper_fp else ""
        return f"full precision: known {spec.fp:.2f} %{paper}, here {here:.2f} % ({allowed})"
    raise ModelError(
        f"full precision: top-1 {here:.2f} % on {count} images, but {spec.model} is known for {spec.fp:.2f} % "
        f"({allowed}); likely {_cause(recipe, spec, here, logits, labels)}. In use: {_in_use(recipe, teacher)}; to "
        "measure other images on purpose, use a recipe without [published]"
    )


def compare(recipe: Recipe, metrics: dict[str, Any]) -> dict[str, Any] | None:
    """Compare a run with the number that was published for the same images, bits and back-end.

    Args:
        recipe: of the run.
        metrics: of the run.

    Returns:
        ``paper``, ``fp`` and ``paper_fp``, ``bits``, ``method`` and ``top1`` (both ``None`` if nothing was published),
        ``here`` (the measured top-1), its ``standard_error`` in percentage points, and a ``line`` that says all this;
        ``None`` for a recipe without ``[published]``.
    """
    spec = _own(recipe)
    if spec is None:
        return None
    label, here, count = recipe.quantization.label, metrics["quantized"]["top1"], metrics["images"]
    row = next((row for row in spec.rows if _same(recipe, spec, row)), None)
    error = standard_error(here, count, spec.images)
    found = {
        "paper": spec.paper,
        "fp": spec.fp,
        "paper_fp": spec.paper_fp,
        "bits": label,
        "method": row and row.method,
        "top1": row and row.top1,
    }
    return {**found, "here": here, "standard_error": error, "line": _line(found, here, error, metrics)}


def _line(found: dict[str, Any], here: float, error: float, metrics: dict[str, Any]) -> str:
    if found["top1"] is None:
        return f"not published in {found['paper']} for these images, bits and back-end"
    spread = f" ± {error:.2f}" if error else ""
    simulated = ", simulated" if metrics.get("simulated") else ""
    return f"paper {found['top1']:.2f}, here {here:.2f}{spread} ({found['bits']}{simulated})"


def _own(recipe: Recipe) -> Published | None:
    """The published numbers, if they are for the recipe's model."""
    return recipe.published if recipe.published and recipe.published.is_of(recipe.model) else None


def _same(recipe: Recipe, spec: Published, row: PublishedRow) -> bool:
    """Whether a recipe makes the images and the model of a published row; seed and folders may differ."""
    if row.images is None or row.bits != recipe.quantization.label:
        return False
    own = recipe.to_dict()
    weights, activations = row.bits[1:].split("A")
    bits = {"weights": weights, "activations": activations, "softmax": activations}
    data = {"extends": [row.images, spec.backend], **{key: own[key] for key in ("model", "evaluation")}}
    made = load_recipe(data, [f"quantization.{what}.bits={number}" for what, number in bits.items()])
    return own["quantization"] == unstructure(made.quantization) and _placeless(own["synthesis"]) == _placeless(
        made.to_dict()["synthesis"]
    )


def _placeless(synthesis: dict[str, Any]) -> dict[str, Any]:
    dataset = synthesis.get("dataset", {})
    return {**synthesis, "dataset": {key: value for key, value in dataset.items() if key not in _PLACES}}


def _cause(recipe: Recipe, spec: Published, here: float, logits: Tensor, labels: Tensor) -> str:
    """The most likely cause of a wrong full-precision top-1, from the recipe and the predictions."""
    classes = logits.shape[1]
    there = renamed(logits, labels)[0] if len(labels) >= ENOUGH_PER_CLASS * classes else 0.0
    if here < spec.fp - 10 and there > spec.fp - 5:
        return (
            "the labels: if each class had the index that the model predicts most often for it, top-1 would be "
            f"{there:.2f} %, so the classes are in a different order than the model's"
        )
    if recipe.model.img_size is not None:
        return (
            f"the crop: model.img_size = {recipe.model.img_size} is not the size that the known top-1 was measured at"
        )
    if recipe.model.checkpoint is not None:
        return f"the weights: model.checkpoint = {recipe.model.checkpoint!r} may be those of another tag"
    if here > spec.fp:
        return "the images: top-1 is above the known one, so they may be training images"
    if here < 5 * 100 / classes:
        return "the labels: top-1 is near chance, so the classes may be in a different order than the model's"
    if here > spec.fp - 3:
        return "the crop: so small a difference can come from crop and interpolation, or from images resized beforehand"
    return "the images, which may be a different set, or the tag or the normalisation"


def _in_use(recipe: Recipe, teacher: Teacher) -> str:
    height, width = teacher.input_size[1:]
    weights = recipe.model.checkpoint or ("bundled" if recipe.model.bundled else "timm's")
    return (
        f"input {height}x{width}, crop {teacher.crop_pct:g} ({teacher.crop_mode}, {teacher.interpolation}), mean "
        f"{_numbers(teacher.mean)}, std {_numbers(teacher.std)}, tag {teacher.name}, weights {weights}"
    )


def _numbers(values: tuple[float, ...]) -> str:
    return " ".join(f"{value:.4g}" for value in values)
