"""A program of torch.export, for torch itself, ExecuTorch and AOTInductor."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from attrs import frozen
from torch import Tensor
from torch.export.graph_signature import InputKind

from spdfq.errors import ModelError, first_line
from spdfq.exporters.base import Exporter, Written
from spdfq.exporters.lowering import Lowered, has_integers, plain_dequantize
from spdfq.exporters.program import exported_program
from spdfq.exporters.runtime_models import RuntimeModel
from spdfq.quantized.model import QuantizedModel
from spdfq.quantized.sites import WEIGHT
from spdfq.quantizers.log_grid import LogTables
from spdfq.registry import exporters
from spdfq.registry import quantizers as registered
from spdfq.runtime.files import replace_file
from spdfq.teacher import Teacher

_NOTES = ("stack_trace", "nn_module_stack", "source_fn_stack", "torch_fn", "from_node")


@exporters.register("pt2")
@frozen(kw_only=True)
class TorchProgramExporter(Exporter):
    """A program of `torch.export` with integer weights, for any number of images; it computes in float.

    Weights are int8 and are dequantized in the program. Activations pass their quantizers as in the quantized model, so
    its logits are those of the quantized model bit for bit. ``torch.export.load(path).module()`` runs it.
    """

    suffix: ClassVar[str] = ".pt2"

    def write(self, model: QuantizedModel, teacher: Teacher, path: Path, metadata: dict[str, str]) -> Written:
        """Write the file; see `Exporter.write`."""
        program = exported_program(Lowered(model, None, plain_dequantize, LogTables.at).eval(), model, teacher)
        _without_unused(program)
        stored = io.BytesIO()
        torch.export.save(program, stored, extra_files=dict(metadata))
        replace_file(path, lambda temporary: temporary.write_bytes(stored.getvalue()))
        others = {name: model.quantizers[name] for name in model.weight_names()}
        notes = [
            f"{name}: {registered.label(quantizer)} of {quantizer.bits} bits is stored in float32"
            for name, quantizer in others.items()
            if not has_integers(quantizer, WEIGHT)
        ]
        return Written(notes)

    def runtimes(self) -> Sequence[type[RuntimeModel]]:
        """This torch."""
        return (TorchProgram,)


class TorchProgram(RuntimeModel):
    """A file of `TorchProgramExporter` in torch."""

    runtime: ClassVar[str] = "torch"

    def __init__(self, path: Path) -> None:
        super().__init__(path, torch.__version__, None, [])
        try:
            self._program: Any = torch.export.load(str(path)).module()
        except Exception as error:  # torch has no exception type of its own for this
            raise ModelError(f"{path}: torch cannot read it ({first_line(error)}); export it again") from None

    def forward(self, images: Tensor) -> Tensor:
        """Logits of images; see `RuntimeModel.forward`."""
        logits: Tensor = self._program(images)
        return logits

    def train(self, mode: bool = True) -> "TorchProgram":
        """Does nothing: a program has no training mode."""
        return self


def _without_unused(program: torch.export.ExportedProgram) -> None:
    """Removes the float weights behind the integer ones, and notes on the source code, which are larger than both."""
    graph, signature = program.graph, program.graph_signature
    nodes = {node.name: node for node in graph.nodes if node.op == "placeholder"}
    kept = []
    for spec in signature.input_specs:
        node = nodes[spec.arg.name]  # type: ignore[union-attr]
        if spec.kind in (InputKind.PARAMETER, InputKind.BUFFER) and not node.users and spec.target is not None:
            graph.erase_node(node)
            program.state_dict.pop(spec.target, None)
            program.constants.pop(spec.target, None)
        else:
            kept.append(spec)
    signature.input_specs[:] = kept
    for node in graph.nodes:
        for key in _NOTES:
            node.meta.pop(key, None)
    program.graph_module.recompile()
