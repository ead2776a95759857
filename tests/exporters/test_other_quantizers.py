"""Quantizers that are not uniform: float operations, or 8-bit integers, and a line for each."""

import pytest
import torch
from support import backends as tiny
from support.exports import UNIFORM, W8A8, agreement, all_integers, exported, opened

from spdfq.errors import SpdfqError
from spdfq.exporters.containers import ROUNDED
from spdfq.quantizers import UniformQuantizer

# each is taken from a model that has it everywhere
OTHERS = {
    "blocks.0.attn.softmax": ("log2", "softmax={type='log2', bits=8}"),
    "blocks.1.attn.softmax": ("shift_uniform_log2", "softmax={type='shift_uniform_log2', bits=8}"),
    "blocks.2.attn.softmax": ("twin_uniform", "softmax={type='twin_uniform', bits=8}"),
    "blocks.0.mlp.fc2.input": ("adaptive_log", "gelu={type='adaptive_log', bits=8, shift=0.17}"),
    "blocks.1.mlp.fc2.input": ("twin_uniform", "gelu={type='twin_uniform', bits=8, split='sign'}"),
    "blocks.2.mlp.fc2.input": ("power_of_two_factor", "gelu={type='power_of_two_factor', bits=8}"),
}
CHANNELS, GRIDS = "blocks.0.mlp.fc1.input", "blocks.1.mlp.fc1.weight"
KINDS = dict.fromkeys(OTHERS, "") | {name: kind for name, (kind, _) in OTHERS.items()}


@pytest.fixture(scope="module")
def mixed():
    """A model with another quantizer at each of several sites, and its teacher."""
    chosen = tiny.teacher("vit", depth=3)
    model = tiny.quantized(chosen, *W8A8)
    given = {name: option for name, (_, option) in OTHERS.items()}
    given[CHANNELS] = "activations={type='uniform', bits=8, granularity='channel', axis=-1}"
    given[GRIDS] = "weights={type='dual_uniform', bits=8, granularity='channel'}"
    free = "quantization.overrides=[{sites=['patch*', 'head*', '*query', '*key', '*value'], bits=0}]"
    for name, option in given.items():
        other = tiny.quantized(chosen, *W8A8, free, f"quantization.{option}")
        model.replace_quantizer(name, other.quantizers[name])
    return model, chosen


def test_other_quantizers_are_computed_in_float_and_said_to_be(mixed, tmp_path):
    model, chosen = mixed
    file = exported(model, chosen, tmp_path)
    lines = {name: f"{kind} of 8 bits" for name, kind in KINDS.items()}
    lines["blocks.2.mlp.fc2.input"] += " with a scale for each channel"
    lines[CHANNELS] = "uniform of 8 bits with a scale for each channel"
    expected = {f"{name}: {what} is computed in float, its product in float" for name, what in lines.items()}
    grids = f"{GRIDS}: dual_uniform of 8 bits with a scale for each channel is stored in float32, its product in float"
    assert set(file.notes) == expected | {grids, ROUNDED}
    run = opened(file)
    places = ("attn_2", "mlp.fc2")
    floating = {f"blocks.{block}.{place}" for block in range(3) for place in places}
    assert set(run.float_products) == floating | {"blocks.0.mlp.fc1", "blocks.1.mlp.fc1"}
    assert agreement(run, model, tiny.images(50)) >= 0.94


def test_uniform8_makes_them_integers_and_says_what_changed(mixed, tmp_path):
    model, chosen = mixed
    before = tiny.state_of(model)
    file = exported(model, chosen, tmp_path, softmax="uniform8", images=tiny.images())
    changes = {line.partition(" of 8 bits, from ")[0] for line in file.notes if "is now" in line}
    expected = {f"{name}: {kind} of 8 bits is now uniform" for name, kind in KINDS.items()}
    assert changes == expected | {f"{CHANNELS}: uniform of 8 bits is now uniform"}
    run = opened(file)
    assert run.float_products == ["blocks.1.mlp.fc1"]  # the weight with two grids
    assert agreement(run, file.model, tiny.images(50)) >= 0.96
    assert isinstance(file.model.quantizers["blocks.0.attn.softmax"], UniformQuantizer)
    after = tiny.state_of(model)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_uniform8_takes_a_shift_out_of_the_bias_that_it_was_folded_into(tmp_path):
    chosen = tiny.teacher("vit", depth=1)
    steps = ["{type='calibrate', observer='minmax', weight_observer='minmax'}", "{type='adalog'}"]
    gelu = "quantization.gelu={type='adaptive_log', bits=8, shift=0.17}"
    model = tiny.quantized(chosen, *W8A8, gelu, f"quantization.steps=[{', '.join(steps)}]")
    assert model.quantizers["blocks.0.mlp.fc2.input"].folded
    file = exported(model, chosen, tmp_path, softmax="uniform8", images=tiny.images())
    own = chosen.module.blocks[0].mlp.fc2.bias
    assert not torch.allclose(model.network.blocks[0].mlp.fc2.bias, own, atol=1e-2)
    assert torch.allclose(file.model.network.blocks[0].mlp.fc2.bias, own, atol=1e-5)
    assert all_integers(opened(file), file.model, chosen)


def test_uniform8_needs_images_of_the_right_size(mixed, tmp_path):
    with pytest.raises(SpdfqError, match=r"softmax 'uniform8': is calibrated on images; give images="):
        exported(*mixed, tmp_path, softmax="uniform8")
    with pytest.raises(SpdfqError, match=r"images: expected \[n, 3, 32, 32\], got \[2, 3, 8, 8\]"):
        exported(*mixed, tmp_path, softmax="uniform8", images=torch.zeros(2, 3, 8, 8))
    assert list(tmp_path.iterdir()) == []


def test_points_between_products_are_in_the_file_too(tmp_path):
    chosen = tiny.teacher("vit", depth=1)
    model = tiny.quantized(chosen, "quantization.placement='psaq'", *tiny.bits(8), UNIFORM)
    file = exported(model, chosen, tmp_path)
    assert file.notes == []
    run = opened(file)
    assert run.float_products == ["blocks.0.attn_2"]  # this placement leaves the softmax in float
    assert run.integer_products == 7
    assert agreement(run, model, tiny.images(50)) >= 0.96
