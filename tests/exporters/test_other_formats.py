"""Programs of torch.export, and checkpoints for timm."""

import json
import zipfile

import pytest
import timm
import torch
from safetensors import safe_open
from support import backends as tiny
from support.exports import W8A8, exported, opened

from spdfq.errors import ModelError
from spdfq.quantized.sites import WEIGHT


@pytest.fixture(scope="module")
def model():
    chosen = tiny.teacher("vit", depth=1)
    return tiny.quantized(chosen, *tiny.bits(4)), chosen


@pytest.fixture(scope="module")
def program(model, tmp_path_factory):
    return exported(*model, tmp_path_factory.mktemp("program"), "pt2")


@torch.no_grad()
def test_a_program_gives_the_logits_of_the_quantized_model_bit_for_bit(model, program):
    file = program
    assert file.notes == []
    for count in (1, 7):
        assert torch.equal(opened(file)(tiny.images(count)), model[0](tiny.images(count)))


def test_a_program_holds_integer_weights_and_no_float_ones(model, program):
    file = program
    state = torch.export.load(file.path).state_dict
    quantized = {tuple(model[0].weight(name).shape) for name in model[0].weight_names()}
    matrices = [tensor for tensor in state.values() if tuple(tensor.shape) in quantized]
    assert {tensor.dtype for tensor in matrices} == {torch.int8}
    assert len(matrices) == 6
    names = zipfile.ZipFile(file.path).namelist()
    stored = next(name for name in names if name.endswith("extra/mean"))
    assert json.loads(zipfile.ZipFile(file.path).read(stored)) == [0.5, 0.5, 0.5]


@torch.no_grad()
def test_a_checkpoint_can_be_loaded_by_timm(model, tmp_path):
    quantized, chosen = model
    file = exported(quantized, chosen, tmp_path, "safetensors")
    assert file.notes == ["10 activations are not quantized: the file holds weights only"]
    plain = {"img_size": 32, "num_classes": 10, "patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2}
    loaded = timm.create_model("vit_tiny_patch16_224", checkpoint_path=str(file.path), **plain).eval()
    name = "blocks.0.mlp.fc1.weight"
    assert torch.equal(loaded.get_parameter(name), quantized.quantized(name, WEIGHT, quantized.weight(name)))
    assert torch.equal(loaded.pos_embed, quantized.network.pos_embed)
    with safe_open(file.path, "pt") as stored:
        assert json.loads(stored.metadata()["size"]) == [32, 32]


@pytest.mark.parametrize(
    ("steps", "place"),
    [
        (["{type='rotate'}"], r"norm.*: the step 'rotate' made it an RMSNorm without parameters"),
        (["{type='smooth'}"], r"blocks.*: the step 'smooth' made it shift its input"),
    ],
)
def test_an_architecture_that_steps_changed_is_refused_by_name(steps, place, tmp_path):
    chosen = tiny.teacher("vit")
    steps = [*steps, "{type='calibrate', observer='minmax', weight_observer='minmax'}"]
    changed = tiny.quantized(chosen, *W8A8, f"quantization.steps=[{', '.join(steps)}]")
    with pytest.raises(ModelError, match=place):
        exported(changed, chosen, tmp_path, "safetensors")
    assert list(tmp_path.iterdir()) == []
