"""ONNX with QuantizeLinear and DequantizeLinear, for onnxruntime, OpenVINO and others."""

import logging
import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import torch
from attrs import frozen

from spdfq.errors import ModelError, first_line, is_out_of_memory
from spdfq.exporters.base import Exporter, Written
from spdfq.exporters.containers import container_lines
from spdfq.exporters.logarithms import look_up
from spdfq.exporters.lowering import Lowered, dequantize, quantize
from spdfq.exporters.onnxruntime_model import OnnxRuntimeModel
from spdfq.exporters.openvino_model import OpenVinoModel
from spdfq.exporters.program import exported_program
from spdfq.exporters.runtime_models import RuntimeModel
from spdfq.extras import installed
from spdfq.quantized.model import QuantizedModel
from spdfq.quantizers.log_grid import TINY
from spdfq.registry import exporters
from spdfq.runtime.files import replace_file
from spdfq.teacher import Teacher

OPSET = 21
INPUT, OUTPUT = "images", "logits"
_INT32 = 6  # the number of the type in ONNX
_FULL_RANGES = ((0, 255), (-128, 127), (0, 65535), (-32768, 32767))


@exporters.register("onnx")
@frozen(kw_only=True)
class OnnxExporter(Exporter):
    """ONNX, opset 21, with QuantizeLinear and DequantizeLinear around every product, and any number of images.

    Weights are int8, or int4 for 4 bits and fewer. Activations are integers of 8 bits, and of 16 bits if they have 16.
    The graph has the form for which onnxruntime and OpenVINO have integer kernels of 8 bits. The input ``images`` is
    float32 ``[batch, C, H, W]``, normalised; the output is ``logits``.
    """

    suffix: ClassVar[str] = ".onnx"
    extra: ClassVar[str] = "onnx"
    packages: ClassVar[tuple[str, ...]] = ("onnx", "onnxscript", "onnx_ir", "onnxruntime")

    def write(self, model: QuantizedModel, teacher: Teacher, path: Path, metadata: dict[str, str]) -> Written:
        """Write the file; see `Exporter.write`."""
        program = exported_program(Lowered(model, quantize, dequantize, look_up).eval(), model, teacher)
        graph, constant = _graph(program, teacher)
        graph.metadata_props.update(metadata)
        graph.graph.name = teacher.name
        replace_file(path, lambda temporary: _save(graph, temporary))
        fixed = [f"{name}: does not depend on the images, computed once for the file" for name in constant]
        return Written([*container_lines(model), *fixed], constant)

    def runtimes(self) -> Sequence[type[RuntimeModel]]:
        """Onnxruntime, and OpenVINO if that is installed."""
        return (OnnxRuntimeModel, OpenVinoModel) if installed("openvino") else (OnnxRuntimeModel,)


def _graph(program: torch.export.ExportedProgram, teacher: Teacher) -> tuple[Any, list[str]]:
    """The arranged graph of a program, an onnx_ir model, and the products that were computed for it."""
    from spdfq.exporters.onnx_graph.passes import arranged

    try:
        with _quiet():
            exported: Any = torch.onnx.export(
                program,
                dynamo=True,
                opset_version=OPSET,
                input_names=[INPUT],
                output_names=[OUTPUT],
                custom_translation_table=_translations(),
                verbose=False,
            )
    except Exception as error:  # each operator fails with its own error
        if is_out_of_memory(error):
            raise
        cause = error.__cause__ if isinstance(error.__cause__, Exception) else error
        raise ModelError(
            f"{teacher.name}: {_module_of(program, error)} has no ONNX operators ({first_line(cause)}); change that "
            "module, or export with format 'pt2'"
        ) from error
    return exported.model, arranged(exported.model)


def _module_of(program: torch.export.ExportedProgram, error: BaseException) -> str:
    """The module of the operation that an error of the exporter names."""
    texts = []
    cause: BaseException | None = error
    while cause is not None:
        texts.append(str(cause))
        cause = cause.__cause__
    message = "\n".join(texts)
    for node in program.graph.nodes:
        if node.op == "call_function" and f"%{node.name} " in message:
            scopes = [name for name, _ in (node.meta.get("nn_module_stack") or {}).values()]
            return (scopes[-1] if scopes else "").removeprefix("network").removeprefix(".") or "the network"
    return "the network"


def _translations() -> dict[Any, Any]:
    from onnxscript import opset21

    op: Any = opset21

    def quantize_linear(x: Any, scale: Any, zero_point: Any, axis: int, low: int, high: int) -> Any:
        if (low, high) not in _FULL_RANGES:  # QuantizeLinear stops at the ends of its type only
            zero = op.Cast(zero_point, to=1)
            ends = (op.Mul(op.Sub(op.Constant(value_float=float(end)), zero), scale) for end in (low, high))
            x = op.Clip(x, *ends)
        return op.QuantizeLinear(x, scale, zero_point, axis=axis)

    def dequantize_linear(codes: Any, scale: Any, zero_point: Any, axis: int) -> Any:
        return op.DequantizeLinear(codes, scale, zero_point, axis=axis)

    def look_up_by_operators(
        x: Any, scale: Any, edges: Any, values: Any, minus_step: Any, shift: Any = None, top: Any = None
    ) -> Any:
        ratio = op.Div(x, scale)
        logarithm = op.Log(op.Max(ratio if shift is None else op.Add(ratio, shift), op.Constant(value_float=TINY)))
        octaves = op.Div(logarithm, op.Constant(value_float=math.log(2)))
        steps_below_top = op.Div(octaves if top is None else op.Sub(octaves, top), minus_step)
        last, nan_code = (op.Constant(value_float=float(edges.shape[0] - back)) for back in (2, 1))
        guess = op.Clip(op.Floor(steps_below_top), op.Constant(value_float=0.0), last)
        guess = op.Cast(op.Where(op.IsNaN(ratio), nan_code, guess), to=_INT32)
        codes = op.Add(guess, op.Cast(op.LessOrEqual(ratio, op.Gather(edges, guess)), to=_INT32))
        return op.Gather(values, codes)

    own: Any = torch.ops.spdfq
    return {
        own.quantize.default: quantize_linear,
        own.dequantize.default: dequantize_linear,
        own.look_up.default: look_up_by_operators,
    }


def _save(graph: Any, path: Path) -> None:
    import onnx
    import onnx_ir

    onnx.save(onnx_ir.to_proto(graph), str(path))


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's notes on its own progress and versions."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
