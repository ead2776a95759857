"""The accuracy of an exported file on labelled images, measured in onnxruntime."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from spdfq.data.classes import class_names
from spdfq.errors import RecipeError, SpdfqError
from spdfq.evaluation.accuracy import accuracy, another_order, logits_over
from spdfq.evaluation.evaluator import evaluator_for
from spdfq.inference.classifier import Classifier
from spdfq.inference.onnx_file import OnnxFile
from spdfq.recipe.parts import load_part
from spdfq.recipe.schema import RuntimeSpec
from spdfq.runs.finished import measured_on
from spdfq.runtime import Progress, make_runtime, own_threads, pick_progress
from spdfq.runtime.ranks import join
from spdfq.teacher import Teacher


@own_threads()
def evaluate_file(
    path: str | Path,
    on: str | Path | None = None,
    *,
    overrides: Iterable[str] = (),
    device: str | None = None,
    progress: Progress | bool | None = None,
    announce: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Measure an exported ONNX file in onnxruntime on labelled images.

    The images are prepared as the file's metadata say, and the classes of the images are compared with those of the
    file.

    Args:
        path: of the file.
        on: a folder with a subfolder of images for each class.
        overrides: ``evaluation.key=value`` pairs, such as ``evaluation.dataset.limit=500``; or another dataset instead
            of ``on``: ``evaluation.dataset={type="image_list", root="val", labels="val.txt"}``.
        device: onnxruntime runs the file on the CPU, so only ``cpu`` or ``auto``.
        progress: as in `spdfq.synthesize`.
        announce: called with one line for each warning.

    Returns:
        ``top1`` and ``top5`` in percent, the number of ``images``, the ``damaged`` ones with reasons, ``runtime`` and
        ``version`` that measured them, and ``simulated``: what the file says about its run's own evaluation.

    Raises:
        SpdfqError: anything the user can fix; the message says where and how.
    """
    spec: Any = _evaluation(path, measured_on(on, overrides))
    if device not in (None, "auto", "cpu"):
        raise SpdfqError(f"device: onnxruntime runs {path} on the CPU; leave it out")
    file, ranks = OnnxFile.opened(path), join()
    teacher = _described(file.classifier())
    runtime = make_runtime(RuntimeSpec(), 0, "cpu", pick_progress(progress), ranks)
    evaluator_for(teacher).check(spec, teacher)
    spec.dataset.check_classes(teacher)
    for line in spec.dataset.class_warnings(teacher) if ranks.leads else ():
        announce(f"warning: {line}")
    found = logits_over(teacher.module, teacher, spec, runtime, f"onnxruntime {file.version}")
    if ranks.leads and (doubt := another_order(found.logits, found.labels)):
        announce(f"warning: {doubt}")
    simulated = file.metadata.get("simulated")
    return {
        "runtime": "onnxruntime",
        "version": file.version,
        "images": len(found.labels),
        "damaged": list(found.damaged),
        **accuracy(found.logits, found.labels),
        "simulated": simulated if isinstance(simulated, dict) else None,
    }


def _evaluation(path: str | Path, overrides: tuple[str, ...]) -> Any:
    """The evaluation section that overrides describe."""
    keys = [line.partition("=")[0].strip() for line in overrides]
    if wrong := [line for line, key in zip(overrides, keys, strict=True) if key.partition(".")[0] != "evaluation"]:
        raise RecipeError(
            [f"--set {line}: a file is exported; only evaluation.* can be set to measure it" for line in wrong]
        )
    if not any(key == "evaluation" or key.startswith("evaluation.dataset") for key in keys):
        raise SpdfqError(f"{path}: does not say which images to measure; give --on FOLDER with a subfolder per class")
    spec: Any = load_part({"evaluation": {}}, "evaluation", overrides).evaluation
    if spec.precision != "float32":
        raise SpdfqError(f"evaluation.precision: {path} has the precision that it was exported with; leave it out")
    return spec


class _Module(nn.Module):
    """A classifier as a module on the CPU."""

    def __init__(self, classifier: Classifier) -> None:
        super().__init__()
        self.classifier = classifier
        self.pretrained_cfg: dict[str, Any] = {}

    def forward(self, images: Tensor) -> Tensor:
        return torch.tensor(self.classifier.logits(images.numpy()), device="cpu")


def _described(classifier: Classifier) -> Teacher:
    """A classifier with the input and the classes of its file, as the evaluation takes it."""
    prepared, module = classifier.preprocessing, _Module(classifier)
    teacher = Teacher(
        module,
        mean=prepared.mean,
        std=prepared.std,
        num_classes=classifier.num_classes,
        input_size=(prepared.channels, *prepared.size),
        name=Path(classifier.source).name,
        crop_pct=prepared.crop_pct,
        interpolation=prepared.interpolation,
        crop_mode=prepared.crop_mode,
    )
    names = list(classifier.class_names)
    if names and names != class_names(teacher):  # timm knows the classes of ImageNet by more than one name
        module.pretrained_cfg = {"label_names": names}
    return teacher
