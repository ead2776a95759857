"""The numbers of a diagnosis, its cost, and that it changes nothing."""

import pytest
import torch
from support.backends import RUNTIME, back_end, images, network, quantized, state_of, taken, teacher, teacher_of
from support.doctor import EIGHT, SITE, at, diagnosis

import spdfq
from spdfq.backends import AdaLog
from spdfq.backends.divergence import divergence
from spdfq.data import FashionMnist
from spdfq.doctor.channels import ChannelRanges
from spdfq.doctor.diagnosis import planned_passes
from spdfq.doctor.pair import Images, Pair
from spdfq.doctor.reference import reference_model
from spdfq.errors import DataError, ModelError, RecipeError


def paired(chosen, *overrides):
    """A quantized model and its reference, and the images with the teacher's output."""
    model = quantized(chosen, *overrides)
    bits = {name: quantizer.bits for name, quantizer in model.quantizers.items()}
    with torch.no_grad():
        reference = reference_model(chosen, images(), back_end(*overrides), RUNTIME, bits)
        return Pair(model, reference, False, 2), Images(images(), chosen.module(images()))


def kl(output, target):
    return float(divergence(output, target).mean())


def test_activations_of_16_bits_have_all_their_levels_and_need_no_more_bits():
    wide = "quantization.overrides=[{sites=['" + SITE + "'], bits=16}]"
    uniform = "quantization.activations={type='uniform', bits=4}"
    chosen = teacher("vit")
    found = diagnosis(quantized(chosen, uniform, wide), chosen, uniform, wide)
    values = at(found, SITE)
    assert (values.bits, values.levels) == (16, 65536)
    assert values.used > 256
    assert (values.range_low, values.range_high) == pytest.approx((values.low, values.high), rel=0.1)
    assert not found.suggestion or SITE not in found.suggestion.bits


@torch.no_grad()
def test_all_sites_quantized_is_the_model_and_a_site_in_float_is_the_model_without_its_quantizer():
    pair, ours = paired(teacher("vit"))
    assert pair.all_quantized(ours).kl == pytest.approx(kl(pair.model(ours.images), ours.target), rel=1e-5)
    measured = pair.alone_in_float(SITE, ours).kl
    del pair.model.quantizers[SITE]
    assert measured == pytest.approx(kl(pair.model(ours.images), ours.target), rel=1e-5)


@torch.no_grad()
def test_a_site_alone_quantized_is_the_float_model_with_one_quantizer():
    pair, ours = paired(teacher("vit"))
    for site in (SITE, "blocks.0.attn.qkv.weight"):
        measured = pair.alone_quantized(site, ours).kl
        others = {name: q for name, q in pair.model.quantizers.items() if name != site}
        alone = quantized(teacher("vit"))
        for name in others:
            del alone.quantizers[name]
        assert measured == pytest.approx(kl(alone(ours.images), ours.target), rel=1e-5)


@pytest.mark.parametrize("part", ["strong", "repq", "adalog", "ridge", "three_stage"])
def test_the_reference_of_each_back_end_computes_what_the_teacher_computes(part):
    chosen = teacher("vit")
    spec = spdfq.load_recipe(
        {"extends": ["models/vit_fmnist", "images/gaussian_noise", f"backends/{part}"]}
    ).quantization
    with torch.no_grad():
        model = spdfq.quantize(chosen, images(), spec)
        bits = {name: quantizer.bits for name, quantizer in model.quantizers.items()}
        reference = reference_model(chosen, images(), spec, RUNTIME, bits)
        torch.testing.assert_close(reference.network(images()), chosen.module(images()), rtol=1e-3, atol=1e-3)
        assert Pair(model, reference, False).lost == []


@torch.no_grad()
def test_a_shift_that_was_folded_into_a_bias_stays_where_it_belongs():
    gelu = "quantization.gelu={type='adaptive_log', bits=8, shift=0.17}"
    pair, ours = paired(teacher("vit"), *EIGHT, gelu)
    site = "blocks.0.mlp.fc2.input"
    before = pair.alone_in_float(site, ours).kl, pair.alone_quantized(site, ours).kl
    taken(AdaLog(), pair.model, teacher("vit"), images=images())
    assert pair.model.quantizers[site].folded
    folded = Pair(pair.model, pair.reference, False)
    assert folded.alone_in_float(site, ours).kl == pytest.approx(before[0], rel=0.02)
    assert folded.alone_quantized(site, ours).kl == pytest.approx(before[1], rel=0.02)


@torch.no_grad()
def test_a_weight_that_is_not_near_its_float_weight_is_left_out_and_named():
    chosen = teacher("vit")
    model = quantized(chosen, *EIGHT)
    model.weight("blocks.0.attn.proj.weight").neg_()
    found = diagnosis(model, chosen, *EIGHT)
    assert [note.partition(":")[0] for note in found.notes] == ["blocks.0.attn.proj.weight"]
    assert "blocks.0.attn.proj.weight" not in {effect.site for effect in found.effects}


def test_the_range_and_the_levels_are_those_of_a_hand_made_example():
    chosen = teacher("vit")
    model = quantized(chosen, *EIGHT)
    values = at(diagnosis(model, chosen, *EIGHT), "blocks.0.mlp.fc2.input")
    quantizer = model.quantizers["blocks.0.mlp.fc2.input"]
    scale, zero = float(quantizer.scale), int(quantizer.zero_point)
    assert values.range_low == pytest.approx(-zero * scale)
    assert values.range_high == pytest.approx((255 - zero) * scale)
    assert values.levels == 256
    assert 20 < values.snr < 60


def test_every_architecture_and_placement_has_a_diagnosis():
    for name, placement in (("swin", "psaq"), ("beit", "matmul_inputs"), ("vit", "weights_only")):
        chosen, override = teacher(name), f"quantization.placement='{placement}'"
        model = quantized(chosen, override)
        found = diagnosis(model, chosen, override, count=2)
        assert len(found.effects) == len(model.quantizers) == len(found.values)
        assert found.passes <= planned_passes(len(model.quantizers), 2, 0)


def test_a_model_without_a_head_is_judged_by_its_features():
    chosen = teacher_of(network("vit", num_classes=0))
    found = diagnosis(quantized(chosen), chosen)
    assert found.kl > 0
    assert found.top1 is None


def test_nothing_changes_and_no_hook_stays():
    chosen = teacher("vit")
    model = quantized(chosen)
    before = {"model": state_of(model), "teacher": {k: v.clone() for k, v in chosen.module.state_dict().items()}}
    logits = model(images())
    diagnosis(model, chosen)
    assert all(torch.equal(value, before["model"][name]) for name, value in model.tensors().items())
    assert all(torch.equal(value, before["teacher"][name]) for name, value in chosen.module.state_dict().items())
    assert torch.equal(model(images()), logits)
    assert not any(
        part._forward_hooks or part._forward_pre_hooks for part in [*model.modules(), *chosen.module.modules()]
    )


def test_held_out_images_give_top1_before_and_predicted():
    teacher = spdfq.load_teacher("bundled:vit_fmnist")
    calibration = torch.cat([batch.images for batch in FashionMnist(split="train", limit=4).batches(teacher, 4)])
    recipe = {"extends": ["backends/minmax"], "quantization": {"activations": {"bits": 4}}}
    model = spdfq.quantize(teacher, calibration, recipe)
    found = spdfq.diagnose(model, teacher, calibration, recipe, dataset=FashionMnist(limit=100), heldout=10)
    assert (found.images, found.heldout) == (4, 10)
    assert 50 < found.top1 <= 100
    assert all(effect.top1_alone is not None for effect in found.effects[:10])
    assert found.effects[10].top1_alone is None
    assert found.suggestion.kl < found.kl
    assert found.suggestion.activation_bits[1] > found.suggestion.activation_bits[0]
    assert found.passes <= planned_passes(len(model.quantizers), 4, 10)


def test_tokens_of_different_numbers_start_anew():
    ranges = ChannelRanges()
    ranges.add(torch.ones(2, 3, 4))
    ranges.add(torch.full((2, 5, 4), 2.0))
    assert ranges.tokens.tolist() == [2.0] * 5


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"model": torch.nn.Linear(2, 2)}, ModelError, "model must be a QuantizedModel, got Linear"),
        ({"images": images()[:0]}, DataError, "images of shape"),
        ({"dataset": "photos"}, DataError, "dataset: expected labelled images"),
        ({"heldout": 0}, DataError, "heldout: expected a number of images"),
        ({"recipe": "images/spdfq"}, RecipeError, "has no quantization section"),
    ],
)
def test_a_wrong_argument_is_one_clear_error(change, error, message):
    chosen = teacher("vit")
    given = {"model": quantized(chosen), "images": images(), "recipe": back_end()} | change
    options = {key: given.pop(key) for key in ("dataset", "heldout") if key in given}
    with pytest.raises(error, match=message):
        spdfq.diagnose(given["model"], chosen, given["images"], given["recipe"], **options)
