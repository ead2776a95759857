"""A checkpoint of the network with its quantized weights in float32, for timm."""

from pathlib import Path
from typing import ClassVar

import torch
from attrs import frozen

from spdfq.errors import ModelError
from spdfq.exporters.base import Exporter, Written
from spdfq.quantized.model import QuantizedModel
from spdfq.quantized.sites import WEIGHT
from spdfq.registry import exporters
from spdfq.runtime.files import write_tensors
from spdfq.teacher import Teacher
from spdfq.teacher.state import extra_states, persistent_tensors

_ELSEWHERE = "timm's architecture has no place for it; export with format 'onnx' or 'pt2'"


@exporters.register("safetensors")
@frozen(kw_only=True)
class DequantizedExporter(Exporter):
    """A float32 checkpoint with the values of the quantized weights, for ``timm.create_model(checkpoint_path=...)``.

    It has the size and speed of the float model, and no quantizers of activations: other tools can start from it.
    """

    suffix: ClassVar[str] = ".safetensors"

    @torch.no_grad()
    def write(self, model: QuantizedModel, teacher: Teacher, path: Path, metadata: dict[str, str]) -> Written:
        """Write the file; see `Exporter.write`."""
        _check(model)
        weights = set(model.weight_names())
        tensors = {
            name: model.quantized(name, WEIGHT, tensor) if name in weights else tensor
            for name, tensor in persistent_tensors(model.network).items()
        }
        write_tensors(path, {name: tensor.clone() for name, tensor in tensors.items()}, metadata)
        count = len(model.quantizers) - len(weights)
        return Written([f"{count} activations are not quantized: the file holds weights only"] if count else [])


def _check(model: QuantizedModel) -> None:
    """Raise a ModelError if steps changed the architecture."""
    places = {
        **dict.fromkeys(model.norms, "the step 'rotate' made it an RMSNorm without parameters"),
        **{name.removesuffix(".weight"): "the step 'smooth' made it shift its input" for name in model.shifted},
        **{name.removesuffix(".bias"): "a step gave it a bias" for name in model.biases},
        **dict.fromkeys(extra_states(model.network), "has extra state"),
    }
    for name, what in places.items():
        raise ModelError(f"{name}: {what}, and {_ELSEWHERE}")
