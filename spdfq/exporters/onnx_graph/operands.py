"""A pass over layers whose outputs are quantized in parts, such as queries, keys and values of one layer."""

from collections.abc import Iterator
from math import prod
from typing import Any

import numpy as np
import onnx_ir as ir
from attrs import frozen

from spdfq.exporters.onnx_graph.values import (
    Array,
    attribute,
    constant,
    only_user,
    producer,
    replaced,
    sizes,
    stored_weight,
)
from spdfq.exporters.onnx_graph.weights import dequantized, moved, parameters
from spdfq.exporters.products import PART

_MOVES = ("Reshape", "Transpose", "Slice", "Squeeze", "Unsqueeze")


@frozen(eq=False)
class _Part:
    """A QuantizeLinear behind a layer, and what it takes.

    Args:
        node: the QuantizeLinear.
        columns: the layer's outputs that it takes, in order.
        shape: of the rows and these outputs, before the axes are put in order; -1 for the number of images.
        order: of the axes.
    """

    node: ir.Node
    columns: Array
    shape: list[int]
    order: list[int]


def quantized_parts(graph: ir.Graph) -> None:
    """Gives each quantized part of a Gemm a Gemm of its own, with QuantizeLinear beside it.

    So no node copies float values, and onnxruntime merges both if the codes are the first operand of a product. Codes
    of a second operand stay int8, because its kernels for uint8 times uint8 are as slow as float32: Flatten, which
    does nothing here, keeps onnxruntime from changing their type, and Reshape and Transpose move codes.
    """
    for gemm in list(graph):
        whole = only_user(gemm.outputs[0]) if gemm.op_type == "Gemm" else None
        parts = None if whole is None or whole.op_type != "Reshape" else _parts(gemm, whole)
        for number, part in enumerate(parts or ()):
            name = f"{gemm.name}{PART}{number}" if len(parts or ()) > 1 else f"{gemm.name}"
            replaced(part.node, _written(graph, gemm, part, name))


def _parts(gemm: ir.Node, whole: ir.Node) -> list[_Part] | None:
    """The parts of a layer; ``None`` if something else takes its output."""
    weight = stored_weight(gemm.inputs[1])
    if weight is None or len(gemm.inputs) != 3 or stored_weight(gemm.inputs[2]) is None:
        return None
    outer = constant(whole.inputs[1])
    if outer is None or outer[0] != -1 or (outer[1:] < 1).any():
        return None
    found = []
    for images in (2, 3):
        numbers = np.arange(images * prod(outer[1:].tolist())).reshape(images, *outer[1:].tolist())
        found.append(list(_leaves(whole.outputs[0], numbers)))
    parts = []
    for (node, two), (_, three) in zip(*found, strict=True):
        part = _part(node, two, three, int(outer[-1])) if two is not None and three is not None else None
        if part is None:
            return None
        parts.append(part)
    return parts


def _leaves(value: ir.Value, numbers: Array) -> Iterator[tuple[ir.Node, Array | None]]:
    """The nodes that take a value, behind those that only move it, and what they take; ``None`` if it is unknown."""
    for use in value.uses():
        node = use.node
        result = _moved(node, numbers) if node.op_type in _MOVES and use.idx == 0 else None
        if node.op_type in _MOVES and result is not None:
            yield from _leaves(node.outputs[0], result)
        else:
            is_plain = node.op_type == "QuantizeLinear" and use.idx == 0 and _one_scale(node)
            yield node, numbers if is_plain and not value.is_graph_output() else None


def _moved(node: ir.Node, numbers: Array) -> Array | None:
    if node.op_type != "Reshape":
        return moved(node, numbers)
    shape = constant(node.inputs[1])
    if shape is None or (shape == 0).any():
        return None
    try:
        return numbers.reshape(shape.tolist())
    except ValueError:  # for another number of images
        return None


def _one_scale(node: ir.Node) -> bool:
    scale = constant(node.inputs[1])
    return scale is not None and scale.ndim == 0 and constant(node.inputs[2]) is not None


def _part(node: ir.Node, two: Array, three: Array, outputs: int) -> _Part | None:
    """A part, from the numbers of the values that arrive for two and for three images."""
    rows, columns = two // outputs, two % outputs
    of_columns = [axis for axis in range(two.ndim) if (columns != columns.take([0], axis)).any()]
    of_rows = [axis for axis in range(two.ndim) if axis not in of_columns]
    if any((rows != rows.take([0], axis)).any() for axis in of_columns):
        return None
    taken = rows[tuple(slice(None) if axis in of_rows else 0 for axis in range(two.ndim))].flatten()
    images = [axis for axis in range(two.ndim) if two.shape[axis] != three.shape[axis]]
    if not np.array_equal(taken, np.arange(rows.max() + 1)) or len(images) != 1 or images[0] not in of_rows:
        return None
    chosen = columns[tuple(0 if axis in of_rows else slice(None) for axis in range(two.ndim))].flatten()
    axes = [*of_rows, *of_columns]
    shape = [-1 if axis in images else two.shape[axis] for axis in axes]
    return _Part(node, chosen, shape, [axes.index(axis) for axis in range(two.ndim)])


def _written(graph: ir.Graph, gemm: ir.Node, part: _Part, name: str) -> list[ir.Node]:
    new = []
    inputs: list[Any] = [gemm.inputs[0]]
    for value, axis in ((gemm.inputs[1], 1), (gemm.inputs[2], 0)):
        node = producer(value, "DequantizeLinear")
        assert node is not None
        codes, (scale, zero) = constant(node.inputs[0]), parameters(node)
        assert codes is not None
        if scale.ndim:
            scale, zero = scale[part.columns], zero[part.columns]
        taken = np.ascontiguousarray(codes.take(part.columns, axis))
        new.append(dequantized(graph, f"{name}_{axis}", taken, scale, zero, axis))
        inputs.append(new[-1].outputs[0])
    new.append(ir.node("Gemm", inputs, attributes=gemm.attributes, name=name))
    is_second = _is_second_operand(part.node)

    def add(kind: str, *others: Any, **attributes: Any) -> None:
        new.append(ir.node(kind, [new[-1].outputs[0], *others], attributes=attributes, name=f"{name}_{kind}"))

    def move() -> None:
        add("Reshape", sizes(graph, f"{name}_shape", part.shape))
        if part.order != sorted(part.order):
            add("Transpose", perm=part.order)

    if not is_second:
        move()
    else:
        add("Flatten", axis=1)
    add("QuantizeLinear", *part.node.inputs[1:], axis=attribute(part.node, "axis", 1))
    new[-1].outputs[0].type = part.node.outputs[0].type
    if is_second:
        move()
    return new


def _is_second_operand(quantize: ir.Node) -> bool:
    """Whether codes become the second operand of a product, perhaps moved."""
    node = quantize
    while (user := only_user(node.outputs[0])) is not None:
        if user.op_type == "MatMul":
            return user.inputs[1] is node.outputs[0]
        if user.op_type not in (*_MOVES, "DequantizeLinear"):
            return False
        node = user
    return False
