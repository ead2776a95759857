"""A pass over RMSNorms: the form that runtimes compute in one node, with the shift and the factor of what follows."""

import numpy as np
import onnx_ir as ir

from spdfq.exporters.onnx_graph.values import (
    Array,
    attribute,
    constant,
    only_user,
    producer,
    replaced,
    shape_of,
    stored,
)


def fused_norms(graph: ir.Graph) -> None:
    """Writes an RMSNorm as x / sqrt(mean(x²) + eps) * weight, which onnxruntime has a kernel for (not for 1 / sqrt).

    ``(y - shift) * factor`` behind it, as `ShiftedLinear` computes, becomes a part of the weight and one addition.
    """
    for node in list(graph):
        if node.op_type != "Mul" or node.graph is None:
            continue
        for x, inverse in (node.inputs, reversed(node.inputs)):
            root = _root_of_mean_square(x, producer(inverse, "Reciprocal"))
            if x is not None and root is not None:
                _write(graph, node, x, root)
                break


def _root_of_mean_square(x: ir.Value | None, reciprocal: ir.Node | None) -> ir.Value | None:
    """The value sqrt(mean(x²) + eps) over the last axis, if this is its reciprocal."""
    root = None if reciprocal is None else producer(reciprocal.inputs[0], "Sqrt")
    add = None if root is None else producer(root.inputs[0], "Add")
    mean = None if add is None else producer(add.inputs[0], "ReduceMean")
    power = None if mean is None else producer(mean.inputs[0], "Pow")
    if root is None or add is None or mean is None or power is None or power.inputs[0] is not x:
        return None
    axes, exponent, eps = (constant(value) for value in (mean.inputs[1], power.inputs[1], add.inputs[1]))
    if axes is None or exponent is None or eps is None or attribute(mean, "keepdims", 1) != 1:
        return None
    last = axes.tolist() in ([-1], [len(shape_of(power.outputs[0])) - 1])
    return root.outputs[0] if last and exponent.size == eps.size == 1 and float(exponent.item()) == 2 else None


def _write(graph: ir.Graph, norm: ir.Node, x: ir.Value, root: ir.Value) -> None:
    features = shape_of(norm.outputs[0])[-1]
    if features is None:
        return
    ends, weight, shift = _followers(norm, features)
    new = [ir.node("Div", [x, root], name=f"{norm.name}_divided")]
    gain = stored(graph, f"{norm.name}_weight", np.ones(features, np.float32) if weight is None else weight)
    new.append(ir.node("Mul", [new[-1].outputs[0], gain], name=f"{norm.name}_weighted"))
    if shift is not None:
        offset = stored(graph, f"{norm.name}_offset", shift)
        new.append(ir.node("Add", [new[-1].outputs[0], offset], name=f"{norm.name}_shifted"))
    for node in new:
        node.outputs[0].shape, node.outputs[0].type = norm.outputs[0].shape, norm.outputs[0].type
    if not ends:
        replaced(norm, new)
        return
    replaced(ends[-1], new)
    for node in reversed(ends[:-1]):
        graph.remove(node, safe=True)
    graph.remove(norm, safe=True)


def _followers(norm: ir.Node, features: int) -> tuple[list[ir.Node], Array | None, Array | None]:
    """The nodes behind a norm that a weight and an addition replace, with these two."""
    first = only_user(norm.outputs[0])
    if first is None or first.op_type not in ("Sub", "Mul"):
        return [], None, None
    if first.op_type == "Mul":
        weight = _vector(first, features)
        return ([], None, None) if weight is None else ([first], weight, None)
    second = only_user(first.outputs[0])
    shift = _vector(first, features) if first.inputs[0] is norm.outputs[0] else None
    weight = _vector(second, features) if second is not None and second.op_type == "Mul" else None
    if shift is None or weight is None or second is None:
        return [], None, None
    return [first, second], weight, (-shift.astype(np.float64) * weight).astype(np.float32)


def _vector(node: ir.Node, features: int) -> Array | None:
    """The constant ``[features]`` that a node takes besides another value."""
    found = [array for value in node.inputs if (array := constant(value)) is not None]
    return found[0] if len(found) == 1 and found[0].shape == (features,) else None
