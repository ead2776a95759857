"""Learned rounding, and the options that every block-wise reconstruction shares."""

import math

import pytest
import timm
import torch
import torch.nn.functional as F
from attrs import evolve
from support.backends import RUNTIME, Interrupted, back_end, images, quantized, state_of, taken, teacher, teacher_of

from spdfq.backends import AdaRound, Blockwise, Calibrate
from spdfq.backends.blocks import block_calls
from spdfq.backends.learning import reconstruction
from spdfq.backends.learning.adaround import HIGH, LOW, Rounding, rectified_sigmoid
from spdfq.backends.learning.fisher import squared_gradients
from spdfq.backends.learning.qdrop import QDrop
from spdfq.backends.learning.reconstruction import BlockReconstruction
from spdfq.backends.learning.shares import Share
from spdfq.errors import SpdfqError
from spdfq.quantized import place
from spdfq.quantizers import Log2Quantizer
from spdfq.recipe import load_recipe

BATCH, COUNT = 4, 6
STEP = AdaRound(iterations=8, lr=0.1, batch=BATCH)
UNIFORM = "quantization.softmax={type='uniform', bits=4}"
SITE = "blocks.0.mlp.fc1.weight"
BLOCKS = ["blocks.0", "blocks.1"]


def reconstruct(model, chosen, step=STEP, **changes):
    return taken(step, model, chosen, **{"images": images(COUNT), **changes})


@torch.no_grad()
def off(model, chosen):
    return (model(images(COUNT)) - chosen.module(images(COUNT))).norm()


@torch.no_grad()
def off_after_a_block(model, chosen):
    outputs = []
    for network, run in ((model.network, model), (chosen.module, chosen.module)):
        handle = network.blocks[0].register_forward_hook(lambda *args: outputs.append(args[2]))
        run(images(COUNT))
        handle.remove()
    return (outputs[0] - outputs[1]).norm()


def changed(model, before):
    return {name for name, value in state_of(model).items() if not torch.equal(value, before[name])}


def same(first, second):
    first, second = state_of(first), state_of(second)
    return all(torch.equal(first[name], second[name]) for name in first)


# the rounding


def test_the_rectified_sigmoid_reaches_its_ends():
    # sigmoid(v) * 1.2 - 0.1, clamped
    assert rectified_sigmoid(torch.tensor([0.0, 30.0, -30.0])).tolist() == [0.5, 1.0, 0.0]
    assert rectified_sigmoid(torch.tensor(1.0)).item() == pytest.approx(0.7773, abs=1e-4)
    assert rectified_sigmoid(torch.tensor(2.398)).item() == pytest.approx(1.0, abs=1e-4)  # sigmoid is 11/12


def test_it_starts_at_the_float_weights():
    model = quantized("vit")
    learner = STEP.learner(model, "blocks.0")
    for name in learner.changes:
        weight, quantizer = model.weight(name), model.quantizers[name]
        lowest, highest = (quantizer.decode(torch.full_like(weight, code, dtype=torch.uint8)) for code in (0, 15))
        inside = ((weight >= lowest) & (weight <= highest)).float()
        assert 0.95 < inside.mean() < 1
        torch.testing.assert_close(learner.weight(name, weight) * inside, weight * inside, atol=1e-5, rtol=0)


def test_it_ends_on_one_of_the_two_nearest_values():
    chosen = teacher("vit")
    model, before = quantized(chosen), quantized(chosen).weight(SITE).detach()
    reconstruct(model, chosen)
    after, quantizer = model.weight(SITE).detach(), model.quantizers[SITE]
    step = quantizer.scale[:, None]
    assert torch.equal(quantizer(after), after)
    assert ((after - before).abs() < step * 1.001).all()
    nearest = quantizer(before)
    assert 0.02 < (after != nearest).float().mean() < 0.6


def test_the_penalty_waits_and_then_its_exponent_falls_from_the_first_temperature_to_the_second():
    assert STEP.beta(0.19) is None
    assert [STEP.beta(share) for share in (0.2, 0.6, 1.0)] == pytest.approx([20.0, 11.0, 2.0])
    learner = STEP.learner(quantized("vit"), "blocks.0")
    with torch.no_grad():
        for number in learner.parameters:
            number.zero_()  # h = 1/2
    assert learner.penalty(0.1) == 0.0
    assert learner.penalty(0.5).item() == pytest.approx(0.01 * sum(n.numel() for n in learner.parameters))
    with torch.no_grad():
        for number in learner.parameters:
            number.fill_(torch.logit(torch.tensor(0.85 / 1.2)).item())  # h = 3/4, 1 - (1/2)^2
    assert learner.penalty(1.0).item() == pytest.approx(0.0075 * sum(n.numel() for n in learner.parameters), rel=1e-4)


def test_each_weight_is_rounded_to_where_its_h_is_closer():
    model = quantized("vit")
    learner = STEP.learner(model, "blocks.0")
    number, lower, step = learner.numbers[SITE], learner.lower[SITE], learner.steps[SITE]
    up = torch.arange(number.numel()).view_as(number) % 2 == 0
    with torch.no_grad():
        number.copy_(torch.where(up, 0.51, 0.49).sub(LOW).div(HIGH - LOW).logit())  # h is 0.51 or 0.49
    learner.finish()
    torch.testing.assert_close(model.weight(SITE).detach(), lower + up * step)


def test_a_strong_penalty_decides_every_weight(monkeypatch):
    chosen, left, finish = teacher("vit"), [], Rounding.finish

    def watch(learner):
        left.append(torch.cat([rectified_sigmoid(number).flatten() for number in learner.parameters]))
        finish(learner)

    monkeypatch.setattr(Rounding, "finish", watch)
    reconstruct(
        quantized(chosen), chosen, evolve(STEP, iterations=40, lr=0.3, weight=1.0, warmup=0.0, temperature=(6.0, 2.0))
    )
    for numbers in left:
        assert (torch.minimum(numbers, 1 - numbers) < 0.01).float().mean() > 0.97


@pytest.mark.parametrize("name", ["vit", "swin"])
def test_the_output_comes_nearer_to_the_teachers(name):
    chosen = teacher(name)
    model = quantized(chosen, UNIFORM)
    before = off(model, chosen)
    reconstruct(model, chosen, evolve(STEP, iterations=15))
    assert off(model, chosen) < 0.99 * before


def test_only_the_weights_of_blocks_change():
    chosen, model = teacher("vit"), quantized("vit")
    before = state_of(model)
    reconstruct(model, chosen)
    layers = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    assert changed(model, before) == {f"{block}.{layer}.weight" for block in BLOCKS for layer in layers}


def test_a_weight_of_another_quantizer_is_refused_by_name():
    model, log = quantized("vit"), Log2Quantizer()
    log.observe(torch.ones(1))
    log.freeze()
    model.replace_quantizer(SITE, log)
    with pytest.raises(SpdfqError, match=rf"^{SITE}: this step needs evenly spaced values here"):
        reconstruct(model, teacher("vit"))


# activations left in float


def test_a_share_of_the_activations_is_left_in_float_another_one_each_time():
    model = quantized("vit")
    activations = QDrop(model, 0.3)
    x = torch.randn(40, 17, 32, generator=torch.Generator().manual_seed(0))
    drawn = []
    for seed in (1, 1, 2):
        activations.seed(torch.Generator().manual_seed(seed), Share.whole(slice(None)))
        drawn.append(activations("blocks.0.attn.qkv.input", "input", x))
    rounded = model.quantizers["blocks.0.attn.qkv.input"](x)
    kept = drawn[0] == x
    assert torch.equal(drawn[0], torch.where(kept, x, rounded))
    assert kept.float().mean() == pytest.approx(0.3, abs=0.02)
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    assert torch.equal(activations("nothing.here", "input", x), x)


def test_what_enters_a_block_is_mixed_with_the_teachers():
    activations = QDrop(quantized("vit"), 0.5)
    activations.seed(torch.Generator().manual_seed(0), Share.whole(slice(None)))
    (mixed,) = activations.mixed_inputs((torch.ones(50, 40),), (torch.zeros(50, 40),))
    assert mixed.mean().item() == pytest.approx(0.5, abs=0.04)
    assert QDrop(quantized("vit"), 0.0).mixed_inputs((mixed,), (-mixed,))[0].equal(-mixed)


@pytest.mark.parametrize("spec", [STEP, Blockwise(iterations=8, lr=2e-3, batch=BATCH)], ids=["adaround", "blockwise"])
def test_dropping_changes_what_is_learned_and_is_decided_by_the_seed(spec):
    chosen, spec = teacher("vit"), evolve(spec, drop=0.5)
    torch.manual_seed(1)
    first = reconstruct(quantized(chosen), chosen, spec)
    torch.manual_seed(2)
    assert same(first, reconstruct(quantized(chosen), chosen, spec))
    assert not same(first, reconstruct(quantized(chosen), chosen, evolve(spec, drop=0.0)))
    assert not same(first, reconstruct(quantized(chosen), chosen, spec, runtime=evolve(RUNTIME, seed=9)))


# learned scales


def test_scales_are_learned_where_a_rate_is_given():
    chosen, still = teacher("vit"), Blockwise(iterations=10, lr=1e-9, batch=BATCH)
    model = quantized(chosen, UNIFORM)
    before, error = state_of(model), off_after_a_block(model, chosen)
    reconstruct(model, chosen, evolve(still, scale_lr=2e-2))
    scales = {name for name in changed(model, before) if "_quantizer" in name}
    assert scales == {
        f"{name}_quantizer.scale"
        for name in model.quantizers
        if name.startswith("blocks.") and not name.endswith("weight")
    }
    assert off_after_a_block(model, chosen) < 0.97 * error
    before = state_of(model)
    reconstruct(model, chosen, evolve(still, lr=1e-3))
    assert not {name for name in changed(model, before) if "scale" in name}


# importance


def test_the_importance_is_the_squared_gradient_of_the_divergence():
    chosen = teacher("vit")
    model = quantized(chosen, UNIFORM)
    calls = block_calls(chosen.module, BLOCKS, images(1))
    with chosen.frozen() as network:
        (found,) = squared_gradients(network, model, calls[1], images(COUNT), 4, model.quantized)
    seen = {}
    handle = model.network.blocks[1].register_forward_hook(lambda *args: seen.update(output=args[2]))
    model(images(COUNT))
    handle.remove()
    output = seen["output"].detach().requires_grad_()
    logits = model.network.head(model.network.norm(output)[:, 0])  # float after the block
    wanted = chosen.module(images(COUNT)).log_softmax(-1).detach()
    loss = F.kl_div(logits.log_softmax(-1), wanted, log_target=True, reduction="sum")
    expected = torch.autograd.grad(loss, output)[0].square()
    torch.testing.assert_close(found, expected / expected.mean(), rtol=1e-3, atol=1e-4)
    assert (found[:, 1:] == 0).all()  # only the class token is read
    assert found.mean().item() == pytest.approx(1.0)


def test_importance_weighs_the_error():
    ones, far = torch.ones(2, 3), torch.tensor([[1.0, 3.0, 1.0], [1.0, 1.0, 2.0]])
    weights = torch.tensor([[9.0, 2.0, 9.0], [9.0, 9.0, 0.0]])
    assert STEP.distance((ones,), (far,), None).item() == pytest.approx((4 + 1) / 2)
    assert STEP.distance((ones,), (far,), (weights,)).item() == pytest.approx(2 * 4 / 2)


def test_the_error_is_summed_over_channels_wherever_a_block_has_them():
    tokens, maps = torch.zeros(2, 49, 8), torch.zeros(2, 8, 7, 6)
    last, moved = reconstruction.channels_last((tokens, maps), 8)
    assert last.shape == tokens.shape
    assert moved.shape == (2, 7, 6, 8)
    assert reconstruction.channels_last((maps.permute(0, 2, 3, 1),), 8)[0].shape == (2, 7, 6, 8)


def test_channels_of_a_model_of_maps_are_its_blocks_own():
    sizes = {"depths": (1, 1, 1, 1), "embed_dims": (8, 16, 16, 16), "num_heads": (1, 2, 2, 2), "window_size": 2}
    module = timm.create_model("davit_tiny", pretrained=False, num_classes=10, **sizes)
    chosen = teacher_of(module.eval())
    lengths = []

    class Seeing(AdaRound):
        def distance(self, output, target, importance):
            lengths.append([tensor.shape[-1] for tensor in (*output, *target, *importance)])
            return super().distance(output, target, importance)

    model = taken(Calibrate(), place(chosen, back_end(UNIFORM)), chosen, images=images(COUNT))
    reconstruct(model, chosen, Seeing(iterations=1, batch=BATCH, fisher=True))
    assert lengths == [[width] * 3 for width in (8, 8, 16, 16, 16, 16, 16, 16)]


@pytest.mark.parametrize("spec", [STEP, Blockwise(iterations=8, lr=2e-3, batch=BATCH)], ids=["adaround", "blockwise"])
def test_importance_changes_what_is_learned(spec):
    chosen = teacher("vit")
    models = [reconstruct(quantized(chosen), chosen, evolve(spec, fisher=fisher)) for fisher in (True, False)]
    assert not same(*models)


# stages


def test_float_weights_learn_under_quantized_activations(monkeypatch):
    chosen, model = teacher("vit"), quantized("vit", "quantization.weights.bits=2")
    used = set()
    model.quantizers[SITE].register_forward_hook(lambda *_: used.add(SITE))
    model.quantizers["blocks.0.mlp.fc1.input"].register_forward_hook(lambda *_: used.add("input"))
    before = state_of(model)
    reconstruct(model, chosen, Blockwise(iterations=4, lr=1e-3, batch=BATCH, sites="activations"))
    assert used == {"input"}
    assert SITE in changed(model, before)


def test_the_three_stages_run_one_after_the_other():
    chosen = teacher("vit")
    stages = load_recipe({"extends": ["models/vit_fmnist", "images/gaussian_noise", "backends/three_stage"]})
    model = quantized(chosen, UNIFORM, count=COUNT)
    for index, step in enumerate(stages.quantization.steps):
        shortened = evolve(step, iterations=5, lr=1e-3) if isinstance(step, Blockwise) else step
        reconstruct(model, chosen, shortened, index=index)
    assert all(q.channel_axis is None for name, q in model.quantizers.items() if not name.endswith("weight"))
    assert off(model, chosen) < off(quantized(chosen, UNIFORM, count=COUNT), chosen)


# resuming


@pytest.mark.parametrize("spec", [STEP, Blockwise(iterations=8, lr=2e-3, batch=BATCH)], ids=["adaround", "blockwise"])
def test_an_interrupted_reconstruction_goes_on_bit_for_bit(tmp_path, monkeypatch, spec):
    chosen, optimise = teacher("vit"), BlockReconstruction.optimise
    spec = evolve(spec, drop=0.5, scale_lr=1e-3, fisher=True)
    expected = reconstruct(quantized(chosen, UNIFORM), chosen, spec)

    def interrupt(job, *args):
        if job.call.name == "blocks.1":
            raise Interrupted
        optimise(job, *args)

    with monkeypatch.context() as patch:
        patch.setattr(BlockReconstruction, "optimise", interrupt)
        with pytest.raises(Interrupted):
            reconstruct(quantized(chosen, UNIFORM), chosen, spec, folder=tmp_path)
    again = []
    monkeypatch.setattr(
        BlockReconstruction, "optimise", lambda job, *args: (again.append(job.call.name), optimise(job, *args))
    )
    model = reconstruct(quantized(chosen, UNIFORM), chosen, spec, folder=tmp_path)
    assert again == ["blocks.1"]
    assert same(model, expected)


@pytest.mark.parametrize("spec", [STEP, Blockwise(iterations=40, lr=2e-3, batch=BATCH)], ids=["adaround", "blockwise"])
def test_a_reconstruction_killed_within_a_block_goes_on_bit_for_bit(tmp_path, monkeypatch, spec):
    chosen = teacher("vit")
    spec = evolve(spec, iterations=40, drop=0.5, scale_lr=1e-3)
    expected = reconstruct(quantized(chosen, UNIFORM), chosen, spec)
    monkeypatch.setattr(reconstruction, "SAVE_SECONDS", 0.0)
    steps, take_step = [], reconstruction.take_step

    def interrupt(*args):
        take_step(*args)
        steps.append(None)
        if len(steps) == 40 + 25:
            raise Interrupted

    with monkeypatch.context() as patch:
        patch.setattr(reconstruction, "take_step", interrupt)
        with pytest.raises(Interrupted):
            reconstruct(quantized(chosen, UNIFORM), chosen, spec, folder=tmp_path)
    files = {f"step-0-{spec.name}.safetensors", f"step-0-{spec.name}-blocks.1.safetensors"}
    assert {path.name for path in tmp_path.iterdir()} == files
    again = []
    monkeypatch.setattr(reconstruction, "take_step", lambda *args: (again.append(None), take_step(*args)))
    model = reconstruct(quantized(chosen, UNIFORM), chosen, spec, folder=tmp_path)
    assert len(again) == 20
    assert same(model, expected)
    assert [path.name for path in tmp_path.iterdir()] == [f"step-0-{spec.name}.safetensors"]


@pytest.mark.parametrize("temperature", [(-1.0, -2.0), (0.0, 0.0), (math.inf, 2.0)])
def test_a_temperature_below_one_is_refused(temperature):
    with pytest.raises(ValueError, match="finite number"):
        AdaRound(temperature=temperature)


def test_the_shipped_part_is_qdrop():
    spec = load_recipe({"extends": ["models/vit_fmnist", "images/gaussian_noise", "backends/adaround"]}).quantization
    assert [type(step).__name__ for step in spec.steps] == ["Calibrate", "AdaRound"]
    assert (spec.steps[1].drop, spec.steps[1].weight, spec.steps[1].temperature) == (0.5, 0.01, (20.0, 2.0))
