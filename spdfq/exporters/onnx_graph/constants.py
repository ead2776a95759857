"""A pass over what no image changes, such as the position biases that Swin v2 computes by a small network."""

import onnx
import onnx_ir as ir

from spdfq.exporters.onnx_graph.storage import PRODUCTS
from spdfq.exporters.onnx_graph.values import Array, stored
from spdfq.inference.session import cpu_session


def computed_constants(model: ir.Model) -> list[str]:
    """Computes the results of products that do not depend on the images once, and stores them in their place.

    Returns:
        The names of these products.
    """
    graph = model.graph
    graph.sort()
    fixed, products = _image_independent(graph)
    if not products:
        return []
    wanted = [value for value in products if any(use.node not in fixed for use in value.uses())]
    for value, array in zip(wanted, _values(model, wanted), strict=True):
        constant = stored(graph, f"{value.name}_fixed", array)
        for user, index in [(use.node, use.idx) for use in value.uses() if use.node not in fixed]:
            user.replace_input_with(index, constant)
    return [node.name or "" for node in fixed if node.op_type in PRODUCTS]


def _image_independent(graph: ir.Graph) -> tuple[dict[ir.Node, None], dict[ir.Value, None]]:
    """The nodes that no image changes, in order, and those of their outputs that products have a part in."""
    fixed: dict[ir.Node, None] = {}
    products: dict[ir.Value, None] = {}
    for node in graph:
        inputs = [value for value in node.inputs if value is not None]
        if not all(value.is_initializer() or value.producer() in fixed for value in inputs):
            continue
        fixed[node] = None
        if node.op_type in PRODUCTS or any(value in products for value in inputs):
            products |= dict.fromkeys(node.outputs)
    return fixed, products


def _values(model: ir.Model, wanted: list[ir.Value]) -> list[Array]:
    """The arrays of values that no image changes."""
    import onnxruntime

    whole = ir.to_proto(model)
    names = [value.name or "" for value in wanted]
    needed, nodes = set(names), list[onnx.NodeProto]()
    for node in reversed(whole.graph.node):
        if needed.intersection(node.output):
            needed.update(node.input)
            nodes.insert(0, node)
    outputs = [onnx.helper.make_empty_tensor_value_info(name) for name in names]
    kept = [tensor for tensor in whole.graph.initializer if tensor.name in needed]
    part = onnx.helper.make_model(
        onnx.helper.make_graph(nodes, "constants", [], outputs, kept),
        opset_imports=whole.opset_import,
        ir_version=whole.ir_version,
    )
    level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = cpu_session(part.SerializeToString(), graph_optimization_level=level)
    found: list[Array] = session.run(names, {})
    return found
