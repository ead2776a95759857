"""The model of a finished run as a classifier: its exported file, or else the simulated quantized model."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from spdfq.errors import DataError
from spdfq.inference.classifier import Classifier
from spdfq.inference.onnx_file import OnnxFile
from spdfq.inference.preprocessing import Preprocessing
from spdfq.quantized.checkpoint import load_checkpoint
from spdfq.quantized.model import QuantizedModel
from spdfq.report.exports import known_exports
from spdfq.runs.finished import finished_recipe, finished_record, saved_class_names
from spdfq.runtime import Runtime
from spdfq.teacher import Teacher, evaluation_mode

SIMULATED = "simulated"


def load_run(folder: str | Path) -> Classifier:
    """The classifier of a finished run.

    Args:
        folder: of the run. If it has exported ONNX files, the last one is run in onnxruntime. Otherwise, the quantized
            model is simulated in float on the CPU, and the classifier is ``computed`` as ``simulated``.

    Raises:
        RecipeError: not a run folder.
        DataError: the run has not finished, or its exported file is of another run.
        SpdfqError: onnxruntime is not installed, or the model has no head.
    """
    recipe, folder = finished_recipe(folder), Path(folder)
    record = finished_record(folder, "give a finished run")
    exported = [folder / name for name, entry in known_exports(folder).items() if entry.get("format") == "onnx"]
    if files := [path for path in exported if path.is_file()]:
        return _exported(files[-1], record.get("recipe_digest"))
    model, teacher, _ = load_checkpoint(folder / "quantized")
    names = saved_class_names(record, teacher, recipe)
    return _simulated(folder, model, teacher, names)


def _exported(path: Path, digest: Any) -> Classifier:
    file = OnnxFile.opened(path)
    if file.metadata.get("recipe_digest") != digest:
        raise DataError(f"{path}: is of another run; export this run again, or give the file itself")
    return file.classifier()


def _simulated(folder: Path, model: QuantizedModel, teacher: Teacher, names: list[str]) -> Classifier:
    channels, height, width = teacher.input_size

    def logits(images: NDArray[np.float32]) -> NDArray[np.float32]:
        with Runtime().own_modes(), torch.no_grad(), evaluation_mode(model):
            found: NDArray[np.float32] = model(torch.from_numpy(images)).float().numpy()
        return found

    preprocessing = Preprocessing(
        size=(height, width),
        channels=channels,
        mean=teacher.mean,
        std=teacher.std,
        interpolation=teacher.interpolation,
        crop_pct=teacher.crop_pct,
        crop_mode=teacher.crop_mode,
    )
    return Classifier(
        source=str(folder),
        computed=SIMULATED,
        preprocessing=preprocessing,
        num_classes=teacher.num_classes,
        class_names=names,
        logits=logits,
    )
