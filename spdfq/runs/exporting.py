"""Export the quantized model of a finished run, and measure the file in the runtimes that are installed."""

import copy
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from attrs import define, evolve
from torch import nn

from spdfq.errors import ModelError, SpdfqError, reading
from spdfq.evaluation.accuracy import accuracy
from spdfq.evaluation.evaluator import evaluator_for
from spdfq.exporters.base import Exporter
from spdfq.exporters.export import Exported, exporter_named, write_export
from spdfq.exporters.products import quantized_products
from spdfq.exporters.runtime_models import RuntimeModel
from spdfq.quantized.checkpoint import load_checkpoint
from spdfq.quantized.model import QuantizedModel
from spdfq.recipe import Recipe
from spdfq.report import write_report
from spdfq.report.exports import EXPORTS_FILE, known_exports
from spdfq.runs.checks import check_classes
from spdfq.runs.finished import finished_recipe, finished_record, saved_class_names
from spdfq.runs.store import lock_folder
from spdfq.runtime import Progress, Runtime, make_runtime, own_threads, pick_progress
from spdfq.runtime.files import write_text
from spdfq.synth import SyntheticImages
from spdfq.teacher import Teacher, evaluation_mode


@own_threads()
def export_run(
    folder: str | Path,
    *,
    format: str = "onnx",
    softmax: str = "float",
    out: str | Path | None = None,
    check: bool = False,
    progress: Progress | bool | None = None,
    announce: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Export the quantized model of a finished run, and note it in the run folder and its report.

    Args:
        folder: of the run.
        format: name of an exporter: ``onnx``, ``pt2`` or ``safetensors``.
        softmax: as in `spdfq.export`.
        out: the file; by default ``model`` with the format's suffix, in the run folder.
        check: run the file on the run's evaluation images, in each runtime that is installed.
        progress: as in `spdfq.synthesize`.
        announce: called with each line about what the file does not compute as the quantized model does.

    Returns:
        ``file``, ``format``, ``softmax``, ``size`` in bytes, ``notes``, and ``measured``: for each runtime its name and
        version, ``top1`` and ``agreement`` with the simulation of the same model in percent, ``simulated_top1`` of that
        model and ``run_top1`` of the run's own, the number of ``images``, of quantized ``products`` that depend on
        images, of ``integer_products`` among them (``None`` if the runtime does not tell), the names of
        ``float_products``, the ``milliseconds`` for one image and the ``float_milliseconds`` of the full-precision
        model in torch, both of the fastest call, and the number of ``threads``.

    Raises:
        SpdfqError: anything the user can fix; the message says where and how.
    """
    exporter = exporter_named(format)
    recipe, folder = finished_recipe(folder), Path(folder)
    record = finished_record(folder, "export a finished run")
    model, teacher, _ = load_checkpoint(folder / "quantized")
    path = Path(out) if out else folder / f"model{exporter.suffix}"
    if check:
        _check_possible(exporter, format, recipe, teacher)
    lock = lock_folder(folder)
    try:
        images = SyntheticImages.load(folder / "synthetic.safetensors").images if softmax == "uniform8" else None
        names = saved_class_names(record, teacher, recipe)
        with reading(folder / "run.json"):
            details = {"recipe_digest": record.get("recipe_digest"), "simulated": _simulated(record)}
        done = write_export(
            model, teacher, path, exporter, softmax=softmax, images=images, class_names=names, details=details
        )
        notes = list(done.notes)
        if check and recipe.evaluation.precision != "float32":
            notes.append(f"checked in float32, as the file computes; the run used {recipe.evaluation.precision}")
            recipe = evolve(recipe, evaluation=evolve(recipe.evaluation, precision="float32"))
        for line in notes:
            announce(line)
        entry: dict[str, Any] = {
            "file": str(path),
            "format": done.format,
            "softmax": softmax,
            "size": done.size,
            "notes": notes,
            "measured": [],
        }
        if check:
            checked = _Check.prepared(recipe, teacher, model, done, progress)
            for index, runtime in enumerate(exporter.runtimes()):
                try:
                    entry["measured"].append(checked.row(runtime(path)))
                except ModelError as error:
                    if index == 0:  # the one that the file is made for
                        raise
                    entry["notes"].append(str(error))
                    announce(str(error))
        _write(folder, path, entry)
    finally:
        lock.release()
    return entry


def _check_possible(exporter: Exporter, format: str, recipe: Recipe, teacher: Teacher) -> None:
    """Raise an error, before anything is written, if a file cannot be measured."""
    if type(exporter).runtimes is Exporter.runtimes:
        raise SpdfqError(f"--check: a file of format {format!r} is not run by itself; check 'onnx' or 'pt2'")
    evaluator_for(teacher).check(recipe.evaluation, teacher)
    check_classes(recipe, teacher)
    len(recipe.evaluation.dataset)


@define
class _Check:
    """The evaluation images of a run, and what the simulations of its models predict for them."""

    recipe: Recipe
    teacher: Teacher
    runtime: Runtime
    done: Exported
    products: int
    reference: Any
    before: float
    float_milliseconds: float

    @classmethod
    def prepared(
        cls, recipe: Recipe, teacher: Teacher, model: QuantizedModel, done: Exported, progress: Any
    ) -> "_Check":
        runtime = make_runtime(recipe.runtime, recipe.seed, "cpu", pick_progress(progress))
        reference = _predictions(done.model, teacher, recipe, runtime)
        before = reference if done.model is model else _predictions(model, teacher, recipe, runtime)
        top1 = accuracy(before.logits, before.labels)["top1"]
        products = quantized_products(done.model, teacher) - len(done.constant_products)
        speed = _milliseconds(teacher.module, teacher)
        return cls(recipe, teacher, runtime, done, products, reference, top1, speed)

    def row(self, file: RuntimeModel) -> dict[str, Any]:
        evaluator, spec = evaluator_for(self.teacher), self.recipe.evaluation
        found = evaluator.measure(file, self.teacher, spec, self.runtime, self.reference)
        return {
            "runtime": file.runtime,
            "version": file.version,
            "images": found["images"],
            "top1": found["quantized"]["top1"],
            "simulated_top1": found["fp"]["top1"],
            "run_top1": self.before,
            "agreement": found["agreement"],
            "products": self.products,
            "integer_products": file.integer_products,
            "float_products": file.float_products,
            "milliseconds": _milliseconds(file, self.teacher),
            "float_milliseconds": self.float_milliseconds,
            "threads": torch.get_num_threads(),
        }


def _milliseconds(model: nn.Module, teacher: Teacher) -> float:
    """The time for one image: the fastest of 20 calls, or of those in two seconds, after three calls that do not count.

    Other work on the machine only makes calls slower, so the fastest one says most about the model.
    """
    image = teacher.normalise(torch.full((1, *teacher.input_size), 0.5, dtype=torch.float32, device="cpu"))
    times: list[float] = []
    with torch.inference_mode(), evaluation_mode(model):
        for _ in range(3):
            model(image)
        while len(times) < 20 and (len(times) < 3 or sum(times) < 2):
            begun = time.perf_counter()
            model(image)
            times.append(time.perf_counter() - begun)
    return round(1000 * min(times), 3)


def _predictions(model: nn.Module, teacher: Teacher, recipe: Recipe, runtime: Runtime) -> Any:
    """What the simulation of a quantized model predicts, measured as a teacher is."""
    simulation = copy.copy(teacher)
    simulation.module = model
    return evaluator_for(teacher).reference(simulation, recipe.evaluation, runtime)


def _simulated(record: dict[str, Any]) -> dict[str, Any]:
    """The accuracy of the simulation that a run measured."""
    metrics = record.get("metrics", {})
    return {"top1": metrics.get("quantized", {}).get("top1"), "images": metrics.get("images")}


def _write(folder: Path, path: Path, entry: dict[str, Any]) -> None:
    inside = path.resolve().parent == folder.resolve()
    found = {**known_exports(folder), path.name if inside else str(path.resolve()): entry}
    write_text(folder / EXPORTS_FILE, json.dumps(found, indent=1) + "\n")
    write_report(folder)
