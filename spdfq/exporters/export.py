"""Write a quantized model with an exporter."""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from attrs import field, frozen
from torch import Tensor

from spdfq.errors import ModelError, SpdfqError, shown, writing
from spdfq.exporters.base import Exporter
from spdfq.exporters.metadata import bits_of, described
from spdfq.exporters.uniform8 import with_uniform_activations
from spdfq.quantized.model import QuantizedModel
from spdfq.registry import exporters
from spdfq.runtime.arguments import check_tensor
from spdfq.teacher import Teacher

Softmax = Literal["float", "uniform8"]
SOFTMAX = ("float", "uniform8")


@frozen
class Exported:
    """An exported file.

    Args:
        path: of the file.
        format: name of the exporter.
        size: of the file in bytes.
        notes: a line for everything that the file does not compute as the quantized model does, and for integers that
            are stored in a wider type.
        constant_products: names of quantized products that do not depend on the images, computed once for the file.
        model: the quantized model that the file holds: the given one, or the one with 8-bit uniform activations.
    """

    path: Path
    format: str
    size: int
    notes: list[str]
    constant_products: list[str]
    model: QuantizedModel = field(repr=False)


def exporter_named(format: str | Exporter) -> Exporter:
    """The exporter of a format, after a check that its packages are installed.

    Raises:
        SpdfqError: the format is unknown, or a package is missing.
    """
    if not isinstance(format, (str, Exporter)):
        raise SpdfqError(f"format: expected the name of a format or an exporter, got {shown(format)}")
    exporter: Exporter = exporters.get(format)() if isinstance(format, str) else format
    exporter.check()
    return exporter


def write_export(
    model: QuantizedModel,
    teacher: Teacher,
    path: Path,
    exporter: Exporter,
    *,
    softmax: str = "float",
    images: Tensor | None = None,
    class_names: Sequence[str] = (),
    details: dict[str, Any] | None = None,
) -> Exported:
    """Write a quantized model into a file; arguments and errors as in `spdfq.export`.

    Args:
        model: as in `spdfq.export`.
        teacher: as in `spdfq.export`.
        path: as in `spdfq.export`.
        exporter: writes the file.
        softmax: as in `spdfq.export`.
        images: as in `spdfq.export`.
        class_names: as in `spdfq.export`.
        details: more entries of the metadata.
    """
    if not isinstance(model, QuantizedModel):
        raise ModelError(f"export: model must be a quantized model (spdfq.quantize makes one), got {shown(model)}")
    if softmax not in SOFTMAX:
        raise SpdfqError(f"softmax: must be one of {', '.join(SOFTMAX)}, got {shown(softmax)}")
    if path.is_dir():
        raise SpdfqError(f"{path}: is a folder; give the name of a file, such as {path / f'model{exporter.suffix}'}")
    model.check_calibrated()
    if any(parameter.device.type != "cpu" for parameter in model.parameters()):
        model = copy.deepcopy(model).cpu()  # files are written and checked on the CPU
    changed, lines = model, list[str]()
    if softmax == "uniform8":
        changed, lines = with_uniform_activations(model, _checked(images, teacher))
    metadata = described(teacher, class_names, {"bits": bits_of(changed), "softmax": softmax, **(details or {})})
    with writing(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
    written = exporter.write(changed, teacher, path, metadata)
    notes = [*lines, *written.notes]
    return Exported(path, exporters.label(exporter), path.stat().st_size, notes, written.constant_products, changed)


def _checked(images: Any, teacher: Teacher) -> Tensor:
    if images is None:
        raise SpdfqError("softmax 'uniform8': is calibrated on images; give images=, as to spdfq.quantize")
    check_tensor("images", images, "n, C, H, W")
    if tuple(images.shape[1:]) != teacher.input_size or not len(images):
        raise SpdfqError(f"images: expected [n, {', '.join(map(str, teacher.input_size))}], got {list(images.shape)}")
    return images
