"""What onnxruntime makes of a file: few nodes besides the products, and no slow kernels. No clock is needed."""

from collections import Counter

import onnx
import pytest
import torch
from support import backends as tiny
from support.exports import UNIFORM, W8A8, agreement, exported, opened

from spdfq.exporters.products import PART, whole_products
from spdfq.inference.session import cpu_session

ROTATED = ("{type='rotate'}",)
SMOOTHED = ("{type='rotate'}", "{type='smooth'}")
SYMMETRIC = (
    "quantization.weights={type='uniform', bits=8, granularity='channel', symmetric=true}",
    "quantization.attention={type='uniform', bits=8, granularity='tensor', symmetric=true}",
)


def file_of(name, folder, *steps, **options):
    chosen = tiny.teacher(name, **options)
    listed = ", ".join((*steps, "{type='calibrate', observer='minmax', weight_observer='minmax'}"))
    model = tiny.quantized(chosen, *W8A8, *SYMMETRIC, f"quantization.steps=[{listed}]", UNIFORM)
    return model, chosen, exported(model, chosen, folder)


def optimised(file, folder):
    """The nodes of onnxruntime's optimised graph, and the element type of each value."""
    path = folder / "optimised.onnx"
    cpu_session(str(file.path), intra_op_num_threads=1, optimized_model_filepath=str(path))
    graph = onnx.load(path).graph
    types = {tensor.name: tensor.data_type for tensor in graph.initializer}
    for node in graph.node:  # those that say it, or keep it
        if node.op_type == "QuantizeLinear":
            types[node.output[0]] = types[node.input[2]]
        elif node.op_type in ("Reshape", "Transpose", "Squeeze") and node.input[0] in types:
            types[node.output[0]] = types[node.input[0]]
        elif node.op_type == "QGemm" and len(node.input) > 8:
            types[node.output[0]] = types[node.input[8]]
    return list(graph.node), types


@pytest.fixture(scope="module")
def smoothed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("smoothed")
    return (*file_of("vit", folder, *SMOOTHED), folder)


def test_each_norm_of_a_rotated_model_is_one_node(smoothed):
    model, _, file, folder = smoothed
    counts = Counter(node.op_type for node in optimised(file, folder)[0])
    assert counts["SimplifiedLayerNormalization"] == len(model.norms) == 5
    assert not counts["Pow"] + counts["ReduceMean"] + counts["Reciprocal"] + counts["Sqrt"]


def test_the_factor_of_a_shifted_layer_is_in_the_weight_of_the_norm_before_it(smoothed):
    model, _, file, _ = smoothed
    counts = Counter(node.op_type for node in onnx.load(file.path).graph.node)
    layers = ("attn.qkv", "mlp.fc1", "mlp.fc2")
    assert sorted(model.shifted) == sorted(f"blocks.{block}.{layer}.weight" for block in (0, 1) for layer in layers)
    assert counts["Sub"] == 2  # behind the two GELUs, where no norm is
    assert agreement(opened(file), model, tiny.images(100)) >= 0.97


def test_a_norm_has_a_weight_without_a_step_that_shifts_inputs(tmp_path):
    model, _, file = file_of("vit", tmp_path, *ROTATED, depth=1)
    counts = Counter(node.op_type for node in optimised(file, tmp_path)[0])
    assert counts["SimplifiedLayerNormalization"] == len(model.norms) == 3
    assert agreement(opened(file), model, tiny.images(100)) >= 0.97


def test_queries_are_uint8_and_keys_and_values_int8(smoothed):
    _, _, file, folder = smoothed
    nodes, types = optimised(file, folder)
    operands = {
        node.name: (types[node.input[0]], types[node.input[1 if node.op_type == "MatMulIntegerToFloat" else 3]])
        for node in nodes
        if node.name.endswith((".attn", ".attn_2"))
    }
    assert list(operands.values()) == [(onnx.TensorProto.UINT8, onnx.TensorProto.INT8)] * 4


def test_no_float_value_is_copied_and_only_the_stream_is_added(smoothed):
    _, _, file, folder = smoothed
    counts = Counter(node.op_type for node in optimised(file, folder)[0])
    assert not counts["Split"] + counts["Slice"] + counts["DequantizeLinear"]
    assert counts["QGemm"] == 2 * (3 + 3) + 1  # queries, keys, values, proj, fc1, fc2; the head
    patches, positions, residuals, shifts = 1, 1, 4, 4
    assert counts["Add"] == patches + positions + residuals + shifts


def test_the_parts_of_a_product_are_one_product(smoothed):
    _, _, file, _ = smoothed
    names = [node.name for node in onnx.load(file.path).graph.node if node.op_type == "Gemm"]
    parts = [f"blocks.{block}.attn.qkv{PART}{number}" for block in (0, 1) for number in range(3)]
    assert [name for name in names if PART in name] == parts
    assert whole_products(["a#0", "b", "a#1", "", ""]) == ["a", "b", "", ""]
    assert opened(file).integer_products == 14  # 2 blocks of 6, the patches and the head


def test_any_number_of_images_gives_the_same_logits(smoothed):
    _, _, file, _ = smoothed
    images, run = tiny.images(5), opened(file)
    assert torch.allclose(torch.cat([run(image[None]) for image in images]), run(images), atol=1e-4)


def test_no_two_weights_share_their_zero_points(smoothed):
    """onnxruntime refuses such a file where it turns them into uint8, on processors without VNNI."""
    graph = onnx.load(smoothed[2].path).graph
    stored = {tensor.name for tensor in graph.initializer if tensor.data_type == onnx.TensorProto.INT8}
    dequantized = [node for node in graph.node if node.op_type == "DequantizeLinear" and node.input[0] in stored]
    used = Counter(name for node in dequantized for name in node.input if name in stored)
    assert len(dequantized) > 5
    assert set(used.values()) == {1}


def test_everything_stored_is_used(smoothed):
    """onnxruntime warns about each constant that no node takes whenever such a file is opened."""
    graph = onnx.load(smoothed[2].path).graph
    assert {tensor.name for tensor in graph.initializer} <= {name for node in graph.node for name in node.input}
