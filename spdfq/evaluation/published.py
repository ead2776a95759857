"""Published numbers beside a run: full precision is checked first, and only like is compared with like."""

import math
from typing import Any

from torch import Tensor

from spdfq.errors import ModelError
from spdfq.evaluation.accuracy import accuracy
from spdfq.recipe import Published, PublishedRow, Recipe, load_recipe
from spdfq.recipe.structure import unstructure
from spdfq.teacher import Teacher

TOLERANCE = 0.3
_STANDARD_ERRORS = 3
_ENOUGH_PER_CLASS = 5
# where a dataset lies and how it is read, not what it is
_PLACES = ("root", "workers")


def standard_error(top1: float, images: int, total: int) -> float:
    """Binomial standard error, in points, of a top-1 in percent on a random part of ``total`` images; 0 on all of them.

    The part is drawn without replacement, so the error shrinks to nothing as it grows to the whole.
    """
    share, left = top1 / 100, max(total - images, 0) / max(total - 1, 1)
    return 100 * math.sqrt(share * (1 - share) / images * left)


def check_full_precision(recipe: Recipe, teacher: Teacher, logits: Tensor, labels: Tensor) -> str | None:
    """Compare the teacher's top-1 with the one its weights are known for, before any work is built on it.

    Args:
        recipe: says what is known; without ``[published]``, or where that is of another model, nothing is checked.
        teacher: whose input description an error tells.
        logits: ``[n, K]`` of the evaluation images.
        labels: ``[n]``.

    Returns:
        What was compared and how closely, in a line; ``None`` where nothing was.

    Raises:
        ModelError: they differ by more than 0.3 points, and, on a part of the images, three standard errors.
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
        "measure other images on purpose, take a recipe without [published]"
    )


def compare(recipe: Recipe, metrics: dict[str, Any]) -> dict[str, Any] | None:
    """What was published for exactly these images, bits and back-end, beside what was measured.

    Args:
        recipe: as it was run.
        metrics: of the run.

    Returns:
        ``paper``, ``fp`` and ``paper_fp``, ``bits``, ``method`` and ``top1`` (both ``None`` where nothing was
        published), ``here``, its ``standard_error`` in points, and a ``line`` that says it; ``None`` for a recipe
        without ``[published]``.
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
    """What was published of the very model of the recipe."""
    return recipe.published if recipe.published and recipe.published.is_of(recipe.model) else None


def _same(recipe: Recipe, spec: Published, row: PublishedRow) -> bool:
    """Whether a run differs from a row's in nothing but seed and place."""
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
    """What most likely made the difference, judged by what was set and by the answers themselves."""
    classes = logits.shape[1]
    renamed = _renamed(logits, labels) if len(labels) >= _ENOUGH_PER_CLASS * classes else 0.0
    if here < spec.fp - 10 and renamed > spec.fp - 5:
        return (
            "the labels: with each class called what the model calls it most often, top-1 would be "
            f"{renamed:.2f} %, so the classes are in another order than the model's"
        )
    if recipe.model.img_size is not None:
        return f"the crop: model.img_size = {recipe.model.img_size} is not what the weights are known with"
    if recipe.model.checkpoint is not None:
        return f"the weights: model.checkpoint = {recipe.model.checkpoint!r} may be of another tag"
    if here > spec.fp:
        return "the images: better than known, they may be ones it was trained on"
    if here < 5 * 100 / classes:
        return "the labels: near chance, the classes may be in another order than the model's"
    if here > spec.fp - 3:
        return "the crop: so small a difference comes of images resized beforehand, or of crop and interpolation"
    return "the images, which may be of another set, or else the tag or the normalisation"


def _renamed(logits: Tensor, labels: Tensor) -> float:
    """Top-1 in percent if each class had the name that it is given most often."""
    classes = logits.shape[1]
    pairs = (labels * classes + logits.argmax(1)).bincount(minlength=classes * classes)
    return 100 * int(pairs.view(classes, classes).amax(1).sum()) / len(labels)


def _in_use(recipe: Recipe, teacher: Teacher) -> str:
    height, width = teacher.input_size[1:]
    weights = recipe.model.checkpoint or ("bundled" if recipe.model.bundled else "timm's")
    return (
        f"input {height}x{width}, crop {teacher.crop_pct:g} ({teacher.crop_mode}, {teacher.interpolation}), mean "
        f"{_numbers(teacher.mean)}, std {_numbers(teacher.std)}, tag {teacher.name}, weights {weights}"
    )


def _numbers(values: tuple[float, ...]) -> str:
    return " ".join(f"{value:.4g}" for value in values)
