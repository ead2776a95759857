"""Passes over activations: nothing stands between a DequantizeLinear and the product that takes it."""

import numpy as np
import onnx_ir as ir

from spdfq.exporters.onnx_graph.values import attribute, constant, per_tensor, producer, replaced, stored

# each of them has the codes of its first input, in another order or number
_MOVES = ("Transpose", "Reshape", "Squeeze", "Unsqueeze", "Slice", "Gather", "Expand", "Flatten", "Identity", "Tile")


def shared(graph: ir.Graph) -> None:
    """Quantizes a tensor once where several products take it with the same scale and zero point."""
    seen: dict[tuple, ir.Node] = {}
    for node in list(graph):
        if node.op_type not in ("Clip", "QuantizeLinear"):
            continue
        parameters = [constant(value) for value in node.inputs[1:]]
        if any(parameter is None for parameter in parameters):
            continue
        data = tuple((p.dtype.str, p.tobytes()) for p in parameters if p is not None)
        key = node.op_type, id(node.inputs[0]), attribute(node, "axis"), *data
        first = seen.setdefault(key, node)
        if first is not node:
            ir.convenience.replace_all_uses_with(node.outputs[0], first.outputs[0], replace_graph_outputs=True)
            graph.remove(node, safe=True)


def folded_factors(graph: ir.Graph) -> None:
    """Multiplies the scale of a DequantizeLinear by the factor that follows, such as that of attention scores."""
    for node in list(graph):
        if node.op_type not in ("Mul", "Div"):
            continue
        for index in (0, 1) if node.op_type == "Mul" else (1,):
            factor, dequantize = constant(node.inputs[index]), producer(node.inputs[1 - index], "DequantizeLinear")
            if factor is None or factor.size != 1 or dequantize is None or not per_tensor(dequantize):
                continue
            scale = constant(dequantize.inputs[1])
            assert scale is not None
            number = factor.reshape(()) if node.op_type == "Mul" else 1 / factor.reshape(())
            if not number > 0 or factor.ndim > len(node.outputs[0].shape or ()):
                continue
            new = stored(graph, f"{dequantize.name}_scale", np.array(scale * number, np.float32))
            inputs = [dequantize.inputs[0], new, *dequantize.inputs[2:]]
            replaced(node, [ir.node("DequantizeLinear", inputs, name=f"{dequantize.name}_scaled")])
            break


def late_dequantization(graph: ir.Graph) -> None:
    """Moves codes instead of values: a DequantizeLinear per tensor goes behind the nodes that only move its output."""
    changed = True
    while changed:
        changed = False
        for node in list(graph):
            new = _on_codes(node)
            if new:
                replaced(node, new)
                changed = True


def _on_codes(node: ir.Node) -> list[ir.Node]:
    """The node on codes and the DequantizeLinear behind it; empty if it cannot be moved."""
    if len(node.outputs) != 1:
        return []
    if node.op_type == "Concat":
        return _concatenated(node)
    dequantize = producer(node.inputs[0], "DequantizeLinear") if node.op_type in _MOVES else None
    if dequantize is None or constant(dequantize.inputs[0]) is not None or not per_tensor(dequantize):
        return []
    return _behind(node, dequantize, [dequantize.inputs[0], *node.inputs[1:]])


def _concatenated(node: ir.Node) -> list[ir.Node]:
    sources = [producer(value, "DequantizeLinear") for value in node.inputs]
    first = sources[0]
    if first is None or not per_tensor(first):
        return []
    codes = []
    for source in sources:
        if source is None or not _alike(first, source):
            return []
        codes.append(source.inputs[0])
    return _behind(node, first, codes)


def _alike(one: ir.Node, other: ir.Node) -> bool:
    """Whether two DequantizeLinear nodes have the same scale and zero point."""
    pairs = [(constant(a), constant(b)) for a, b in zip(one.inputs[1:], other.inputs[1:], strict=True)]
    return all(a is not None and b is not None and a.dtype == b.dtype and np.array_equal(a, b) for a, b in pairs)


def _behind(node: ir.Node, dequantize: ir.Node, inputs: list[ir.Value | None]) -> list[ir.Node]:
    moved = ir.node(node.op_type, inputs, attributes=node.attributes, name=f"{node.name}_codes")
    moved.outputs[0].shape = node.outputs[0].shape
    if dequantize.inputs[0] is not None:
        moved.outputs[0].type = dequantize.inputs[0].type
    late = ir.node(
        "DequantizeLinear", [moved.outputs[0], *dequantize.inputs[1:]], name=f"{dequantize.name}_{node.name}"
    )
    return [moved, late]
