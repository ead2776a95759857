"""The step `smooth`: channels have similar ranges, keys have no mean, and what does not change is reported."""

import pytest
import torch
from support.backends import RUNTIME, back_end, images, quantized, teacher
from support.rotation import ROTATE, change
from support.smoothing import SMOOTH, notes, smoothed, values_at

from spdfq.backends import Rotate, Smooth, quantize
from spdfq.backends.quantize import check_quantization
from spdfq.backends.transforms.smooth import smoothing
from spdfq.errors import ModelError, NonFiniteError, RecipeError, SpdfqError
from spdfq.quantized import place
from spdfq.quantizers import MinMaxObserver, UniformQuantizer
from spdfq.quantizers.statistics import Statistics

BEHIND_A_NORM, BEHIND_ATTENTION, BEHIND_A_GELU = (
    f"blocks.0.{layer}.input" for layer in ("attn.qkv", "attn.proj", "mlp.fc2")
)
SITES = (BEHIND_A_NORM, BEHIND_ATTENTION, BEHIND_A_GELU)


def ends(model, site):
    """The lower and upper end of each channel on the images that the step saw."""
    low, high = values_at(model, site, images(5)).aminmax(dim=0)
    return low, high


# one layer


def change_of(values, strength=1.0):
    """The change for values ``[tokens, channels]``."""
    rows = values.T.float()
    statistics = Statistics(rows)
    statistics.add(rows, *rows.aminmax(dim=1))
    return smoothing(statistics, UniformQuantizer(bits=4), MinMaxObserver(), strength)


def test_shift_and_factor_by_hand():
    found = change_of(torch.tensor([[0.0, 10.0, 1.0], [1.0, 12.0, -7.0], [2.0, 18.0, 5.0]]), strength=0.5)
    # ranges 2, 8 and 12, of geometric mean 192 ** (1/3)
    assert found.shift.tolist() == pytest.approx([1.0, 14.0, -1.0])
    assert found.factor.tolist() == pytest.approx([(width / 192 ** (1 / 3)) ** 0.5 for width in (2, 8, 12)])


def test_a_constant_channel_becomes_zero_and_has_no_part_in_the_mean():
    found = change_of(torch.tensor([[0.0, 5.0, 0.0], [2.0, 5.0, 8.0]]))
    assert found.shift.tolist() == [1.0, 5.0, 4.0]
    assert found.factor.tolist() == pytest.approx([0.5, 1.0, 2.0])
    found = change_of(torch.full([3, 2], 7.0))
    assert found.shift.tolist() == [7.0, 7.0]
    assert found.factor.tolist() == [1.0, 1.0]


def test_a_channel_that_hardly_varies_is_not_blown_up_without_limit():
    values = torch.ones(4, 5)
    values[0] = torch.tensor([0.0, 0.0, 0.0, 0.0, 1 - 1e-6])
    assert change_of(values).factor.min().item() == pytest.approx(1e-3)


def test_a_channel_with_outliers_alone_has_its_whole_range():
    values = torch.randn(10000, 2, generator=torch.Generator().manual_seed(0))
    values[:, 1] = 0.0
    values[7, 1] = 6.0
    rows = values.T
    statistics = Statistics(rows)
    statistics.add(rows, *rows.aminmax(dim=1))
    found = smoothing(statistics, UniformQuantizer(bits=4), Smooth().observer, 1.0)
    assert found.factor.isfinite().all()
    assert 0.5 < found.factor[1] / found.factor[0] < 2


# a model


@pytest.mark.parametrize("rotate", [False, True])
@pytest.mark.parametrize("site", SITES)
def test_channels_have_the_same_range_at_strength_one(site, rotate):
    model = smoothed(teacher("vit"), rotate=rotate, strength=1.0, observer=MinMaxObserver())
    low, high = ends(model, site)
    torch.testing.assert_close(high, -low, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(high, high.mean().expand_as(high), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("site", SITES)
def test_channels_are_only_shifted_at_strength_zero(site):
    chosen = teacher("vit")
    before = ends(place(chosen, back_end()), site)
    low, high = ends(smoothed(chosen, strength=0.0, observer=MinMaxObserver()), site)
    torch.testing.assert_close(high, -low, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(high - low, before[1] - before[0], atol=1e-3, rtol=1e-3)
    assert (before[1] + before[0]).abs().max() > 0.5


@pytest.mark.parametrize("rotate", [False, True])
def test_keys_have_mean_zero(rotate):
    chosen = teacher("vit")
    plain, model = place(chosen, back_end()), smoothed(chosen, rotate=rotate)
    heads = [model.network.blocks[0].attn.num_heads] * 2
    before, after = (
        values_at(each, "blocks.0.attn.key", images(5)).unflatten(0, (5, heads[0], -1)).mean((0, 2))
        for each in (plain, model)
    )
    assert before.abs().max() > 0.1
    assert after.abs().max() < 1e-4


@pytest.mark.parametrize("rotate", [False, True])
def test_the_error_of_quantized_inputs_falls(rotate):
    chosen = teacher("vit")
    with torch.no_grad():  # all tokens have something in common
        chosen.module.pos_embed += 3 * torch.randn(32, generator=torch.Generator().manual_seed(0))
    weights_in_float = "quantization.overrides=[{sites=['*.weight'], bits=0}]"
    step = "{type='rotate'}, " if rotate else ""
    calibrate = "{type='calibrate', observer='minmax', weight_observer='minmax'}"
    gaps = []
    for smooth in ("", "{type='smooth', observer='minmax'}, "):
        model = quantized(chosen, weights_in_float, f"quantization.steps=[{step}{smooth}{calibrate}]")
        with torch.no_grad():
            gaps.append((model(images()) - chosen.module(images())).norm())
    assert gaps[1] < 0.95 * gaps[0]


def test_the_size_of_batches_does_not_matter_and_the_teacher_does_not_change():
    chosen = teacher("vit")
    before = chosen.fingerprint()
    first, again = (smoothed(chosen, batch=batch).tensors() for batch in (2, 5))
    for name, tensor in first.items():
        torch.testing.assert_close(tensor, again[name], atol=1e-4, rtol=1e-4)
    assert chosen.fingerprint() == before


# what stays

TWIN, LOG = "{type='twin_uniform', bits=4}", "{type='log2', bits=4}"


def test_inputs_with_other_quantizers_stay_and_are_noted():
    chosen = teacher("vit")
    model = smoothed(chosen, f"quantization.gelu={TWIN}", f"quantization.softmax={LOG}")
    assert notes(model)[0] == (
        "the input of blocks.0.mlp.fc2, blocks.1.mlp.fc2: not smoothed, it has no uniform quantizer with one range"
    )
    assert model.shifted == []
    channels = "quantization.activations={type='uniform', bits=4, granularity='channel', axis=-1}"
    model = smoothed(chosen, channels)
    assert model.shifted == []
    assert notes(model)[0].endswith("and 6 more: not smoothed, it has no uniform quantizer with one range")


def test_inputs_in_float_stay_and_those_beside_them_change():
    chosen = teacher("vit")
    in_float = "quantization.overrides=[{sites=['blocks.0.mlp.fc2.input', 'blocks.0.attn.qkv.input'], bits=0}]"
    model = smoothed(chosen, in_float)
    assert change(model, chosen) < 1e-5
    assert (
        notes(model)[0] == "the input of blocks.0.attn.qkv, blocks.0.mlp.fc2: not smoothed, it has no quantizer of "
        "its own"
    )
    assert model.shifted == ["blocks.1.mlp.fc2.weight"]


def test_layers_behind_a_norm_with_different_bits_shift_their_inputs_themselves():
    chosen = teacher("cait")
    names = [name for name in place(chosen, back_end()).quantizers if name.endswith(".input")]
    bits = f"quantization.overrides=[{{sites=['{names[1]}'], bits=8}}]"
    model = smoothed(chosen, bits)
    assert change(model, chosen) < 1e-5


def test_nothing_changes_where_activations_stay_in_float():
    chosen = teacher("vit")
    model = smoothed(chosen, "quantization.placement={type='weights_only'}")
    assert change(model, chosen) == 0.0
    assert notes(model) == [
        "the input of blocks.0.attn.qkv, blocks.0.attn.proj, blocks.0.mlp.fc1 and 6 more: not smoothed, it has no "
        "quantizer of its own"
    ]


@pytest.mark.parametrize("rotate", [False, True])
@pytest.mark.parametrize("name", ["vit", "swin", "cait"])
def test_the_placement_psaq_keeps_inputs_that_are_quantized_at_an_earlier_site(name, rotate):
    chosen = teacher(name)
    model = smoothed(chosen, "quantization.placement={type='psaq'}", rotate=rotate)
    assert change(model, chosen) < 1e-5
    kept = next(note for note in notes(model) if note.endswith("not smoothed, it has no quantizer of its own"))
    assert "attn.qkv" in kept or "attn.q" in kept
    assert not any(weight.endswith("qkv.weight") for weight in model.shifted)
    assert any(weight.endswith("fc2.weight") for weight in model.shifted)


# order and errors


def test_it_must_come_before_ranges_are_chosen():
    spec = back_end("quantization.steps=[{type='calibrate'}, {type='smooth'}]")
    with pytest.raises(SpdfqError, match=r"smooth: .* put it before 'calibrate'"):
        Smooth().check(place(teacher("vit"), spec), spec.steps[:1])
    with pytest.raises(SpdfqError, match=r"smooth: .* put it before 'calibrate'"):
        quantize(teacher("vit"), images(2), spec, RUNTIME)
    with pytest.raises(RecipeError, match=r"quantization.steps.1: smooth: .* put it before 'calibrate'"):
        check_quantization(teacher("vit"), spec)


def test_rotate_after_it_is_refused():
    spec = back_end("quantization.steps=[{type='smooth'}, {type='rotate'}, {type='calibrate'}]")
    with pytest.raises(SpdfqError, match=r"rotate: mixes the channels .* put it before 'smooth'"):
        Rotate().check(place(teacher("vit"), spec), spec.steps[:1])
    for steps in (ROTATE.replace("{type='calibrate'", "{type='smooth'}, {type='calibrate'"), SMOOTH):
        check_quantization(teacher("vit"), back_end(steps))


def test_a_change_of_the_output_is_an_error(monkeypatch):
    monkeypatch.setattr("spdfq.backends.transforms.float_changes._TOLERANCE", 0.0)
    with pytest.raises(ModelError, match=r"smooth: the float output changed by .* leave the step out"):
        smoothed(teacher("vit"))


def test_inputs_that_are_not_finite_are_refused_by_name():
    chosen = teacher("vit")
    with torch.no_grad():
        chosen.module.blocks[1].norm2.bias[3] = torch.inf
    with pytest.raises(NonFiniteError, match=r"smooth: the input of blocks.1.mlp.fc1 is not finite; check the images"):
        smoothed(chosen)


@pytest.mark.parametrize("strength", [-0.1, 1.5])
def test_the_strength_is_between_zero_and_one(strength):
    with pytest.raises(ValueError, match="strength"):
        Smooth(strength=strength)
