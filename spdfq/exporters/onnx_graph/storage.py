"""Passes over what the file stores: int4 weights, names of products, and nothing that no runtime reads."""

import ast

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import DeduplicateInitializersPass, RemoveUnusedNodesPass

from spdfq.exporters.onnx_graph.values import only_user, producer, stored, stored_weight

PRODUCTS = ("MatMul", "Gemm", "Conv", "ConvTranspose", "Einsum")
"""Operators of ONNX that multiply matrices."""
_LARGEST_SHARED = 1 << 30


def named_products(graph: ir.Graph) -> None:
    """Names each product after the module that multiplies, with a number from the second one of a module on."""
    counts: dict[str, int] = {}
    for node in graph:
        if node.op_type in PRODUCTS:
            scopes = ast.literal_eval(node.metadata_props.get("pkg.torch.onnx.name_scopes", "['']"))
            module = scopes[-2].removeprefix("network").removeprefix(".") if len(scopes) > 1 else ""
            counts[module] = counts.get(module, 0) + 1
            number = f"_{counts[module]}" if counts[module] > 1 else ""
            node.name = f"{module or 'network'}{number}"
            bias = only_user(node.outputs[0]) if len(node.inputs) < 3 else None  # a third input is the bias
            if bias is not None and bias.op_type == "Add":
                bias.name = f"{node.name}_bias"  # runtimes call the product so after they have merged both


def registered_constants(graph: ir.Graph) -> None:
    """Registers constants that the exporter's optimizer made, but did not register: the ends of some Clip."""
    for node in graph:
        for index, value in enumerate(node.inputs):
            if value is None or value.const_value is None or value.producer() or value.is_initializer():
                continue
            node.replace_input_with(index, stored(graph, str(value.name), value.const_value.numpy()))


def four_bit_weights(graph: ir.Graph) -> None:
    """Stores weights whose codes fit 4 bits as INT4, with a Cast to INT8 that runtimes do once, when they load."""
    import ml_dtypes

    for node in list(graph):
        if node.op_type != "DequantizeLinear" or (weight := stored_weight(node.outputs[0])) is None:
            continue
        _, codes = weight
        if codes.dtype != np.int8 or codes.ndim < 2 or codes.min() < -8 or codes.max() > 7:
            continue
        packed = stored(graph, f"{node.inputs[0].name}_int4", codes.astype(ml_dtypes.int4))  # type: ignore[union-attr]
        cast = ir.node("Cast", [packed], attributes={"to": int(ir.DataType.INT8)}, name=f"{node.name}_int8")
        graph.insert_before(node, cast)
        node.replace_input_with(0, cast.outputs[0])


def stripped(model: ir.Model) -> None:
    """Removes unused nodes and constants, and the exporter's notes, which are half of a small file."""
    graph = model.graph
    RemoveUnusedNodesPass()(model)
    DeduplicateInitializersPass(size_limit=_LARGEST_SHARED)(model)
    _own_parameters(graph)
    taken = {value for node in graph for value in node.inputs} | set(graph.outputs)  # uses() counts removed nodes too
    for name in [name for name, value in graph.initializers.items() if value not in taken]:
        graph.initializers.pop(name)
    model.metadata_props.clear()
    graph.metadata_props.clear()
    for node in graph:
        node.metadata_props.clear()
        node.doc_string = None
        for value in node.outputs:
            value.metadata_props.clear()
    for value in (*graph.inputs, *graph.initializers.values()):
        value.metadata_props.clear()
    graph.sort()


def _own_parameters(graph: ir.Graph) -> None:
    """Gives each weight of 8 bits codes and zero points of its own.

    onnxruntime turns them into uint8 where the sums of int8 products would saturate (see `spdfq.inference.session`),
    and refuses a file where two weights share them.
    """
    taken: set[ir.Value] = set()
    for node in graph:
        if node.op_type != "DequantizeLinear" or producer(node.inputs[0], "QuantizeLinear"):
            continue
        for index, value in enumerate(node.inputs):
            if value is None or value.const_value is None or value.dtype != ir.DataType.INT8:
                continue
            if value in taken:
                node.replace_input_with(index, stored(graph, f"{node.name}_{index}", value.const_value.numpy()))
            taken.add(value)
