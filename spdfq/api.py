"""The stages of a run as functions that take your own teacher: make images, quantize, measure, diagnose and export."""

import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from attrs import evolve
from torch import Tensor, nn

from spdfq.backends import quantize as run_backend
from spdfq.backends.quantize import check_images, check_quantization
from spdfq.backends.quantized_student import student_factory
from spdfq.data import LabelledImages
from spdfq.doctor.diagnosis import Diagnosis, diagnosed, heldout_images
from spdfq.errors import DataError, ModelError, RecipeError, shown
from spdfq.evaluation.accuracy import another_order, left_out
from spdfq.evaluation.evaluator import evaluator_for
from spdfq.exporters.base import Exporter
from spdfq.exporters.export import Exported, Softmax, exporter_named, write_export
from spdfq.quantized.model import QuantizedModel
from spdfq.recipe import Evaluation, Quantization, Recipe
from spdfq.recipe.parts import Part, load_part
from spdfq.registry import datasets
from spdfq.runtime import Progress, Runtime, make_runtime, own_threads, pick_progress
from spdfq.synth import SyntheticImages
from spdfq.synth.base import Source
from spdfq.teacher import Teacher
from spdfq.teacher.forward import returning_tensor

AnyRecipe = Recipe | str | Path | dict[str, Any]


@own_threads()
def synthesize(
    teacher: Teacher,
    recipe: AnyRecipe | Source,
    *,
    overrides: Iterable[str] = (),
    seed: int | None = None,
    device: str | torch.device | None = None,
    progress: Progress | bool | None = None,
) -> Tensor:
    """Make calibration images with a synthesis section.

    A quantization section beside it is checked too, so that a mistake in it costs no images.

    Args:
        teacher: replaces a recipe's model.
        recipe: a `Recipe`, the name of a shipped recipe or part (``images/spdfq``), a ``.toml`` path, a dict of
            sections, one section as a dict, or a source of images. Images that need a quantized student also need a
            quantization section: ``{"extends": ["images/psaq_vit_v2", "backends/repq"]}``.
        overrides: ``dotted.key=value`` pairs with the keys of a recipe, such as ``synthesis.images=4``.
        seed: replaces the recipe's own.
        device: ``auto``, ``cpu`` or ``cuda``; replaces ``runtime.device``. The teacher's module is moved there.
        progress: ``True`` or ``False`` for progress bars or none, or a `spdfq.runtime.Progress`; by default, bars in a
            terminal and in a notebook.

    Returns:
        float32 ``[n, C, H, W]`` on the CPU, normalised for the teacher.

    Raises:
        SpdfqError: anything the user can fix; the message says where and how.
    """
    _check_teacher(teacher)
    part = load_part(recipe, "synthesis", overrides, seed)
    runtime = make_runtime(part.runtime, part.seed, device, pick_progress(progress))
    source = part.synthesis
    if source.needs_student and part.quantization is None:
        raise RecipeError(
            [
                "synthesis.student: needs a quantization section; give both, for example {'extends': "
                "['images/psaq_vit_v2', 'backends/repq']}"
            ]
        )
    source.check(teacher)
    _warn(f"synthesis: {line}" for line in (source.advice() if hasattr(source, "advice") else ()))
    if part.quantization is not None:
        _warn([*part.quantization.warnings(), *check_quantization(teacher, part.quantization)])
    teacher.module.to(runtime.device)
    return make_images(part, teacher, runtime).images


def make_images(
    recipe: Recipe | Part, teacher: Teacher, runtime: Runtime, folder: Path | None = None
) -> SyntheticImages:
    """Make a recipe's images. A source that needs a student gets one from the recipe's quantization section.

    Args:
        recipe: its synthesis section is used, and its quantization section for a student.
        teacher: on the runtime's device.
        runtime: device, precision and seeds.
        folder: for the state of unfinished work, from which a later call continues.
    """
    source: Any = recipe.synthesis
    back_end: Any = recipe.quantization
    options = {"student": student_factory(teacher, back_end, runtime)} if source.needs_student else {}
    with runtime.own_modes():
        images: SyntheticImages = source.synthesize(teacher, runtime, folder, **options)
    return images


@own_threads()
def quantize(
    teacher: Teacher,
    images: Tensor,
    recipe: AnyRecipe | Quantization,
    *,
    overrides: Iterable[str] = (),
    seed: int | None = None,
    device: str | torch.device | None = None,
    progress: Progress | bool | None = None,
) -> QuantizedModel:
    """Quantize a copy of the teacher's network with a quantization section. The teacher does not change.

    Args:
        teacher: replaces a recipe's model.
        images: ``[n, C, H, W]``, normalised for the teacher.
        recipe: as in `synthesize`: a recipe, a part (``backends/repq``), a section as a dict, or a `Quantization`.
        overrides: as in `synthesize`.
        seed: as in `synthesize`.
        device: as in `synthesize`.
        progress: as in `synthesize`.

    Returns:
        The fake-quantized network: it computes in float, with the rounding of integers.

    Raises:
        SpdfqError: anything the user can fix; the message says where and how.
    """
    _check_teacher(teacher)
    part = load_part(recipe, "quantization", overrides, seed)
    runtime = make_runtime(part.runtime, part.seed, device, pick_progress(progress))
    spec: Any = part.quantization
    _warn([*spec.warnings(), *check_quantization(teacher, spec)])
    return run_backend(teacher, images, spec, runtime)


@own_threads()
def evaluate(
    model: nn.Module,
    teacher: Teacher,
    dataset: LabelledImages | Evaluation | AnyRecipe,
    *,
    bank: LabelledImages | None = None,
    batch: int | None = None,
    device: str | torch.device | None = None,
    progress: Progress | bool | None = None,
) -> dict[str, Any]:
    """Measure a model and its teacher on labelled images.

    Args:
        model: a quantized model, or any module that takes the teacher's images.
        teacher: defines how images are prepared and which classes there are.
        dataset: labelled images such as ``spdfq.data.ImageFolder(root="val")``, or the same as a dict:
            ``{"type": "image_folder", "root": "val"}``; or an evaluation section, or a recipe that has one.
        bank: other labelled images, only for a teacher without a head: k-NN accuracy uses their features.
        batch: images per forward pass; 250 unless an evaluation section says otherwise.
        device: as in `synthesize`. Both models are moved there.
        progress: as in `synthesize`.

    Returns:
        As in `spdfq.RunResult`: ``fp`` and ``quantized`` top-1 and top-5 of the teacher and of the model in percent,
        ``agreement``, ``images``, ``damaged``, ``precision``, and ``simulated``: whether the model is fake-quantized.

    Raises:
        SpdfqError: anything the user can fix; the message says where and how.
    """
    _check_teacher(teacher)
    if not isinstance(model, nn.Module):
        raise ModelError(f"evaluate: model must be an nn.Module, got {shown(model)}")
    part = _evaluation_part(dataset)
    spec: Any = part.evaluation
    given = {"bank": bank, "batch": batch}
    spec = evolve(spec, **{key: value for key, value in given.items() if value is not None})
    runtime = make_runtime(part.runtime, part.seed, device, pick_progress(progress))
    evaluator = evaluator_for(teacher)
    evaluator.check(spec, teacher)
    teacher.module.to(runtime.device)
    network, _ = returning_tensor(
        model.to(runtime.device), "model", teacher.input_size, teacher.num_classes, teacher.output
    )
    fp = evaluator.reference(teacher, spec, runtime)
    found = evaluator.measure(network, teacher, spec, runtime, fp)
    if not teacher.headless:
        _warn([*spec.dataset.class_warnings(teacher), *filter(None, [another_order(fp.logits, fp.labels)])])
    if found["damaged"]:
        _warn([left_out(tuple(found["damaged"]))])
    if found.get("bank_damaged"):
        _warn([f"evaluation.bank: {left_out(tuple(found['bank_damaged']))}"])
    return found | {"simulated": any(isinstance(part, QuantizedModel) for part in model.modules())}


@own_threads()
def diagnose(
    model: QuantizedModel,
    teacher: Teacher,
    images: Tensor,
    recipe: AnyRecipe | Quantization,
    *,
    dataset: LabelledImages | None = None,
    heldout: int = 256,
    overrides: Iterable[str] = (),
    seed: int | None = None,
    device: str | torch.device | None = None,
    progress: Progress | bool | None = None,
) -> Diagnosis:
    """Find what costs a quantized model its accuracy, and suggest more bits for some sites.

    The number of forward passes grows with the number of sites times the number of images; give fewer images to make it
    faster. The suggestion is chosen on ``images`` alone.

    Args:
        model: from `quantize` or `load_quantized`; it does not change.
        teacher: of which it is a copy.
        images: calibration images ``[n, C, H, W]``, normalised for the teacher.
        recipe: with the quantization section that made the model, as in `quantize`.
        dataset: labelled images that took no part, on which the gain is predicted.
        heldout: how many of them, evenly spaced.
        overrides: as in `synthesize`.
        seed: as in `synthesize`.
        device: as in `synthesize`. Both models are moved there.
        progress: as in `synthesize`.

    Returns:
        What each site costs, its values against its range, the error of each block, and the suggestion.

    Raises:
        SpdfqError: anything the user can fix; the message says where and how.
    """
    _check_teacher(teacher)
    if not isinstance(model, QuantizedModel):
        raise ModelError(f"diagnose: model must be a QuantizedModel, got {shown(model)}; spdfq.quantize makes one")
    if dataset is not None and not datasets.has(dataset):
        raise DataError(f"dataset: expected labelled images such as spdfq.data.ImageFolder, got {shown(dataset)}")
    if not isinstance(heldout, int) or heldout < 1:
        raise DataError(f"heldout: expected a number of images of at least 1, got {shown(heldout)}")
    check_images(teacher, images)
    part = load_part(recipe, "quantization", overrides, seed)
    runtime = make_runtime(part.runtime, part.seed, device, pick_progress(progress))
    spec: Any = part.quantization
    check_quantization(teacher, spec)
    teacher.module.to(runtime.device)
    others = heldout_images(dataset, teacher, heldout, 50) if dataset is not None else None
    return diagnosed(model.to(runtime.device), teacher, images, spec, runtime, others)


def export(
    model: QuantizedModel,
    teacher: Teacher,
    path: str | Path,
    *,
    format: str | Exporter = "onnx",
    softmax: Softmax = "float",
    images: Tensor | None = None,
    class_names: Sequence[str] = (),
) -> Exported:
    """Write a quantized model into a file for other software.

    Args:
        model: from `quantize` or `load_quantized`; it does not change.
        teacher: describes the input; its mean, std, size, interpolation and crop are stored in the file.
        path: of the file; its folder is created.
        format: ``onnx`` (integers, for onnxruntime and OpenVINO), ``pt2`` (a program of `torch.export` with integer
            weights) or ``safetensors`` (a float checkpoint with the values of the quantized weights).
        softmax: what to do with quantizers of activations that are not uniform: ``float`` computes them in float, as
            in the simulation; ``uniform8`` replaces them by uniform ones of 8 bits, which are integers.
        images: for ``uniform8``: calibration images ``[n, C, H, W]``, normalised for the teacher.
        class_names: in the order of the logits, stored in the file.

    Returns:
        The file, with a line for everything that it does not compute as the quantized model does.

    Raises:
        SpdfqError: anything the user can fix; the message says where and how.
    """
    _check_teacher(teacher)
    if not isinstance(path, (str, Path)):
        raise DataError(f"path: expected the path of a file, got {shown(path)}")
    return write_export(
        model, teacher, Path(path), exporter_named(format), softmax=softmax, images=images, class_names=class_names
    )


def _evaluation_part(dataset: Any) -> Part:
    """An evaluation section from what `evaluate` takes."""
    if datasets.has(dataset):
        return load_part(Evaluation(dataset=dataset), "evaluation")
    if isinstance(dataset, (str, Path)) and Path(dataset).is_dir():
        raise DataError(f"dataset: {dataset} is a folder; give spdfq.data.ImageFolder(root={str(dataset)!r})")
    if (isinstance(dataset, dict) and "type" in dataset) or (isinstance(dataset, str) and dataset in datasets.names()):
        dataset = {"evaluation": {"dataset": dataset}}
    elif not isinstance(dataset, (Recipe, Evaluation, str, Path, dict)):
        example = "spdfq.data.ImageFolder(root='val')"
        raise DataError(f"dataset: expected labelled images such as {example}, or a recipe, got {shown(dataset)}")
    return load_part(dataset, "evaluation")


def _check_teacher(teacher: Any) -> None:
    if isinstance(teacher, nn.Module):
        raise ModelError(
            f"teacher: {type(teacher).__name__} is a module; describe its input: spdfq.Teacher(module, mean=..., "
            "std=..., num_classes=...)"
        )
    if not isinstance(teacher, Teacher):
        raise ModelError(f"teacher: expected a spdfq.Teacher, got {shown(teacher)}; spdfq.load_teacher(name) makes one")


def _warn(lines: Iterable[str]) -> None:
    for line in lines:
        warnings.warn(line, stacklevel=4)
