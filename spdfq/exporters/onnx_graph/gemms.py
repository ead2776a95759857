"""A pass over linear layers: a product and its bias become one Gemm on rows, whose bias is integers of 32 bits."""

import onnx_ir as ir

from spdfq.exporters.onnx_graph.values import (
    attribute,
    constant,
    only_user,
    per_tensor,
    producer,
    replaced,
    shape_of,
    sizes,
    stored_weight,
)
from spdfq.exporters.onnx_graph.weights import integer_bias


def products_with_biases(graph: ir.Graph) -> None:
    """Writes MatMul and Add as Gemm between two reshapes: onnxruntime has no kernel for integers with a float bias."""
    for node in list(graph):
        data, weight = producer(node.inputs[0], "DequantizeLinear") if node.inputs else None, None
        if node.op_type == "MatMul" and data is not None and per_tensor(data):
            weight = stored_weight(node.inputs[1])
        add = only_user(node.outputs[0]) if weight is not None else None
        if weight is None or data is None or add is None or add.op_type != "Add":
            continue
        dequantize, codes = weight
        found = [value for value in add.inputs if value is not node.outputs[0]]
        shape, out = shape_of(node.inputs[0]), codes.shape[-1]  # type: ignore[arg-type]
        bias = constant(found[0]) if found else None
        along_outputs = constant(dequantize.inputs[1]).ndim == 0 or attribute(dequantize, "axis", 1) % codes.ndim == 1  # type: ignore[union-attr]
        if codes.ndim != 2 or bias is None or bias.shape != (out,) or not along_outputs:
            continue
        if len(shape) < 2 or None in shape[1:]:
            continue
        inner = [size for size in shape[1:] if size is not None]
        integers = integer_bias(graph, str(node.name), bias, data, dequantize)
        if integers is None:
            continue
        rows = ir.node("Reshape", [data.inputs[0], sizes(graph, f"{node.name}_flat", [-1, inner[-1]])])
        rows.name = f"{node.name}_rows"
        values = ir.node("DequantizeLinear", [rows.outputs[0], *data.inputs[1:]], name=f"{node.name}_values")
        gemm = ir.node("Gemm", [values.outputs[0], node.inputs[1], integers.outputs[0]], name=node.name)
        back = sizes(graph, f"{node.name}_shape", [-1, *inner[:-1], out])
        whole = ir.node("Reshape", [gemm.outputs[0], back], name=f"{node.name}_whole")
        replaced(add, [rows, values, integers, gemm, whole])
        graph.remove(node, safe=True)
