"""`rotate` with the steps after it, with budgets and students, and in checkpoints."""

import json
import warnings

import attrs
import pytest
import torch
from support.backends import RUNTIME, back_end, images, network, quantized, teacher
from support.checkpoints import edited
from support.rotation import ROTATE

from spdfq.backends import Rotate, quantize
from spdfq.backends.quantized_student import student_factory
from spdfq.errors import DataError, ModelError
from spdfq.quantized.checkpoint import load_quantized, save_quantized
from spdfq.recipe import load_recipe
from spdfq.runtime import Runtime

# steps after it


def test_later_steps_compare_with_the_rotated_network():
    """The error of a block is that of rounding, not the distance between two coordinate systems."""
    steps = "{type='calibrate', observer='minmax', weight_observer='minmax'}, {type='blockwise', iterations=3, batch=4}"
    lines = [f"quantization.{what}.bits=8" for what in ("weights", "activations", "softmax")]
    chosen = teacher("vit")
    model = quantized(chosen, f"quantization.steps=[{{type='rotate'}}, {steps}]", *lines)
    with torch.no_grad():
        wanted = chosen.module(images())
        assert (model(images()) - wanted).norm() < 0.2 * wanted.norm()


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
    spec = attrs.evolve(spec, steps=(Rotate(), *map(small, spec.steps)))
    (tmp_path / "state").mkdir()
    chosen = teacher("vit")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = quantize(chosen, images(4), spec, RUNTIME, tmp_path / "state")
        again = quantize(chosen, images(4), spec, RUNTIME, tmp_path / "state")  # from the finished parts
    with torch.no_grad():
        logits = model(images())
        assert logits.isfinite().all()
        assert torch.equal(again(images()), logits)
    save_quantized(model, tmp_path / "saved", chosen)
    with torch.no_grad():
        assert torch.equal(load_quantized(tmp_path / "saved", network("vit"))(images()), logits)


def test_a_budget_measures_the_rotated_network():
    budget = "quantization.budget={weights=4.0, choices=[2, 4, 6]}"
    lines = {
        tuple(sorted((name, quantizer.bits) for name, quantizer in model.quantizers.items()))
        for model in (quantized("vit", budget, steps) for steps in (ROTATE, "quantization.overrides=[]"))
    }
    assert len(lines) == 2


def test_a_student_is_not_rotated_again_with_each_calibration():
    student = student_factory(teacher("vit"), back_end(ROTATE), Runtime(seed=0))(images())
    before = student.network.blocks[0].attn.qkv.weight.clone()
    student.calibrate(images(seed=1))
    assert torch.equal(student.network.blocks[0].attn.qkv.weight, before)


# checkpoints


@pytest.fixture
def saved(tmp_path):
    chosen = teacher("vit")
    model = quantized(chosen, ROTATE)
    save_quantized(model, tmp_path, chosen)
    return model, tmp_path


def test_the_norms_are_saved_and_come_back(saved):
    model, folder = saved
    assert json.loads((folder / "config.json").read_text())["norms"]["norm"] == [32, 1e-06]
    again = load_quantized(folder, network("vit"))
    assert again.norms == model.norms
    with torch.no_grad():
        assert torch.equal(again(images()), model(images()))


def test_a_file_without_norms_is_one_of_a_model_without_the_step(tmp_path):
    chosen = teacher("vit")
    model = quantized(chosen)
    save_quantized(model, tmp_path, chosen)
    edited(tmp_path, lambda config: config.pop("norms"))
    with torch.no_grad():
        assert torch.equal(load_quantized(tmp_path, network("vit"))(images()), model(images()))


@pytest.mark.parametrize("entry", [7, [32], ["32", 1e-6], [0, 1e-6], [32, "small"], [32, -1.0], [True, 1e-6]])
def test_a_damaged_norm_is_one_clear_error(saved, entry):
    with pytest.raises(DataError, match=r"config.json: norms: norm: not \[features, eps\]; save the model again"):
        load_quantized(edited(saved[1], lambda config: config["norms"].update(norm=entry)), network("vit"))


def test_norms_of_another_architecture_are_refused(saved):
    folder = edited(saved[1], lambda config: config["norms"].update({"blocks.7.norm1": [32, 1e-6]}))
    with pytest.raises(ModelError, match=r"blocks.7.norm1 does not fit this architecture"):
        load_quantized(folder, network("vit"))
