"""Correction by ridge regression: what it changes in a model, what it refuses, and how it resumes."""

from contextlib import contextmanager

import numpy as np
import pytest
import torch
from attrs import evolve
from support.backends import (
    RUNTIME,
    Interrupted,
    back_end,
    flatten_tensors,
    images,
    network,
    quantized,
    teacher,
    teacher_of,
)
from torch import nn

from spdfq.backends import Calibration, Ridge, quantize
from spdfq.errors import DataError, NonFiniteError, SpdfqError
from spdfq.quantized.checkpoint import load_quantized, save_quantized
from spdfq.quantizers import Log2Quantizer, MinMaxObserver
from spdfq.recipe import load_recipe

STEP = Ridge(penalty=1.0, batch=4, weight_observer=MinMaxObserver())
FLOAT_WEIGHTS = "quantization.overrides=[{sites=['*.weight'], bits=0}]"
STATE = "step-0-ridge.safetensors"


def repair(model, chosen, step=STEP, count=6, **changes):
    settings = {"teacher": chosen, "images": images(count), "runtime": RUNTIME, **changes}
    step.run(model, Calibration(**settings))
    return model


@torch.no_grad()
def output(module, count=6, seed=0):
    return module(images(count, seed))


def parameters(model):
    return {name: value.detach().clone() for name, value in model.tensors().items()}


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


# on a model


def test_a_layers_new_weights_are_the_regression_of_its_quantized_inputs():
    module = nn.Sequential(nn.AvgPool2d(8), nn.Flatten(), nn.Linear(48, 10))
    chosen = teacher_of(module.eval())
    model = quantized(chosen, FLOAT_WEIGHTS)
    before = model.network[2]
    x = module[:2](images(60)).double()
    a = torch.cat([model.quantizers["2.input"](x.float()).double(), torch.ones(60, 1)], 1)
    y = (x - a[:, :-1]) @ before.weight.double().T
    root = 3.0**0.5 * np.eye(49)
    solved = np.linalg.lstsq(
        np.vstack([a.numpy(), root]), np.vstack([y.detach().numpy(), np.zeros((49, 10))]), rcond=None
    )[0]
    change = torch.from_numpy(solved.T)
    expected = {"weight": before.weight.detach() + change[:, :48], "bias": before.bias.detach() + change[:, 48]}
    repair(model, chosen, evolve(STEP, penalty=3.0), count=60)
    for name, tensor in expected.items():
        torch.testing.assert_close(getattr(model.network[2], name).detach().double(), tensor, atol=1e-6, rtol=1e-5)


def test_a_layer_with_few_rows_for_its_inputs_is_not_corrected(tmp_path):
    """Of 6 images, the head has 6 rows for 32 inputs, and every other layer 6 times 17 tokens or more."""
    chosen = teacher("vit")
    before, corrected, left = (quantized(chosen, FLOAT_WEIGHTS) for _ in range(3))
    repair(corrected, chosen)
    step = evolve(STEP, min_rows=0.2)
    repair(left, chosen, step, folder=tmp_path)
    changed = [
        {name for name, value in parameters(model).items() if not torch.equal(value, before.tensors()[name])}
        for model in (corrected, left)
    ]
    assert changed[0] - changed[1] == {"head.weight", "head.bias"}
    assert changed[1] < changed[0]
    line = "ridge: head.weight: the error of its inputs is not compensated, 6 rows are too few"
    assert line in left.notes
    assert corrected.notes == [note for note in left.notes if note != line]
    resumed = quantized(chosen, FLOAT_WEIGHTS)
    repair(resumed, chosen, step, folder=tmp_path)
    assert resumed.notes == left.notes
    assert same(parameters(resumed), parameters(left))


@pytest.mark.parametrize("rounding", ["halves", "columns"])
def test_relative_penalties_do_not_depend_on_the_number_of_images(rounding):
    chosen, step = teacher("vit"), evolve(STEP, relative=True, rounding=rounding, penalty=2.0, rounding_penalty=0.1)
    once, twice = (quantized(chosen, "quantization.softmax={type='uniform', bits=4}") for _ in range(2))
    repair(once, chosen, step, images=images(4))
    repair(twice, chosen, step, images=images(4).repeat(2, 1, 1, 1))
    for name, value in parameters(once).items():
        torch.testing.assert_close(twice.tensors()[name], value, atol=1e-4, rtol=1e-4)


def test_a_relative_penalty_is_a_multiple_of_the_mean_sum_of_squares():
    module = nn.Sequential(nn.AvgPool2d(8), nn.Flatten(), nn.Linear(48, 10)).eval()
    chosen = teacher_of(module)
    relative, absolute = quantized(chosen, FLOAT_WEIGHTS), quantized(chosen, FLOAT_WEIGHTS)
    unit = float(relative.quantizers["2.input"](module[:2](images(60))).square().sum(0).mean())
    repair(relative, chosen, evolve(STEP, penalty=2.0, relative=True), count=60)
    repair(absolute, chosen, evolve(STEP, penalty=2.0 * unit), count=60)
    torch.testing.assert_close(relative.network[2].weight, absolute.network[2].weight)


def test_the_rounding_has_a_penalty_of_its_own():
    chosen, softmax = teacher("vit"), "quantization.softmax={type='uniform', bits=4}"
    models = [quantized(chosen, softmax) for _ in range(3)]
    for model, own in zip(models, (None, 1.0, 1e6), strict=True):
        repair(model, chosen, evolve(STEP, rounding="columns", rounding_penalty=own))
    assert same(*map(parameters, models[:2]))
    assert not same(*map(parameters, models[1:]))


@pytest.mark.parametrize("rounding", ["halves", "columns"])
@pytest.mark.parametrize("name", ["vit", "swin", "cait", "beit"])
def test_the_output_comes_nearer_to_the_teachers(name, rounding):
    chosen = teacher(name)
    uniform = "quantization.softmax={type='uniform', bits=4}"
    model = quantized(chosen, uniform)
    before = (output(model) - output(chosen.module)).norm()
    repair(model, chosen, evolve(STEP, rounding=rounding))
    assert (output(model) - output(chosen.module)).norm() < 0.8 * before


@pytest.mark.parametrize("name", ["vit", "swin"])
def test_each_layer_is_fed_what_the_repaired_model_feeds_it(name, monkeypatch):
    chosen, seen, solve = teacher(name), {}, Ridge._correct

    def watch(step, model, layer, found):
        seen[layer.weight] = found.gram
        solve(step, model, layer, found)

    monkeypatch.setattr(Ridge, "_correct", watch)
    model = repair(quantized(chosen), chosen)
    inputs = {}

    def visit(site, kind, tensor):
        tensor = model.quantized(site, kind, tensor)
        inputs[site.removesuffix("input") + "weight"] = tensor.flatten(0, -2)
        return tensor

    with model.visiting(visit), torch.no_grad():
        model.network(images(6))
    assert list(seen) == [site for site in model.weight_names() if site in seen]
    assert len(seen) == len(model.weight_names()) - 1  # all but the patch embedding
    for site, gram in seen.items():
        a = torch.cat([inputs[site], torch.ones(len(inputs[site]), 1)], 1).double()
        torch.testing.assert_close(gram, a.T @ a, rtol=1e-3, atol=1e-2)


class Residual(nn.Module):
    def __init__(self, block, in_place):
        super().__init__()
        self.block, self.in_place = block, in_place

    def forward(self, x):
        change = self.block.attn(self.block.norm1(x))
        x = x.add_(change) if self.in_place else x + change
        return x + self.block.mlp(self.block.norm2(x))


def test_blocks_that_add_to_their_argument_in_place_are_repaired_like_others():
    outputs = []
    for in_place in (False, True):
        chosen = teacher("vit")
        chosen.module.blocks = nn.Sequential(*(Residual(block, in_place) for block in chosen.module.blocks))
        outputs.append(repair(quantized(chosen), chosen)(images(3)))
    assert torch.equal(*outputs)


@pytest.mark.parametrize("rounding", ["halves", "columns"])
def test_a_large_penalty_changes_nothing_but_roundings(rounding):
    chosen = teacher("vit")
    model, plain = quantized(chosen), quantized(chosen)
    repair(model, chosen, evolve(STEP, penalty=1e12, flips=0, rounding=rounding))
    for name in plain.weight_names():
        torch.testing.assert_close(
            model.quantized(name, "", model.weight(name)),
            plain.quantized(name, "", plain.weight(name)),
            atol=1e-5,
            rtol=0,
        )


@pytest.mark.parametrize("rounding", ["halves", "columns"])
def test_repaired_weights_are_values_of_their_quantizers(rounding):
    chosen = teacher("vit")
    model = repair(quantized(chosen), chosen, evolve(STEP, rounding=rounding))
    for name in model.weight_names():
        if name != "patch_embed.proj.weight":
            assert torch.equal(model.quantizers[name](model.weight(name)), model.weight(name))


def test_layers_without_quantizers_are_corrected_alone_and_without_a_bias_of_their_own_too():
    chosen = teacher("beit")  # the bias of its qkv is computed in the forward pass
    model = quantized(chosen, FLOAT_WEIGHTS)
    before = parameters(model)
    repair(model, chosen)
    changed = {name for name, tensor in parameters(model).items() if not torch.equal(tensor, before[name])}
    assert "blocks.1.attn.qkv.weight" in changed
    assert {name for name in changed if name.startswith("blocks.0")} == {
        "blocks.0.attn.qkv.weight",
        *(f"blocks.0.{layer}.{leaf}" for layer in ("attn.proj", "mlp.fc1", "mlp.fc2") for leaf in ("weight", "bias")),
    }


def test_two_grids_of_one_weight_are_kept_apart():
    dual = "quantization.weights={type='dual_uniform', bits=3, symmetric=true, granularity='channel', share=0.1}"
    chosen = teacher("vit")
    model, name = quantized(chosen, dual), "blocks.0.mlp.fc1.weight"
    before = (output(model) - output(chosen.module)).norm()
    repair(model, chosen)
    assert torch.equal(model.quantizers[name](model.weight(name)), model.weight(name))
    assert 0 < model.quantizers[name].outlier.sum() <= 3
    assert (output(model) - output(chosen.module)).norm() < before


def test_layers_whose_input_is_quantized_at_an_earlier_site_are_corrected_too():
    chosen = teacher("vit")
    model = quantized(chosen, "quantization.placement='psaq'")
    assert "blocks.0.mlp.fc1.input" not in model.sites  # the LayerNorm's output is
    before = (output(model) - output(chosen.module)).norm()
    repair(model, chosen)
    assert (output(model) - output(chosen.module)).norm() < 0.8 * before


def test_what_is_no_linear_layer_is_rounded_as_it_is_and_named():
    chosen = teacher("vit")
    model = repair(quantized(chosen), chosen)
    assert model.notes == ["ridge: patch_embed.proj.weight is rounded without correction"]
    assert torch.equal(model.network.patch_embed.proj.weight, chosen.module.patch_embed.proj.weight)


def test_a_layer_without_a_bias_gets_one_that_is_saved(tmp_path):
    chosen = teacher("swin")
    model = repair(quantized(chosen), chosen)
    assert model.biases == ["layers.1.downsample.reduction.bias"]
    save_quantized(model, tmp_path, chosen)
    assert torch.equal(output(load_quantized(tmp_path, network("swin"))), output(model))


def test_the_teacher_is_untouched_and_the_size_of_batches_does_not_matter():
    chosen = teacher("vit")
    state = {name: value.clone() for name, value in chosen.module.state_dict().items()}
    one, other = (repair(quantized(chosen), chosen, evolve(STEP, batch=batch)) for batch in (1, 6))
    assert all(torch.equal(value, state[name]) for name, value in chosen.module.state_dict().items())
    first = "blocks.0.attn.qkv.weight"  # what follows depends on single roundings
    torch.testing.assert_close(one.weight(first), other.weight(first))
    assert not torch.equal(one.weight(first), quantized(chosen).weight(first))


def test_progress_counts_layers():
    seen = []

    @contextmanager
    def progress(label, total):
        yield lambda steps=1, **values: seen.append((label, total, steps))

    repair(quantized("vit"), teacher("vit"), runtime=evolve(RUNTIME, progress=progress))
    assert seen == [("correcting layers", 9, 1)] * 9


# what goes wrong


def test_a_model_that_was_not_calibrated_is_refused():
    spec = back_end("quantization.steps=['ridge']")
    with pytest.raises(SpdfqError, match="was not calibrated"):
        quantize(teacher("vit"), images(), spec, RUNTIME)


def test_a_weight_of_another_quantizer_is_refused_by_name():
    model = quantized("vit")
    log = Log2Quantizer()
    log.observe(torch.ones(1))
    log.freeze()
    model.replace_quantizer("blocks.0.attn.proj.weight", log)
    model.weight("blocks.0.attn.proj.weight").abs_()
    with pytest.raises(SpdfqError, match=r"^blocks.0.attn.proj.weight: this step needs evenly spaced values here"):
        repair(model, teacher("vit"), evolve(STEP, penalty=1e9))


def test_a_penalty_too_small_to_invert_is_refused_with_the_layers_name():
    model = quantized("vit")
    with pytest.raises(SpdfqError, match=r"^ridge: blocks.0.\S+weight: penalty = 1e-12 is too small .*; raise it"):
        repair(model, teacher("vit"), evolve(STEP, penalty=1e-12), count=2)


def test_images_that_are_not_finite_are_refused_with_the_layers_name():
    model, given = quantized("vit"), images(6)
    given[0] = torch.nan
    with pytest.raises(NonFiniteError, match=r"ridge: blocks.0.attn.qkv.weight: its inputs or outputs are not finite"):
        repair(model, teacher("vit"), images=given)


# resuming


@pytest.mark.parametrize("finished", [5])
def test_an_interrupted_repair_goes_on_bit_for_bit(tmp_path, monkeypatch, finished):
    chosen, solve, done = teacher("vit"), Ridge._correct, []
    expected = repair(quantized(chosen), chosen)

    def interrupt(step, model, layer, found):
        if len(done) == finished:
            raise Interrupted
        done.append(layer.weight)
        solve(step, model, layer, found)

    with monkeypatch.context() as patch:
        patch.setattr(Ridge, "_correct", interrupt)
        with pytest.raises(Interrupted):
            repair(quantized(chosen), chosen, folder=tmp_path)
    kept = finished // 4 * 4
    first = set(done[:kept])
    model = quantized(chosen)
    monkeypatch.setattr(
        Ridge, "_correct", lambda step, model, layer, found: _again(solve, first, step, model, layer, found)
    )
    repair(model, chosen, folder=tmp_path)
    assert same(parameters(model), parameters(expected))


def _again(solve, first, step, model, layer, found):
    assert layer.weight not in first
    solve(step, model, layer, found)


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(path.read_bytes()[:-9]),
        flatten_tensors,
    ],
    ids=["truncated", "other shapes"],
)
def test_a_damaged_state_is_one_clear_error(tmp_path, damage):
    chosen = teacher("vit")
    repair(quantized(chosen), chosen, folder=tmp_path)
    damage(tmp_path / STATE)
    with pytest.raises(DataError, match=r"delete it, or use --fresh$"):
        repair(quantized(chosen), chosen, folder=tmp_path)


def test_the_shipped_part_is_repq_and_then_this():
    spec = load_recipe({"extends": ["models/vit_fmnist", "images/gaussian_noise", "backends/ridge"]}).quantization
    assert [type(step).__name__ for step in spec.steps] == ["Calibrate", "RepQ", "Ridge"]
