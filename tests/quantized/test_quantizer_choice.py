"""Which quantizer of the section a site gets, and what is told about bits and networks that do not fit the label."""

import pytest
from support.backends import back_end, teacher

from spdfq.quantized import place
from spdfq.recipe import load_recipe
from spdfq.runs.pipeline import check
from spdfq.teacher import load_teacher


def test_gelu_outputs_can_have_a_quantizer_of_their_own():
    model = place(teacher("vit"), back_end("quantization.gelu={type='adaptive_log', bits=3, shift=0.17}"))
    kinds = {row["name"]: (row["quantizer"], row["bits"]) for row in model.site_table()["quantized"]}
    assert kinds["blocks.1.mlp.fc2.input"] == ("adaptive_log", 3)
    assert kinds["blocks.1.mlp.fc1.input"] == kinds["blocks.1.attn.value"] == ("uniform", 4)
    assert model.sites["blocks.1.mlp.fc2.input"].maker == "gelu"
    gated = place(teacher("eva02"), back_end("quantization.gelu={type='adaptive_log'}"))  # SwiGLU: no GELU
    assert {row["quantizer"] for row in gated.site_table()["quantized"]} == {"uniform", "log2"}
    assert gated.site_table()["notes"] == ["gelu: no quantized site has the output of a GELU"]


def test_queries_keys_and_values_can_have_a_quantizer_of_their_own():
    model = place(teacher("vit"), back_end("quantization.attention={type='uniform', bits=8, symmetric=true}"))
    symmetric = {name for name, quantizer in model.quantizers.items() if getattr(quantizer, "symmetric", False)}
    assert symmetric == {f"blocks.{block}.attn.{leaf}" for block in (0, 1) for leaf in ("query", "key", "value")}
    assert {model.quantizers[name].bits for name in symmetric} == {8}
    unseen = place(teacher("swinv2"), back_end("quantization.attention={type='uniform'}"))  # own products
    assert (
        "attention: no quantized site has queries, keys or values of scaled_dot_product_attention"
        in (unseen.site_table()["notes"])
    )


def test_bits_that_differ_from_the_label_are_told():
    recipe = {"extends": ["models/vit_fmnist", "images/gaussian_noise", "backends/adalog", "bits/w3a3"]}
    (line,) = load_recipe(recipe).warnings()
    assert line.startswith("quantization.gelu: 4 bits, but activations have 3; for W3A3 set gelu.bits = 3")
    (line,) = load_recipe(recipe, ["quantization.gelu.bits=3", "quantization.softmax.bits=8"]).warnings()
    assert line.startswith("quantization.softmax: 8 bits, but activations have 3; for W3A3 set softmax.bits = 3")
    assert not load_recipe(recipe, ["quantization.gelu.bits=3"]).warnings()
    unplaced = ["quantization.placement='weights_only'", "quantization.gelu.bits=3", "quantization.softmax.bits=8"]
    assert not load_recipe(recipe, unplaced).warnings()


def test_overrides_that_leave_nothing_of_the_label_are_told():
    recipe = {"extends": ["models/vit_fmnist", "images/gaussian_noise", "backends/blockwise"]}
    assert check(recipe, overrides=["quantization.overrides=[{sites=['*'], bits=8}]"]) == [
        "quantization.overrides: no weights have the 4 bits of the label W4A4; they have 8",
        "quantization.overrides: no activations have the 4 bits of the label W4A4; they have 8",
    ]
    assert check(recipe, overrides=["quantization.overrides=[{sites=['blocks.*.weight'], bits=8}]"]) == []


@pytest.mark.parametrize(("name", "told"), [("test_resnet", True), ("test_vit", False)])
def test_a_network_without_attention_is_told(name, told):
    recipe = {
        "extends": ["images/gaussian_noise", "backends/repq"],
        "model": {"name": name, "pretrained": False, "num_classes": 10},
    }
    recipe["evaluation"] = {"dataset": {"type": "fashion_mnist"}}
    line = f"no attention was seen in {name}; spdfq is made for vision transformers"
    assert any(found.startswith(line) for found in check(recipe)) == told
    loaded = load_recipe(recipe)
    notes = place(load_teacher(loaded.model, weights=False), loaded.quantization).site_table().get("notes", [])
    assert any(found.startswith(f"model: {line}") for found in notes) == told


def test_a_last_layer_whose_input_is_quantized_before_it_is_noted():
    def placed(model):
        recipe = load_recipe({"extends": [f"models/{model}", "images/gaussian_noise", "backends/minmax"]})
        return place(load_teacher(recipe.model, weights=False), recipe.quantization).notes

    note = "overrides: the input of head was quantized at an earlier site, whose bits are not the override's"
    assert placed("vit_fmnist") == [note]
    assert placed("swin_fmnist") == []
