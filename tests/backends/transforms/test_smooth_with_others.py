"""`smooth` with the steps around it, with budgets and students, and in checkpoints."""

import json
import warnings
from concurrent.futures import ThreadPoolExecutor

import attrs
import pytest
import torch
from support.backends import RUNTIME, Interrupted, back_end, images, network, quantized, teacher
from support.checkpoints import edited
from support.smoothing import SMOOTH

from spdfq.backends import Ridge, Rotate, Smooth, quantize
from spdfq.backends.quantized_student import student_factory
from spdfq.errors import DataError, ModelError
from spdfq.quantized.checkpoint import load_quantized, save_quantized
from spdfq.recipe import load_recipe
from spdfq.runtime import Runtime

CALIBRATE = "{type='calibrate', observer='minmax', weight_observer='minmax'}"


@torch.no_grad()
def logits(model):
    return model(images())


# steps after it

BACKENDS = [
    *("adalog", "adaround", "blockwise", "distill", "minmax", "plus", "ptf", "repq", "ridge", "three_stage"),
]


def small(step):
    """A step with few iterations."""
    fields = {field.name for field in attrs.fields(type(step))}
    return attrs.evolve(step, **{key: value for key, value in (("iterations", 2), ("batch", 4)) if key in fields})


@pytest.mark.parametrize("name", BACKENDS)
def test_it_combines_with_every_shipped_back_end(name, tmp_path):
    recipe = {"extends": ["models/vit_fmnist", "images/gaussian_noise", f"backends/{name}"]}
    spec = load_recipe(recipe, ["quantization.overrides=[]"]).quantization
    spec = attrs.evolve(spec, steps=(Rotate(), Smooth(), *map(small, spec.steps)))
    (tmp_path / "state").mkdir()
    chosen = teacher("vit")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = quantize(chosen, images(4), spec, RUNTIME, tmp_path / "state")
        again = quantize(chosen, images(4), spec, RUNTIME, tmp_path / "state")  # from the finished parts
    assert model.shifted
    assert logits(model).isfinite().all()
    assert torch.equal(logits(again), logits(model))
    save_quantized(model, tmp_path / "saved", chosen)
    assert torch.equal(logits(load_quantized(tmp_path / "saved", network("vit"))), logits(model))


@pytest.mark.parametrize("name", ["swin", "beit", "cait"])
def test_it_combines_with_repq_and_ridge_on_other_models(name):
    chosen = teacher(name)
    repq = "{type='repq', observer='minmax', weight_observer='minmax'}"
    ridge = "{type='ridge', penalty=1.0, rounding='columns', weight_observer='minmax'}"
    plain = quantized(chosen, f"quantization.steps=[{CALIBRATE}]")
    model = quantized(chosen, f"quantization.steps=[{{type='smooth'}}, {CALIBRATE}, {repq}, {ridge}]")
    wanted = logits(chosen.module)
    assert (logits(model) - wanted).norm() < (logits(plain) - wanted).norm()


def test_an_interrupted_step_after_it_goes_on_bit_for_bit(tmp_path, monkeypatch):
    chosen, solve, done = teacher("vit"), Ridge._correct, []
    ridge = "{type='ridge', penalty=1.0, rounding='columns', weight_observer='minmax'}"
    spec = back_end(f"quantization.steps=[{{type='rotate'}}, {{type='smooth'}}, {CALIBRATE}, {ridge}]")
    expected = quantize(chosen, images(), spec, RUNTIME)

    def interrupt(step, model, layer, found):
        if len(done) == 5:
            raise Interrupted
        done.append(layer.weight)
        solve(step, model, layer, found)

    with monkeypatch.context() as patch:
        patch.setattr(Ridge, "_correct", interrupt)
        with pytest.raises(Interrupted):
            quantize(chosen, images(), spec, RUNTIME, tmp_path)
    again = quantize(chosen, images(), spec, RUNTIME, tmp_path)
    assert all(torch.equal(tensor, again.tensors()[name]) for name, tensor in expected.tensors().items())


def test_a_budget_measures_the_smoothed_network():
    budget = "quantization.budget={weights=3.0, choices=[2, 4]}"
    model = quantized("vit", budget, SMOOTH)
    assert model.shifted
    assert {model.quantizers[name].bits for name in model.weight_names()} == {2, 4}


def test_a_student_is_not_smoothed_again_with_each_calibration():
    student = student_factory(teacher("vit"), back_end(SMOOTH), Runtime(seed=0))(images())
    before = student.network.blocks[0].mlp.fc2.input_shift.clone()
    student.calibrate(images(seed=1))
    assert torch.equal(student.network.blocks[0].mlp.fc2.input_shift, before)


def test_compiled_and_in_threads_it_computes_the_same():
    model = quantized("vit", SMOOTH)
    wanted = logits(model)
    assert torch.equal(logits(torch.compile(model)), wanted)
    with ThreadPoolExecutor(4) as pool:
        assert all(torch.equal(found, wanted) for found in pool.map(logits, [model] * 8))


# checkpoints


@pytest.fixture
def saved(tmp_path):
    chosen = teacher("vit")
    model = quantized(chosen, SMOOTH)
    save_quantized(model, tmp_path, chosen)
    return model, tmp_path


def test_shifted_layers_are_saved_and_come_back(saved):
    model, folder = saved
    assert json.loads((folder / "config.json").read_text())["shifted"] == [
        "blocks.0.mlp.fc2.weight",
        "blocks.1.mlp.fc2.weight",
    ]
    again = load_quantized(folder, network("vit"))
    assert again.shifted == model.shifted
    assert torch.equal(logits(again), logits(model))


def test_a_layer_that_got_a_bias_comes_back(tmp_path):
    chosen = teacher("vit")
    for block in chosen.module.blocks:
        block.mlp.fc2.bias = None
    model = quantized(chosen, SMOOTH)
    assert model.biases == [f"blocks.{b}.mlp.fc2.bias" for b in (0, 1)]
    save_quantized(model, tmp_path, chosen)
    assert torch.equal(logits(load_quantized(tmp_path, chosen.module)), logits(model))


def test_a_file_without_shifted_layers_is_one_of_a_model_without_the_step(tmp_path):
    chosen = teacher("vit")
    model = quantized(chosen)
    save_quantized(model, tmp_path, chosen)
    edited(tmp_path, lambda config: config.pop("shifted"))
    assert torch.equal(logits(load_quantized(tmp_path, network("vit"))), logits(model))


@pytest.mark.parametrize("entry", [7, None, "blocks.0.mlp.fc2.weight", [7], ["norm.weight"] * 2, {"norm.weight": 1}])
def test_damaged_entries_are_one_clear_error(saved, entry):
    with pytest.raises(DataError, match=r"config.json: shifted: not a list of different names; save the model again"):
        load_quantized(edited(saved[1], lambda config: config.update(shifted=entry)), network("vit"))


@pytest.mark.parametrize("entry", ["blocks.7.mlp.fc2.weight", "norm.weight", "patch_embed.proj.weight", "", ".weight"])
def test_layers_of_another_architecture_are_refused(saved, entry):
    with pytest.raises(ModelError, match=rf"{entry} does not fit this architecture"):
        load_quantized(edited(saved[1], lambda config: config.update(shifted=[entry])), network("vit"))


def test_a_missing_entry_is_refused(saved):
    with pytest.raises(ModelError, match=r"blocks.0.mlp.fc2.input_factor does not fit this architecture"):
        load_quantized(edited(saved[1], lambda config: config["shifted"].pop(0)), network("vit"))
