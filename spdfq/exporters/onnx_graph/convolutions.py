"""A pass over convolutions: runtimes have integer kernels for MatMul, and none for a Conv with an output in float."""

from typing import Any

import numpy as np
import onnx_ir as ir
from attrs import frozen

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
    stored,
    stored_weight,
)


@frozen
class _Conv:
    """A two-dimensional convolution of codes without groups; sizes are (height, width)."""

    node: ir.Node
    data: ir.Node
    weight: ir.Node
    codes: Array
    size: tuple[int, int]
    stride: tuple[int, int]
    pads: tuple[int, int, int, int]
    dilation: tuple[int, int]

    @property
    def channels(self) -> int:
        return int(self.codes.shape[1])

    @property
    def kernel(self) -> tuple[int, int]:
        return int(self.codes.shape[2]), int(self.codes.shape[3])

    @property
    def output(self) -> tuple[int, int]:
        padded = self.size[0] + self.pads[0] + self.pads[2], self.size[1] + self.pads[1] + self.pads[3]
        height, width = (
            (padded[i] - self.dilation[i] * (self.kernel[i] - 1) - 1) // self.stride[i] + 1 for i in (0, 1)
        )
        return height, width


def convolutions_as_products(graph: ir.Graph) -> None:
    """Writes each Conv of 8-bit tensors without groups as a rearrangement of the codes and a MatMul."""
    for node in list(graph):
        if node.op_type == "Conv" and (conv := _found(node)):
            _rewritten(graph, conv)


def _found(node: ir.Node) -> _Conv | None:
    data, weight = producer(node.inputs[0], "DequantizeLinear"), stored_weight(node.inputs[1])
    if data is None or weight is None or not per_tensor(data) or attribute(node, "group", 1) != 1:
        return None
    zero = constant(data.inputs[2])
    if zero is None or zero.itemsize > 1:  # there are no integer kernels for 16 bits, and no Pad either
        return None
    dequantize, codes = weight
    given = node.inputs[0]
    shape = shape_of(given) if given is not None else []
    if codes.ndim != 4 or len(shape) != 4 or attribute(node, "auto_pad", "NOTSET") != "NOTSET":
        return None
    _, _, height, width = shape
    if height is None or width is None:
        return None
    strides, dilations, pads = (
        tuple(attribute(node, key) or default)
        for key, default in (("strides", (1, 1)), ("dilations", (1, 1)), ("pads", (0,) * 4))
    )
    return _Conv(node, data, dequantize, codes, (height, width), strides, pads, dilations)


def _rewritten(graph: ir.Graph, conv: _Conv) -> None:
    name, node, (rows, columns) = conv.node.name, conv.node, conv.output
    is_patches = conv.kernel == conv.stride and not any(conv.pads) and conv.dilation == (1, 1)
    whole = is_patches and (rows * conv.kernel[0], columns * conv.kernel[1]) == conv.size
    new, order = (_patches if whole else _windows)(graph, conv)
    data: Any = ir.node("DequantizeLinear", [new[-1].outputs[0], *conv.data.inputs[1:]], name=f"{name}_values")
    filters = conv.codes.transpose(*order, 0).reshape(-1, len(conv.codes))
    codes = stored(graph, f"{name}_filters", np.ascontiguousarray(filters))
    weight = ir.node(
        "DequantizeLinear", [codes, *conv.weight.inputs[1:]], attributes={"axis": 1}, name=f"{name}_weight"
    )
    new += [data, weight, ir.node("MatMul", [data.outputs[0], weight.outputs[0]], name=name)]
    if len(node.inputs) > 2 and node.inputs[2] is not None:
        new.append(ir.node("Add", [new[-1].outputs[0], node.inputs[2]], name=f"{name}_bias"))
    last = _tokens(node, rows * columns)
    if last is not None:
        replaced(last, new)
        return
    back = ir.node("Transpose", [new[-1].outputs[0]], attributes={"perm": [0, 2, 1]}, name=f"{name}_transposed")
    shape = sizes(graph, f"{name}_shape", [-1, len(conv.codes), rows, columns])
    replaced(node, [*new, back, ir.node("Reshape", [back.outputs[0], shape], name=f"{name}_image")])


def _tokens(node: ir.Node, count: int) -> ir.Node | None:
    """The Transpose behind a convolution whose output is used as tokens ``[B, N, O]`` only."""
    reshape = only_user(node.outputs[0])
    if reshape is None or reshape.op_type != "Reshape" or shape_of(reshape.outputs[0])[2:] != [count]:
        return None
    transpose = only_user(reshape.outputs[0])
    wanted = transpose is not None and transpose.op_type == "Transpose"
    return transpose if wanted and list(attribute(transpose, "perm")) == [0, 2, 1] else None  # type: ignore[arg-type]


def _patches(graph: ir.Graph, conv: _Conv) -> tuple[list[ir.Node], tuple[int, ...]]:
    """Codes ``[B, N, C * h * w]`` of patches side by side, and the order of the filter's axes."""
    name, channels, (height, width), (rows, columns) = conv.node.name, conv.channels, conv.kernel, conv.output
    split = sizes(graph, f"{name}_split", [-1, channels, rows, height, columns, width])
    first = ir.node("Reshape", [conv.data.inputs[0], split], name=f"{name}_cells")
    moved = ir.node("Transpose", [first.outputs[0]], attributes={"perm": [0, 2, 4, 1, 3, 5]}, name=f"{name}_patches")
    flat = sizes(graph, f"{name}_flat", [-1, rows * columns, channels * height * width])
    return [first, moved, ir.node("Reshape", [moved.outputs[0], flat], name=f"{name}_rows")], (1, 2, 3)


def _windows(graph: ir.Graph, conv: _Conv) -> tuple[list[ir.Node], tuple[int, ...]]:
    """Codes ``[B, N, h * w * C]`` of windows that may overlap, and the order of the filter's axes."""
    name, (rows, columns), zero = conv.node.name, conv.output, conv.data.inputs[2]
    new: list[ir.Node] = []
    codes: Any = conv.data.inputs[0]
    if any(conv.pads):
        top, left, bottom, right = conv.pads
        pads = sizes(graph, f"{name}_pads", [0, 0, top, left, 0, 0, bottom, right])
        new.append(ir.node("Pad", [codes, pads, zero], name=f"{name}_padded"))
        codes = new[-1].outputs[0]
    axes = sizes(graph, f"{name}_axes", [2, 3])
    steps = sizes(graph, f"{name}_steps", list(conv.stride))
    parts = []
    for row in range(conv.kernel[0]):
        for column in range(conv.kernel[1]):
            start = row * conv.dilation[0], column * conv.dilation[1]
            end = start[0] + (rows - 1) * conv.stride[0] + 1, start[1] + (columns - 1) * conv.stride[1] + 1
            bounds = [sizes(graph, f"{name}_bound", list(bound)) for bound in (start, end)]
            parts.append(ir.node("Slice", [codes, *bounds, axes, steps], name=f"{name}_{row}_{column}"))
    new += parts
    if len(parts) > 1:
        values = [part.outputs[0] for part in parts]
        new.append(ir.node("Concat", values, attributes={"axis": 1}, name=f"{name}_windows"))
    shape = sizes(graph, f"{name}_flat", [-1, len(parts) * conv.channels, rows * columns])
    new.append(ir.node("Reshape", [new[-1].outputs[0], shape], name=f"{name}_columns"))
    new.append(ir.node("Transpose", [new[-1].outputs[0]], attributes={"perm": [0, 2, 1]}, name=f"{name}_rows"))
    return new, (2, 3, 1)
