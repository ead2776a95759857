"""All passes in their order."""

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from spdfq.exporters.onnx_graph.activations import folded_factors, late_dequantization, shared
from spdfq.exporters.onnx_graph.constants import computed_constants
from spdfq.exporters.onnx_graph.convolutions import convolutions_as_products
from spdfq.exporters.onnx_graph.gemms import products_with_biases
from spdfq.exporters.onnx_graph.norms import fused_norms
from spdfq.exporters.onnx_graph.operands import quantized_parts
from spdfq.exporters.onnx_graph.storage import four_bit_weights, named_products, registered_constants, stripped
from spdfq.exporters.onnx_graph.weights import integer_gemms, moved_codes


def arranged(model: ir.Model) -> list[str]:
    """Brings a graph with QuantizeLinear and DequantizeLinear into the form that runtimes fuse, in place.

    Returns:
        The names of products that do not depend on the images; they are computed, and no longer in the graph.
    """
    graph = model.graph
    registered_constants(graph)
    named_products(graph)
    constant = computed_constants(model)
    fused_norms(graph)
    shared(graph)
    late_dequantization(graph)
    folded_factors(graph)
    late_dequantization(graph)  # a factor may have been between a DequantizeLinear and a Transpose
    convolutions_as_products(graph)
    moved_codes(graph)
    integer_gemms(graph)
    RemoveUnusedNodesPass()(model)  # the passes below ask what takes a value
    products_with_biases(graph)
    quantized_parts(graph)
    four_bit_weights(graph)
    stripped(model)
    return constant
