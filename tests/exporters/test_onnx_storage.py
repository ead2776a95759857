"""Passes over names, constants and weights of a graph, on graphs of a few nodes."""

import numpy as np
import onnx
import pytest

from spdfq.exporters.onnx_graph.storage import named_products, registered_constants
from spdfq.exporters.onnx_graph.weights import moved_codes

ir = pytest.importorskip("onnx_ir")


def graph_of(text):
    return ir.from_proto(onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["": 21]> {text}')).graph


def test_what_is_added_to_a_product_with_a_bias_is_not_its_bias():
    """Position embeddings behind a convolution: two nodes of one name are no valid file."""
    graph = graph_of(
        "g (float[1,3,4,4] x, float[2,3,2,2] w, float[2] b, float[1,2,2,2] position) => (float[1,2,2,2] y)"
        "{ c = Conv <strides = [2, 2]> (x, w, b) y = Add(c, position) }"
    )
    named_products(graph)
    assert [node.name for node in graph] == ["network", ""]


def test_the_sum_behind_a_product_without_a_bias_is_named_after_it():
    graph = graph_of("g (float[4,3] x, float[3,2] w, float[2] b) => (float[4,2] y) { p = MatMul(x, w) y = Add(p, b) }")
    named_products(graph)
    assert [node.name for node in graph] == ["network", "network_bias"]


def test_constants_that_are_not_in_the_graph_are_registered():
    graph = graph_of("g (float[4] x, float low) => (float[4] y) { y = Clip(x, low) }")
    (clip,) = graph
    clip.replace_input_with(1, ir.Value(name="low_1", const_value=ir.tensor(np.float32(-1.0))))
    registered_constants(graph)
    assert clip.inputs[1].name in graph.initializers
    assert clip.inputs[1].const_value.numpy() == -1


def test_a_weight_with_one_output_keeps_its_scale_along_the_outputs():
    graph = graph_of(
        "g (float[2,3] x) => (float[2,1] y) <int8[1,3] codes = {1, 2, 3}, float[1] scale = {0.5}, int8[1] zero = {0}>"
        "{ w = DequantizeLinear <axis = 0> (codes, scale, zero) t = Transpose <perm = [1, 0]> (w) y = MatMul(x, t) }"
    )
    moved_codes(graph)
    (dequantize,) = (node for node in graph if node.name.endswith("_moved"))
    assert dequantize.attributes["axis"].value == 1
    assert [list(value.shape) for value in dequantize.inputs] == [[3, 1], [1], [1]]
