"""Overrides: bits for the sites that patterns and roles name."""

import pytest
import torch
from support.backends import (
    back_end,
    images,
    quantized,
    teacher,
    teacher_of,
)
from support.products import Small

from spdfq.errors import RecipeError
from spdfq.quantized import place

# overrides


def test_overrides_set_bits_by_pattern_and_the_last_one_wins():
    overrides = [
        {"sites": ["blocks.0.*"], "bits": 6},
        {"sites": ["*.softmax", "*.fc?.weight"], "bits": 3},
        {"sites": ["blocks.1.attn.query"], "bits": 0},
    ]
    model = place(teacher("vit"), back_end(f"quantization.overrides={toml(overrides)}"))
    found = {name: quantizer.bits for name, quantizer in model.quantizers.items()}
    assert "blocks.1.attn.query" not in found
    assert found["blocks.0.attn.key"] == 6
    assert found["blocks.0.attn.softmax"] == found["blocks.1.attn.softmax"] == 3
    assert found["blocks.0.mlp.fc1.weight"] == 3
    assert found["blocks.0.mlp.fc1.input"] == 6
    assert found["blocks.1.mlp.fc1.input"] == found["head.weight"] == 4
    left = {row["name"]: row["what"] for row in model.site_table()["float"]}
    assert left["blocks.1.attn.query"] == "query of a product, left in float"


def toml(tables):
    shown = ("{sites=[" + ", ".join(map(repr, t["sites"])) + f"], bits={t['bits']}}}" for t in tables)
    return f"[{', '.join(shown)}]"


def test_roles_are_what_timm_says():
    spec = back_end("quantization.overrides=[{roles=['first', 'last'], bits=8}]")
    model = place(teacher("deit_distilled"), spec)
    eight = {name for name, quantizer in model.quantizers.items() if quantizer.bits == 8}
    assert eight == {
        f"{layer}.{leaf}" for layer in ("patch_embed.proj", "head", "head_dist") for leaf in ("input", "weight")
    }


def test_zero_bits_leave_the_site_in_float():
    chosen = teacher("vit")
    model = quantized(chosen, "quantization.overrides=[{sites=['*'], bits=0}]")
    assert not model.quantizers
    torch.testing.assert_close(model(images()), chosen.module(images()), atol=1e-5, rtol=0)


def test_patterns_and_roles_that_match_nothing_are_one_error_with_a_line_each():
    overrides = "[{sites=['blocks.0.*', 'blocks.7.*'], bits=8}, {roles=['first'], bits=8}, {sites=['Head.*'], bits=8}]"
    with pytest.raises(RecipeError) as raised:
        place(teacher_of(Small()), back_end(f"quantization.overrides={overrides}"))
    examples = "sites are called patch.input, patch.weight, attention.qkv_input, ..."
    assert raised.value.problems == [
        f"quantization.overrides.0.sites: 'blocks.0.*' matches no quantized site of Small; {examples}",
        f"quantization.overrides.0.sites: 'blocks.7.*' matches no quantized site of Small; {examples}",
        "quantization.overrides.1.roles: Small does not say which module is 'first'; name it under 'sites'",
        f"quantization.overrides.2.sites: 'Head.*' matches no quantized site of Small; {examples}",
    ]


@pytest.mark.parametrize("pattern", ["*.softmax", "head.input"])
def test_a_pattern_of_sites_that_the_placement_leaves_in_float_matches_nothing(pattern):
    overrides = f"quantization.overrides=[{{sites=['{pattern}'], bits=8}}]"
    place(teacher("vit"), back_end(overrides))
    with pytest.raises(RecipeError, match=r"overrides.0.sites: .* matches no quantized site"):
        place(teacher("vit"), back_end("quantization.placement='weights_only'", overrides))


@pytest.mark.parametrize(
    ("key", "quantizer", "line"),
    [
        ("activations", "{type='uniform', granularity='channel'}", "axis 0 is that of the images"),
        ("activations", "{type='dual_uniform', columns=0}", "axis 0 is that of the images"),
        ("gelu", "{type='adaptive_log', shift=0.17, folded=true}", "folded: is what the step 'adalog' sets"),
        ("weights", "{type='adaptive_log', shift=0.9, folded=true}", "folded: is what the step 'adalog' sets"),
    ],
)
def test_quantizers_that_cannot_be_those_of_activations_are_refused(key, quantizer, line):
    with pytest.raises(RecipeError, match=f"quantization.{key}.*{line}"):
        place(teacher("vit"), back_end(f"quantization.{key}={quantizer}"))
