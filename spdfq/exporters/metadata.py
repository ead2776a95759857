"""What an exported file says about itself."""

import json
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from spdfq.errors import DataError
from spdfq.quantized.model import QuantizedModel
from spdfq.teacher import Teacher

_PACKAGES = ("spdfq", "torch", "timm")


def described(teacher: Teacher, class_names: Sequence[str], more: dict[str, Any]) -> dict[str, str]:
    """The metadata of a file: JSON texts by key.

    Args:
        teacher: describes the input.
        class_names: in the order of the logits; empty if they are not known.
        more: further entries, such as the digest of the recipe.

    Raises:
        DataError: the number of names is not that of the logits.
    """
    if class_names and len(class_names) != teacher.num_classes:
        raise DataError(
            f"class_names: {len(class_names)} names for {teacher.num_classes} logits; give one for each, in their order"
        )
    channels, height, width = teacher.input_size
    entries = {
        "model": teacher.name,
        "class_names": list(class_names),
        "num_classes": teacher.num_classes,
        "mean": list(teacher.mean),
        "std": list(teacher.std),
        "size": [height, width],
        "channels": channels,
        "interpolation": teacher.interpolation,
        "crop_pct": teacher.crop_pct,
        "crop_mode": teacher.crop_mode,
        "versions": {package: _version(package) for package in _PACKAGES},
        **more,
    }
    return {key: json.dumps(value) for key, value in entries.items()}


def bits_of(model: QuantizedModel) -> dict[str, list[int]]:
    """The bits of weights and of activations that occur, ascending."""
    weights = set(model.weight_names())
    found = {"weights": set[int](), "activations": set[int]()}
    for name, quantizer in model.quantizers.items():
        found["weights" if name in weights else "activations"].add(quantizer.bits)
    return {what: sorted(bits) for what, bits in found.items()}


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"
