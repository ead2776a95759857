"""Passes over weights: the codes are stored in the order in which a product reads them."""

from typing import Any

import numpy as np
import onnx_ir as ir

from spdfq.exporters.onnx_graph.values import (
    Array,
    attribute,
    constant,
    per_tensor,
    producer,
    replaced,
    shape_of,
    stored,
    stored_weight,
)

_LARGEST = 2**31 - 1


def moved_codes(graph: ir.Graph) -> None:
    """Transposes, slices and reshapes the codes of weights in the file, so that no node does it at run time."""
    for node in list(graph):
        weight = stored_weight(node.inputs[0]) if node.inputs else None
        if weight is None or len(node.outputs) != 1:
            continue
        dequantize, codes = weight
        axis = attribute(dequantize, "axis", 1) % codes.ndim
        channels = np.arange(codes.shape[axis]).reshape([-1 if i == axis else 1 for i in range(codes.ndim)])
        taken, where = (moved(node, array) for array in (codes, np.broadcast_to(channels, codes.shape)))
        if taken is None or where is None:
            continue
        found = _channel_axis(where)
        if found is None:
            continue
        scale, zero = parameters(dequantize)
        new_axis, kept = found
        if scale.ndim:
            scale, zero = scale[kept], zero[kept]
        replaced(node, [dequantized(graph, str(dequantize.name), np.ascontiguousarray(taken), scale, zero, new_axis)])


def integer_gemms(graph: ir.Graph) -> None:
    """Writes Gemm with a quantized weight without a transposition, and its bias as integers of 32 bits."""
    for node in list(graph):
        if node.op_type != "Gemm" or attribute(node, "transA", 0):
            continue
        weight, data = stored_weight(node.inputs[1]), producer(node.inputs[0], "DequantizeLinear")
        if weight is None or data is None or not per_tensor(data):
            continue
        dequantize, codes = weight
        scale, zero = parameters(dequantize)
        axis = attribute(dequantize, "axis", 1) % 2
        new = []
        right: Any = node.inputs[1]
        if attribute(node, "transB", 0):
            axis = 1 - axis
            new.append(dequantized(graph, str(dequantize.name), np.ascontiguousarray(codes.T), scale, zero, axis))
            right = new[-1].outputs[0]
        inputs = [node.inputs[0], right]
        if len(node.inputs) > 2 and node.inputs[2] is not None:
            array = constant(node.inputs[2])
            plain = attribute(node, "alpha", 1.0) == attribute(node, "beta", 1.0) == 1 and (not scale.ndim or axis == 1)
            bias = None
            if plain and array is not None and array.ndim == 1:
                bias = integer_bias(graph, str(node.name), array, data, dequantize)
            new += [bias] if bias is not None else []
            inputs.append(node.inputs[2] if bias is None else bias.outputs[0])
        kept = {key: value for key, value in node.attributes.items() if key != "transB"}
        replaced(node, [*new, ir.node("Gemm", inputs, attributes=kept, name=node.name)])


def integer_bias(graph: ir.Graph, name: str, bias: Array, data: ir.Node, dequantize: ir.Node) -> ir.Node | None:
    """The DequantizeLinear of a bias as integers; ``None`` if it is too large for them.

    Args:
        graph: keeps the integers.
        name: of the product.
        bias: ``[out]``.
        data: the DequantizeLinear of the product's input, with one scale.
        dequantize: that of its weight, with one scale, or one for each output.
    """
    step = np.asarray(parameters(data)[0] * parameters(dequantize)[0], np.float32)  # of the sums of integers
    codes = np.round(bias / step.astype(np.float64))
    if np.abs(codes).max() > _LARGEST:
        return None
    inputs = [stored(graph, f"{name}_bias", codes.astype(np.int32)), stored(graph, f"{name}_step", step)]
    return ir.node("DequantizeLinear", inputs, attributes={"axis": 0}, name=f"{name}_bias_values")


def parameters(dequantize: ir.Node) -> tuple[Array, Array]:
    """Scale and zero point of a DequantizeLinear; without a zero point, int32 zeros."""
    scale = constant(dequantize.inputs[1])
    assert scale is not None
    zero = constant(dequantize.inputs[2]) if len(dequantize.inputs) > 2 else None
    return scale, np.zeros(scale.shape, np.int32) if zero is None else zero


def dequantized(graph: ir.Graph, name: str, codes: Array, scale: Array, zero: Array, axis: int) -> ir.Node:
    """A new DequantizeLinear of constant codes; scale and zero point are ``[]`` or one for each index of the axis."""
    inputs = [stored(graph, f"{name}_{what}", array) for what, array in (("codes", codes), ("scale", scale))]
    if codes.dtype != np.int32:  # whose zero point is 0
        inputs.append(stored(graph, f"{name}_zero_point", zero))
    return ir.node("DequantizeLinear", inputs, attributes={"axis": axis}, name=f"{name}_moved")


def _channel_axis(where: Array) -> tuple[int, Array] | None:
    """The axis along which the channel changes, and the channel at each of its indices; ``None`` for several axes.

    The last axis, that of the outputs, if there is one channel only: onnxruntime takes no scale for each input.
    """
    for axis in reversed(range(where.ndim)):
        line = np.moveaxis(where, axis, -1).reshape(-1, where.shape[axis])
        if (line == line[:1]).all():
            return axis, line[0]
    return None


def moved(node: ir.Node, array: Array) -> Array | None:
    """What a node that only moves values makes of an array; ``None`` for any other node."""
    given = [constant(value) for value in node.inputs[1:]]
    if any(value is None for value in given):
        return None
    if node.op_type == "Transpose":
        return array.transpose(attribute(node, "perm"))
    if node.op_type == "Reshape":
        shape = shape_of(node.outputs[0])
        return None if None in shape else array.reshape([size for size in shape if size is not None])
    if node.op_type in ("Squeeze", "Unsqueeze") and given:
        axes: Any = tuple(int(axis) for axis in given[0])  # type: ignore[union-attr]
        return array.squeeze(axes) if node.op_type == "Squeeze" else np.expand_dims(array, axes)
    if node.op_type == "Slice":
        return _sliced(array, *given)
    return None


def _sliced(array: Array, starts: Any, ends: Any, axes: Any = None, steps: Any = None) -> Array:
    index = [slice(None)] * array.ndim
    axes = range(len(starts)) if axes is None else axes
    steps = [1] * len(starts) if steps is None else steps
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        index[int(axis)] = slice(int(start), int(end), int(step))
    return array[tuple(index)]
