"""ONNX files in onnxruntime: their products, their logits and what they say about themselves. No clock is needed."""

import json
from collections import Counter

import numpy as np
import onnx
import pytest
import torch
from support import backends as tiny
from support.exports import UNIFORM, W8A8, agreement, all_integers, exported, opened
from torch import nn

import spdfq
from spdfq.data import FashionMnist
from spdfq.exporters.containers import ROUNDED
from spdfq.exporters.products import quantized_products
from spdfq.recipe import load_recipe
from spdfq.teacher import Teacher

EVERYWHERE = "quantization.overrides=[]"
MINMAX = ("backends/minmax", EVERYWHERE, "quantization.placement='matmul_inputs'", *W8A8)


def shipped(name, backend, *overrides):
    """A bundled model quantized on 32 of its test images, and its teacher."""
    teacher = spdfq.load_teacher(f"bundled:{name}")
    images = next(FashionMnist(skip=1900).batches(teacher, 32)).images
    return spdfq.quantize(teacher, images, backend, overrides=overrides), teacher


def pictures(teacher, count=60):
    return next(FashionMnist(limit=count).batches(teacher, count)).images


@pytest.fixture(scope="module")
def vit(tmp_path_factory):
    model, teacher = shipped("vit_fmnist", *MINMAX)
    return model, teacher, exported(model, teacher, tmp_path_factory.mktemp("vit"), class_names=list("abcdefghij"))


@pytest.fixture(scope="module")
def four_bits(tmp_path_factory):
    """Rotated and shifted, with activations of 4 bits and asymmetric weights."""
    chosen = tiny.teacher("vit")
    steps = [
        "{type='rotate'}",
        "{type='smooth'}",
        "{type='calibrate', observer='minmax', weight_observer='minmax'}",
    ]
    model = tiny.quantized(chosen, f"quantization.steps=[{', '.join(steps)}]", UNIFORM.replace("8", "4"))
    return model, chosen, exported(model, chosen, tmp_path_factory.mktemp("four_bits"))


def test_every_product_of_the_bundled_vit_is_an_integer_kernel(vit):
    model, teacher, file = vit
    assert quantized_products(model, teacher) == 38  # 6 blocks of 6, the patches and the head
    assert all_integers(opened(file), model, teacher)
    assert file.notes == []


def test_the_bundled_vit_agrees_with_its_simulation(vit):
    model, teacher, file = vit
    images = pictures(teacher)
    logits = opened(file)(images)
    assert agreement(opened(file), model, images) >= 0.98
    assert torch.nn.functional.cosine_similarity(logits, model(images)).min() > 0.999


def test_every_product_of_the_bundled_swin_is_an_integer_kernel(tmp_path):
    model, teacher = shipped("swin_fmnist", *MINMAX)
    file = opened(exported(model, teacher, tmp_path))
    assert quantized_products(model, teacher) == 39
    assert all_integers(file, model, teacher)
    assert agreement(file, model, pictures(teacher)) >= 0.98


def test_a_file_takes_any_number_of_images(vit):
    _, teacher, file = vit
    images = pictures(teacher, 5)
    together = opened(file)(images)
    assert together.shape == (5, 10)
    assert torch.allclose(torch.cat([opened(file)(image[None]) for image in images]), together, atol=1e-4)


def test_a_file_says_what_it_is(vit):
    _, teacher, file = vit
    found = {entry.key: json.loads(entry.value) for entry in onnx.load(file.path).metadata_props}
    assert found["model"] == teacher.name
    assert found["class_names"] == list("abcdefghij")
    assert (found["mean"], found["std"], found["size"]) == ([0.286], [0.353], [28, 28])
    assert (found["interpolation"], found["crop_pct"], found["crop_mode"]) == ("bilinear", 1.0, "center")
    assert found["bits"] == {"weights": [8], "activations": [8]}
    assert found["versions"]["torch"] == torch.__version__.partition("+")[0]


def test_a_file_is_standard_onnx_of_opset_21_without_notes_of_the_exporter(vit):
    model = onnx.load(vit[2].path)
    onnx.checker.check_model(model, full_check=True)
    assert [(entry.domain, entry.version) for entry in model.opset_import if not entry.domain] == [("", 21)]
    assert {node.domain for node in model.graph.node} == {""}
    assert not any(node.metadata_props or node.doc_string for node in model.graph.node)
    assert vit[2].size == vit[2].path.stat().st_size < 0.31 * 2_745_000


def test_weights_are_int8_and_nothing_is_stored_twice(vit):
    model, _, file = vit
    stored = [onnx.numpy_helper.to_array(tensor) for tensor in onnx.load(file.path).graph.initializer]
    matrices = [array for array in stored if array.size > 5000]
    assert {array.dtype for array in matrices} == {np.dtype("int8")}
    assert sum(array.size for array in matrices) == sum(
        model.weight(name).numel() for name in model.weight_names() if model.weight(name).numel() > 5000
    )


def test_a_rotated_and_shifted_model_of_4_bits_is_integers_too(four_bits):
    model, teacher, file = four_bits
    assert model.norms
    assert model.shifted
    assert all_integers(opened(file), model, teacher)
    assert agreement(opened(file), model, tiny.images(100)) >= 0.93


def test_weights_of_4_bits_are_stored_in_4_bits(four_bits):
    types = Counter(
        tensor.data_type for tensor in onnx.load(four_bits[2].path).graph.initializer if len(tensor.dims) > 1
    )
    assert types[onnx.TensorProto.INT4] == 10  # 2 blocks of 4, the patches and the head
    assert types[onnx.TensorProto.INT8] == 0


def test_activations_below_8_bits_are_clipped_to_their_levels_and_said_to_be(four_bits):
    model, _, file = four_bits
    clips = [node for node in onnx.load(file.path).graph.node if node.op_type == "Clip"]
    assert len(clips) == len(model.quantizers) - len(model.weight_names()) == 18
    assert file.notes == ["18 activations of 4 bits are 8-bit integers with 16 levels"]


@pytest.mark.parametrize("name", ["beit", "dinov2_registers", "eva02"])
def test_tiny_models_of_other_architectures_are_integers(name, tmp_path):
    chosen = tiny.teacher(name, depth=1)
    model = tiny.quantized(chosen, *W8A8)
    file = opened(exported(model, chosen, tmp_path))
    assert all_integers(file, model, chosen)
    assert agreement(file, model, tiny.images(50)) >= 0.96


def test_widths_and_quantizers_are_taken_from_the_model_and_not_from_its_recipe(tmp_path):
    chosen = tiny.teacher("vit", depth=1)
    model = tiny.quantized(chosen, *W8A8, "quantization.overrides=[{sites=['blocks.0.*'], bits=6}]")
    file = exported(model, chosen, tmp_path)
    assert file.notes == [
        "8 activations of 6 bits are 8-bit integers with 64 levels",
        "4 weights of 6 bits are 8-bit integers with 64 levels",
    ]
    assert all_integers(opened(file), model, chosen)


def test_a_model_of_weights_alone_multiplies_in_float(tmp_path):
    chosen = tiny.teacher("vit", depth=1)
    spec = load_recipe(
        {"extends": ["models/vit_fmnist", "images/gaussian_noise", "backends/blockwise"]},
        ["quantization.placement='weights_only'", tiny.CALIBRATE, EVERYWHERE],
    ).quantization
    model = spdfq.quantize(chosen, tiny.images(), spec)
    done = exported(model, chosen, tmp_path)
    file = opened(done)
    assert done.notes == [ROUNDED]
    assert quantized_products(model, chosen) == file.integer_products == 0
    with torch.no_grad():
        torch.testing.assert_close(file(tiny.images(50)), model(tiny.images(50)), atol=1e-4, rtol=1e-4)


def test_products_that_no_image_changes_are_computed_once_and_named(tmp_path):
    chosen = tiny.teacher("swinv2", depths=(1,), num_heads=(2,))
    model = tiny.quantized(chosen, *W8A8)
    file = exported(model, chosen, tmp_path)
    layers = [f"layers.0.blocks.0.attn.cpb_mlp.{layer}" for layer in (0, 2)]
    assert file.constant_products == layers
    assert file.notes == [f"{name}: does not depend on the images, computed once for the file" for name in layers]
    assert all_integers(opened(file), model, chosen, constant=2)
    assert agreement(opened(file), model, tiny.images(50)) >= 0.94


@pytest.mark.filterwarnings("ignore:no attention was seen")
def test_convolutions_without_groups_are_integers_and_those_with_groups_are_named(tmp_path):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = nn.Sequential(
            nn.Conv2d(3, 8, 3, stride=2, padding=1),  # windows that overlap
            nn.ReLU(),
            nn.Conv2d(8, 8, 3, padding=2, dilation=2, bias=False),
            (twice := nn.Conv2d(8, 8, 1)),
            twice,
            nn.Conv2d(8, 8, 3, groups=8),
            nn.GELU(),  # without it, onnxruntime would merge the convolution with the quantizer that follows
            nn.Conv2d(8, 6, 2, stride=2),  # the last row and column are left out
            nn.Flatten(),
            nn.Linear(6 * 49, 10),
        )
        chosen = Teacher(module, mean=(0.5,) * 3, std=(0.5,) * 3, num_classes=10, input_size=(3, 34, 34))
    images = torch.randn(60, 3, 34, 34, generator=torch.Generator().manual_seed(1))
    model = spdfq.quantize(chosen, images[:4], tiny.back_end(*W8A8))
    file = opened(exported(model, chosen, tmp_path))
    assert quantized_products(model, chosen) == 7
    assert file.integer_products == 6
    assert file.float_products == ["5"]
    with torch.no_grad():
        assert torch.nn.functional.cosine_similarity(file(images), model(images)).min() > 0.999
