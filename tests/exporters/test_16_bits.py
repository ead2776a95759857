"""Files with 8-bit weights and 16-bit activations: their structure, what runtimes compute, and what is said of it."""

import json

import onnx
import pytest
import torch
from support import backends as tiny
from support.exports import W8A8, agreement, exported, opened
from torch import nn

import spdfq
from spdfq.data import FashionMnist
from spdfq.errors import DataError
from spdfq.exporters.containers import ROUNDED
from spdfq.exporters.openvino_model import OpenVinoModel
from spdfq.exporters.products import PART, quantized_products
from spdfq.extras import installed
from spdfq.quantized.checkpoint import load_quantized, save_quantized
from spdfq.quantizers import UniformQuantizer
from spdfq.teacher import Teacher

WIDE = "quantization.{0}={{type='uniform', bits=16{1}}}"
A16 = [WIDE.format("activations", ""), WIDE.format("softmax", ""), WIDE.format("attention", ", symmetric=true")]
W8A16 = ["quantization.weights.bits=8", *A16]
TYPE = onnx.TensorProto.DataType
CPUS = (
    "activations of 16 bits are 16-bit integers for phone NPUs (QNN); on a CPU, onnxruntime computes their products "
    "in float, and OpenVINO leaves most of their quantizers out"
)


@pytest.fixture(scope="module")
def vit(tmp_path_factory):
    """The bundled ViT with the shipped recipe, calibrated in a shorter way."""
    teacher = spdfq.load_teacher("bundled:vit_fmnist")
    images = next(FashionMnist(skip=1900).batches(teacher, 32)).images
    model = spdfq.quantize(teacher, images, "backends/w8a16", overrides=[tiny.CALIBRATE])
    return model, teacher, exported(model, teacher, tmp_path_factory.mktemp("vit"))


def operands(path):
    """For each product of a file the types of both factors' codes, and whether a QuantizeLinear makes them.

    The parts of a layer, such as queries, keys and values, are one product.
    """
    graph = onnx.load(path).graph
    makers = {name: node for node in graph.node for name in node.output}
    types = {tensor.name: tensor.data_type for tensor in graph.initializer}
    found = {}
    for node in graph.node:
        if node.op_type in ("MatMul", "Gemm", "Conv"):
            pairs = [makers[name] for name in node.input[:2]]
            assert [maker.op_type for maker in pairs] == ["DequantizeLinear"] * 2, node.name
            kinds = tuple((types[pair.input[2]], pair.input[0] not in types) for pair in pairs)
            assert found.setdefault(node.name.partition(PART)[0], kinds) == kinds
    return list(found.values())


def test_codes_of_16_bits_are_around_every_product(vit):
    model, teacher, file = vit
    products = operands(file.path)
    assert len(products) == quantized_products(model, teacher) == 38
    signed, unsigned = (TYPE.INT16, True), (TYPE.UINT16, True)
    layers = [pair for pair in products if pair == (unsigned, (TYPE.INT8, False))]
    assert len(layers) == 26  # 6 blocks of 4, the patches and the head
    assert products.count((signed, signed)) == 6  # queries and keys
    assert products.count((unsigned, signed)) == 6  # softmax and values


def test_the_file_is_standard_onnx_and_says_its_bits(vit):
    model = onnx.load(vit[2].path)
    onnx.checker.check_model(model, full_check=True)
    assert {node.domain for node in model.graph.node} == {""}
    found = {entry.key: json.loads(entry.value) for entry in model.metadata_props}
    assert found["bits"] == {"weights": [8], "activations": [16]}
    assert vit[2].size < 0.31 * 2_745_000


def test_onnxruntime_multiplies_in_float_what_was_simulated(vit):
    model, teacher, file = vit
    assert file.notes == [f"50 {CPUS}", ROUNDED]
    run, images = opened(file), next(FashionMnist(limit=60).batches(teacher, 60)).images
    assert run.integer_products == 0
    assert len(run.float_products) == 38
    assert agreement(run, model, images) == 1
    with torch.no_grad():
        assert (run(images) - model(images)).abs().max() < 0.01  # with inputs rounded to 8 bits it would be 0.05


@pytest.mark.skipif(not installed("openvino"), reason="OpenVINO is not installed")
def test_openvino_reads_it_and_multiplies_in_float(vit):
    model, teacher, file = vit
    run, images = OpenVinoModel(file.path), next(FashionMnist(limit=60).batches(teacher, 60)).images
    assert run.integer_products == 0
    assert agreement(run, model, images) >= 0.96


def test_one_activation_of_16_bits_leaves_the_other_products_integer(tmp_path):
    chosen = tiny.teacher("vit", depth=1)
    model = tiny.quantized(chosen, *W8A8, "quantization.overrides=[{sites=['*.fc2.input', '*.key'], bits=16}]")
    file = exported(model, chosen, tmp_path)
    assert file.notes == [f"2 {CPUS}", ROUNDED]
    run = opened(file)
    assert run.float_products == ["blocks.0.attn", "blocks.0.mlp.fc2"]
    assert run.integer_products == quantized_products(model, chosen) - 2
    assert agreement(run, model, tiny.images(50)) >= 0.96


def test_weights_of_4_bits_with_activations_of_16(tmp_path):
    chosen = tiny.teacher("vit", depth=1)
    model = tiny.quantized(chosen, *A16)
    file = exported(model, chosen, tmp_path)
    types = [tensor.data_type for tensor in onnx.load(file.path).graph.initializer if len(tensor.dims) > 1]
    assert types.count(TYPE.INT4) == len(model.weight_names()) + 2  # queries, keys and values each have theirs
    with torch.no_grad():
        torch.testing.assert_close(opened(file)(tiny.images(9)), model(tiny.images(9)), atol=0.01, rtol=0.01)


@pytest.mark.filterwarnings("ignore:no attention was seen")
def test_convolutions_stay_convolutions(tmp_path):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = nn.Sequential(
            nn.Conv2d(3, 8, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(8, 8, 3, groups=8),
            nn.GELU(),
            nn.Flatten(),
            nn.Linear(8 * 196, 10),
        )
        chosen = Teacher(module, mean=(0.5,) * 3, std=(0.5,) * 3, num_classes=10, input_size=(3, 32, 32))
    model = tiny.quantized(chosen, *W8A16)
    file = exported(model, chosen, tmp_path)
    kinds = [node.op_type for node in onnx.load(file.path).graph.node]
    assert (kinds.count("Conv"), kinds.count("Gemm"), kinds.count("QuantizeLinear")) == (2, 1, 3)
    with torch.no_grad():
        torch.testing.assert_close(opened(file)(tiny.images(9)), model(tiny.images(9)), atol=0.01, rtol=0.01)


@torch.no_grad()
def test_a_program_and_a_checkpoint_give_the_same_logits_bit_for_bit(tmp_path):
    chosen = tiny.teacher("vit", depth=1)
    model = tiny.quantized(chosen, *W8A16)
    file = exported(model, chosen, tmp_path, "pt2")
    assert file.notes == []
    assert torch.equal(opened(file)(tiny.images(7)), model(tiny.images(7)))
    save_quantized(model, tmp_path / "saved", chosen)
    again = load_quantized(tmp_path / "saved", tiny.network("vit", depth=1))
    assert torch.equal(again(tiny.images(7)), model(tiny.images(7)))
    assert {q.bits for name, q in again.quantizers.items() if again.sites[name].kind != "weight"} == {16}
    assert again.site_table() == model.site_table()
    save_quantized(again, tmp_path / "again", chosen)
    stored = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("saved", "again")]
    assert stored[0] == stored[1]


def test_a_weight_of_16_bits_is_float_in_a_file_and_refused_in_a_checkpoint(tmp_path):
    chosen, name = tiny.teacher("vit", depth=1), "blocks.0.mlp.fc1.weight"
    model = tiny.quantized(chosen, *W8A8)
    wide = UniformQuantizer(bits=16, symmetric=True, granularity="channel")
    wide.observe(model.weight(name))
    wide.freeze()
    model.replace_quantizer(name, wide)
    file = exported(model, chosen, tmp_path)
    expected = "uniform of 16 bits with a scale for each channel is stored in float32, its product in float"
    assert file.notes == [f"{name}: {expected}"]
    assert opened(file).float_products == ["blocks.0.mlp.fc1"]
    with pytest.raises(DataError, match=rf"^{name}: a weight of 16 bits is not stored; give it a quantizer of 2 to 8"):
        save_quantized(model, tmp_path / "saved", chosen)
    assert not (tmp_path / "saved").exists()
