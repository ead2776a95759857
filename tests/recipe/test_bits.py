"""Bit-widths in a recipe: 2 to 8, and 16 for activations with uniform quantizers; all else is one line."""

import pytest

from spdfq.errors import RecipeError
from spdfq.quantized import place
from spdfq.recipe import load_recipe
from spdfq.registry import quantizers
from spdfq.teacher import load_teacher

W8A16 = {"extends": ["models/vit_fmnist", "images/gaussian_noise", "backends/w8a16"]}
KEYS = ["weights", "activations", "attention", "softmax", "gelu"]
NUMBERS = [-16, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 15, 16, 17, 32, 2**40]
OTHER_THINGS = ['"16"', "16.0", "true", "[16]", "{}"]


def problems(*overrides, recipe=W8A16):
    with pytest.raises(RecipeError) as raised:
        load_recipe(recipe, overrides)
    return raised.value.problems


def allowed(kind, key):
    return {*range(2, 9), 16} if kind == "uniform" and key != "weights" else set(range(2, 9))


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("kind", quantizers.names())
def test_every_width_is_taken_or_refused_in_one_line_that_says_what_is_allowed(kind, key):
    for bits in NUMBERS:
        override = f"quantization.{key}={{type='{kind}', bits={bits}}}"
        if bits in allowed(kind, key):
            found = load_recipe(W8A16, [override])
            assert getattr(found.quantization, key).bits == bits
            continue
        (line,) = problems(override)
        assert line.startswith((f"quantization.{key}.bits: ", "quantization: weights.bits "))
        assert "from 2 to 8" in line
        assert str(bits) in line


@pytest.mark.parametrize("key", [*(f"{key}.bits" for key in KEYS[:4]), "overrides"])
def test_what_is_no_whole_number_is_refused(key):
    for thing in OTHER_THINGS:
        given = f"overrides=[{{sites=['*'], bits={thing}}}]" if key == "overrides" else f"{key}={thing}"
        (line,) = problems(f"quantization.{given}")
        assert line.startswith(f"quantization.{key}")
        assert "expected a whole number" in line


def test_weights_of_16_bits_are_refused():
    expected = "quantization: weights.bits must be from 2 to 8, not 16; 16 bits are for activations"
    assert problems("quantization.weights.bits=16") == [expected]


def test_the_label_has_both_widths_and_other_widths_are_told():
    recipe = load_recipe(W8A16)
    assert recipe.quantization.label == "W8A16"
    assert recipe.quantization.warnings() == []
    (line,) = load_recipe(W8A16, ["quantization.softmax={type='log2', bits=8}"]).quantization.warnings()
    assert line == (
        "quantization.softmax: 8 bits, but activations have 16; for W8A16 set softmax.bits = 16 and "
        "softmax.type = 'uniform'"
    )


# overrides


@pytest.fixture(scope="module")
def teacher():
    return load_teacher("bundled:vit_fmnist")


def placed(teacher, backend, override, *more):
    recipe = {"extends": ["models/vit_fmnist", "images/gaussian_noise", backend]}
    given = [f"quantization.overrides=[{override}]", *more]
    return place(teacher, load_recipe(recipe, given).quantization)


def test_an_override_gives_some_activations_16_bits_or_8(teacher):
    model = placed(teacher, "backends/w8a8", "{sites=['*.fc2.input', '*.value'], bits=16}")
    wide = {name for name, quantizer in model.quantizers.items() if quantizer.bits == 16}
    assert wide == {f"blocks.{n}.{leaf}" for n in range(6) for leaf in ("mlp.fc2.input", "attn.value")}
    model = placed(teacher, "backends/w8a16", "{sites=['blocks.0.*'], bits=8}")
    bits = {name: quantizer.bits for name, quantizer in model.quantizers.items() if model.sites[name].kind != "weight"}
    assert {number for name, number in bits.items() if name.startswith("blocks.0.")} == {8}
    assert {number for name, number in bits.items() if not name.startswith("blocks.0.")} == {16}


@pytest.mark.parametrize(
    ("override", "more", "line"),
    [
        ("{sites=['*'], bits=16}", [], "patch_embed.proj.weight is a weight and cannot have 16 bits; name activations"),
        ("{roles=['last'], bits=16}", [], "head.weight is a weight and cannot have 16 bits; name activations only"),
        (
            "{sites=['*.softmax'], bits=16}",
            ["quantization.softmax={type='log2', bits=8}"],
            "blocks.0.attn.softmax: Log2Quantizer.bits: bits must be a whole number from 2 to 8, not 16; only the "
            "quantizer 'uniform' takes 16",
        ),
    ],
)
def test_an_override_of_16_bits_elsewhere_is_one_line(teacher, override, more, line):
    with pytest.raises(RecipeError) as raised:
        placed(teacher, "backends/w8a8", override, *more)
    (found,) = raised.value.problems
    assert found.startswith(f"quantization.overrides.0.bits: {line}")


def test_other_widths_of_an_override_are_refused():
    for bits in sorted({*NUMBERS, 2**40} - {0, *range(2, 9), 16}):
        (line,) = problems(f"quantization.overrides=[{{sites=['*'], bits={bits}}}]")
        assert line.startswith("quantization.overrides.0.bits: 'bits' must be in (0, 2, 3, 4, 5, 6, 7, 8, 16)")


def test_a_budget_chooses_among_2_to_8_bits():
    assert problems("quantization.budget={operations=64.0, choices=[8, 16]}") == [
        "quantization.budget.choices: choices must be different whole numbers from 2 to 8, not [8, 16]"
    ]
