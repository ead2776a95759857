"""What the passes ask of a graph, and the small changes they make."""

from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

Array = NDArray[Any]


def constant(value: ir.Value | None) -> Array | None:
    """The array of a constant; ``None`` for anything else."""
    if value is None or value.const_value is None:
        return None
    return value.const_value.numpy()


def attribute(node: ir.Node, name: str, default: Any = None) -> Any:
    """The value of an attribute."""
    found = node.attributes.get(name)
    return default if found is None else found.value


def producer(value: ir.Value | None, kind: str) -> ir.Node | None:
    """The node of this kind that computes a value; ``None`` if another one does."""
    node = None if value is None else value.producer()
    return node if node is not None and node.op_type == kind else None


def only_user(value: ir.Value) -> ir.Node | None:
    """The only node that uses a value; ``None`` for several, and for an output of the graph."""
    users = list(value.uses())
    return users[0].node if len(users) == 1 and not value.is_graph_output() else None


def shape_of(value: ir.Value) -> list[int | None]:
    """The sizes of a value; ``None`` where it is not known before the graph runs."""
    return [size if isinstance(size, int) else None for size in value.shape or ()]


def stored(graph: ir.Graph, name: str, array: Array) -> ir.Value:
    """A new initializer."""
    unique, count = name, 1
    while unique in graph.initializers:
        unique, count = f"{name}_{count}", count + 1
    tensor = ir.tensor(array, name=unique)
    value = ir.Value(name=unique, const_value=tensor, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype))
    graph.register_initializer(value)
    return value


def sizes(graph: ir.Graph, name: str, numbers: list[int]) -> ir.Value:
    """A new initializer of whole numbers, such as a shape."""
    return stored(graph, name, np.array(numbers, np.int64))


def replaced(node: ir.Node, new: list[ir.Node]) -> None:
    """Puts nodes in the place of one; the last of them computes its output."""
    graph, old, value = node.graph, node.outputs[0], new[-1].outputs[0]
    assert graph is not None
    graph.insert_before(node, new)
    value.shape, value.type = old.shape, old.type
    is_output, name = old.is_graph_output(), old.name
    ir.convenience.replace_all_uses_with(old, value, replace_graph_outputs=True)
    graph.remove(node, safe=True)
    if is_output:
        value.name = name


def stored_weight(value: ir.Value | None) -> tuple[ir.Node, Array] | None:
    """The DequantizeLinear of a value that has constant codes, and the codes; ``None`` for any other value."""
    node = producer(value, "DequantizeLinear")
    codes = None if node is None else constant(node.inputs[0])
    return None if node is None or codes is None else (node, codes)


def per_tensor(node: ir.Node) -> bool:
    """Whether a DequantizeLinear has one scale, a constant."""
    scale = constant(node.inputs[1])
    return scale is not None and scale.ndim == 0
