"""A pass over linear layers: a product and its bias become one Gemm on rows, whose bias is integers of 32 bits."""

import onnx_ir as ir

from spdfq.exporters.onnx_graph.values import (
    Array,
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
from spdfq.exporters.onnx_graph.weights import integer_bias, parameters


def products_with_biases(graph: ir.Graph) -> None:
    """Writes MatMul and Add as Gemm between two reshapes: onnxruntime has no kernel for integers with a float bias."""
    for node in list(graph):
        data = producer(node.inputs[0], "DequantizeLinear") if node.op_type == "MatMul" else None
        weight = stored_weight(node.inputs[1]) if data is not None and per_tensor(data) else None
        add = only_user(node.outputs[0])
        if data is None or weight is None or add is None or add.op_type != "Add":
            continue
        dequantize, codes = weight
        inner, bias = shape_of(data.outputs[0])[1:], _other_constant(add, node.outputs[0])
        scale = parameters(dequantize)[0]
        along_outputs = scale.ndim == 0 or attribute(dequantize, "axis", 1) % codes.ndim == 1
        if codes.ndim != 2 or bias is None or bias.shape != codes.shape[1:] or not along_outputs:
            continue
        if not inner or None in inner:
            continue
        if (integers := integer_bias(graph, str(node.name), bias, data, dequantize)) is None:
            continue
        known = [size for size in inner if size is not None]
        flat = sizes(graph, f"{node.name}_flat", [-1, known[-1]])
        rows = ir.node("Reshape", [data.inputs[0], flat], name=f"{node.name}_rows")
        values = ir.node("DequantizeLinear", [rows.outputs[0], *data.inputs[1:]], name=f"{node.name}_values")
        gemm = ir.node("Gemm", [values.outputs[0], node.inputs[1], integers.outputs[0]], name=node.name)
        back = sizes(graph, f"{node.name}_shape", [-1, *known[:-1], codes.shape[1]])
        whole = ir.node("Reshape", [gemm.outputs[0], back], name=f"{node.name}_whole")
        replaced(add, [rows, values, integers, gemm, whole])
        graph.remove(node, safe=True)


def _other_constant(node: ir.Node, value: ir.Value) -> Array | None:
    """The constant that a node takes besides a value."""
    others = [other for other in node.inputs if other is not value]
    return constant(others[0]) if len(others) == 1 else None
