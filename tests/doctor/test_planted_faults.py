"""The doctor finds what was planted: a wrong scale, a dead channel, an outlier channel, a block that learned badly."""

import pytest
import torch
from support.backends import RUNTIME, back_end, images, quantized, teacher
from support.doctor import EIGHT, SITE, at, diagnosis, rescaled

import spdfq
from spdfq.doctor.diagnosis import diagnosed
from spdfq.recipe import to_toml
from spdfq.recipe.structure import unstructure


@pytest.mark.parametrize(("factor", "clipped", "used"), [(0.1, True, 256), (30.0, False, 20)])
def test_a_wrong_scale_is_the_site_that_costs_most(factor, clipped, used):
    chosen = teacher("vit")
    found = diagnosis(rescaled(quantized(chosen, *EIGHT), SITE, factor), chosen, *EIGHT)
    assert found.effects[0].site == SITE
    assert found.effects[0].gain > 0.5 * found.kl
    values = at(found, SITE)
    assert (values.clipped > 10) == clipped
    assert values.used <= used
    assert values.best_snr > values.snr + 20
    lines = [line for line in found.findings if "a range chosen again" in line]
    assert len(lines) == 1
    assert lines[0].partition(": ")[2].startswith(SITE)
    assert "blocks.0" not in lines[0]  # what comes after the fault has other values, too


def test_more_bits_are_no_remedy_for_eight_bits():
    chosen = teacher("vit")
    assert diagnosis(rescaled(quantized(chosen, *EIGHT), SITE, 0.1), chosen, *EIGHT).suggestion is None


def test_a_channel_that_is_constant_in_float_is_told_from_one_that_quantization_made_constant():
    chosen = teacher("vit")
    layer = chosen.module.blocks[0].mlp.fc1
    with torch.no_grad():
        layer.weight[3], layer.bias[3] = 0, 0
        layer.weight[7] *= 1e-6
    whole = ("quantization.weights.granularity='tensor'", *EIGHT)
    found = diagnosis(quantized(chosen, *whole), chosen, *whole)
    weight, after = at(found, "blocks.0.mlp.fc1.weight"), at(found, "blocks.0.mlp.fc2.input")
    assert (weight.constant, weight.dead, weight.channels) == (1, 1, len(layer.weight))
    assert after.constant == 1 + 1  # the row of the dead weights gives only its bias
    assert any("constant in float" in line and "fc2.input" in line for line in found.findings)
    assert any("not before" in line and "fc1.weight 1 of" in line for line in found.findings)


def test_an_outlier_channel_is_named_with_its_ratio():
    chosen = teacher("vit")
    with torch.no_grad():
        chosen.module.blocks[0].norm2.weight[5] = 100
    found = diagnosis(quantized(chosen), chosen)
    outlier = at(found, "blocks.0.mlp.fc1.input").outlier_channels[0]
    assert outlier.index == 5
    assert outlier.ratio > 20
    assert any("blocks.0.mlp.fc1.input channel 5" in line for line in found.findings)


def test_an_outlier_token_is_named():
    chosen = teacher("vit")
    with torch.no_grad():
        chosen.module.cls_token *= 1000
    psaq = "quantization.placement='psaq'"
    found = diagnosis(quantized(chosen, psaq), chosen, psaq)
    assert at(found, "blocks.0.residual").outlier_tokens[0].index == 0


def test_a_block_that_learned_badly_is_worse_on_held_out_images():
    chosen = teacher("vit")
    steps = "quantization.steps=[{type='calibrate'},{type='blockwise',iterations=20,lr=1e-4}]"
    model = quantized(chosen, steps)
    options = {"heldout": (images(6, seed=9), torch.zeros(6, dtype=torch.long))}
    good = diagnosed_with(model, chosen, steps, **options)
    assert [block.block for block in good.blocks] == ["blocks.0", "blocks.1"]
    assert all(block.after < block.before for block in good.blocks)
    with torch.no_grad():
        weight = model.weight("blocks.1.mlp.fc2.weight")
        weight += weight.std() * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
    bad = diagnosed_with(model, chosen, steps, **options)
    assert [block.worse for block in bad.blocks] == [good.blocks[0].worse, True]
    assert any("learning made blocks worse" in line and "blocks.1 (" in line for line in bad.findings)


def diagnosed_with(model, chosen, *overrides, heldout):
    return diagnosed(model, chosen, images(), back_end(*overrides), RUNTIME, heldout)


def test_without_steps_that_learn_no_blocks_are_compared():
    chosen = teacher("vit")
    assert diagnosis(quantized(chosen), chosen).blocks == ()


def test_a_fault_of_the_recipe_is_found_and_the_suggested_fragment_mends_it(tmp_path):
    chosen = teacher("vit")
    fault = f"quantization.overrides=[{{sites=['{SITE}'],bits=2}}]"
    broken = spdfq.quantize(chosen, images(), back_end(*EIGHT, fault))
    found = diagnosis(broken, chosen, *EIGHT, fault)
    assert found.effects[0].site == SITE
    assert found.suggestion.bits == {SITE: 4}
    (tmp_path / "recipe.toml").write_text(to_toml({"quantization": plain(back_end(*EIGHT, fault))}))
    (tmp_path / "fragment.toml").write_text(found.suggestion.fragment)
    data = {"extends": [str(tmp_path / "recipe.toml"), str(tmp_path / "fragment.toml")]}
    mended = spdfq.quantize(chosen, images(), data)
    assert (broken.quantizers[SITE].bits, mended.quantizers[SITE].bits) == (2, 4)
    assert sum(q.bits == 8 for q in mended.quantizers.values()) == len(mended.quantizers) - 1
    real = diagnosis(mended, chosen, *EIGHT, f"quantization.overrides=[{{sites=['{SITE}'],bits=4}}]").kl
    assert found.suggestion.kl < 0.5 * found.kl
    assert real == pytest.approx(found.suggestion.kl, rel=1e-4)  # nothing learns, so the prediction is exact


def plain(spec):
    return {key: value for key, value in unstructure(spec).items() if value is not None}
