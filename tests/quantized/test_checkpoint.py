"""A saved quantized model reloads bit for bit, is as small as its bits say, and a damaged one is refused."""

import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support.backends import (
    CALIBRATE,
    NO_OVERRIDES,
    RUNTIME,
    back_end,
    images,
    network,
    quantized,
    teacher,
)

import spdfq
from spdfq.backends import quantize
from spdfq.errors import DataError, ModelError, SpdfqError
from spdfq.quantized.checkpoint import load_checkpoint, load_quantized, save_quantized
from spdfq.recipe import ModelSpec, load_recipe
from spdfq.teacher import load_teacher
from spdfq.teacher.zoo import data_file

MIXED = (
    "quantization.overrides=[{sites=['*.fc1.*'], bits=3}, {sites=['*.qkv.*', '*.query'], bits=5}, "
    "{sites=['head.*', '*.softmax'], bits=8}, {sites=['*.fc2.weight', '*.value'], bits=0}]"
)


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """A folder with a ViT of mixed widths, and the model."""
    folder, chosen = tmp_path_factory.mktemp("saved") / "quantized", teacher("vit")
    model = quantized(chosen, MIXED)
    save_quantized(model, folder, chosen)
    return folder, model


@pytest.fixture
def saved(original, tmp_path):
    """A copy of that folder, and the logits of the model."""
    return shutil.copytree(original[0], tmp_path / "quantized"), original[1](images())


def other(name, **changes):
    """The same architecture with other weights."""
    module = network(name, **changes)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.uniform_(-1, 1, generator=torch.Generator().manual_seed(4))
    return module


# what comes back


@pytest.mark.parametrize("name", ["vit", "swin", "beit", "deit_distilled", "cait"])
def test_reloaded_logits_are_the_saved_models_bit_for_bit(tmp_path, name):
    chosen, patterns = teacher(name), MIXED.replace("'*.query'", "'*.attn.*'").replace("'*.value'", "'*.proj.input'")
    patterns = patterns.replace("'*.softmax'", "'*.proj.weight'")
    learning = CALIBRATE.replace("}]", "}, {type='blockwise', iterations=2, lr=1e-3}]")
    model = quantized(chosen, patterns, learning)
    assert {quantizer.bits for quantizer in model.quantizers.values()} == {3, 4, 5, 8}
    save_quantized(model, tmp_path, chosen)
    given = images(7, seed=5)
    assert torch.equal(load_quantized(tmp_path, other(name))(given), model(given))
    again = tmp_path / "again"
    save_quantized(load_quantized(tmp_path, other(name)), again, chosen)
    assert (again / "model.safetensors").read_bytes() == (tmp_path / "model.safetensors").read_bytes()


def test_sites_leftovers_and_the_teachers_description_come_back(original):
    folder, expected = original
    model, found, recipe = load_checkpoint(folder, other("vit"))
    assert model.site_table() == expected.site_table()
    assert model.sites == expected.sites
    assert (found.name, found.mean, found.input_size, found.num_classes) == (
        "VisionTransformer",
        (0.5, 0.5, 0.5),
        (3, 32, 32),
        10,
    )
    assert recipe == {}


def test_a_named_model_needs_no_module(tmp_path):
    recipe = load_recipe("quickstart", [CALIBRATE, NO_OVERRIDES])
    chosen = load_teacher(recipe.model)
    given = torch.randn(3, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    model = quantize(chosen, given, recipe.quantization, RUNTIME)
    save_quantized(model, tmp_path, chosen, recipe.to_dict())
    found, described, kept = load_checkpoint(tmp_path)
    assert torch.equal(found(given), model(given))
    assert (described.name, described.std) == ("bundled:vit_fmnist", chosen.std)
    assert load_recipe(kept).to_dict() == recipe.to_dict()
    assert torch.equal(spdfq.load_quantized(str(tmp_path))(given), model(given))
    # the integers at their width, and everything else
    weights, full = tmp_path / "model.safetensors", data_file("vit_fmnist.safetensors")
    four_bytes = 4 * sum(tensor.numel() for tensor in load_file(full).values())
    assert weights.stat().st_size <= 0.17 * four_bytes


def test_the_file_is_as_large_as_its_bits(saved):
    stored = load_file(saved[0] / "model.safetensors")
    assert stored["blocks.0.attn.qkv.weight.codes"].shape == (96 * 32 * 5 // 8,)
    assert stored["blocks.0.mlp.fc1.weight.codes"].shape == (128 * 32 * 3 // 8,)
    assert stored["blocks.0.attn.proj.weight.codes"].shape == (32 * 32 * 4 // 8,)
    assert stored["head.weight.codes"].shape == (320,)
    assert stored["blocks.0.mlp.fc2.weight"].dtype == torch.float32
    assert "blocks.0.attn.qkv.weight" not in stored
    with safe_open(saved[0] / "model.safetensors", "pt") as handle:
        assert not handle.metadata()


def test_nothing_is_pickled(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("pickled")

    for name in ("dump", "dumps", "load", "loads", "Pickler", "Unpickler"):
        monkeypatch.setattr(pickle, name, refuse)
    monkeypatch.setattr(torch, "save", refuse)
    monkeypatch.setattr(torch, "load", refuse)
    chosen = teacher("vit")
    save_quantized(quantized(chosen), tmp_path, chosen)
    load_quantized(tmp_path, other("vit"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    assert json.loads((tmp_path / "config.json").read_text())["format"] == 1


def test_a_module_that_was_given_is_not_changed(saved):
    module = other("vit")
    before = {name: value.clone() for name, value in module.state_dict().items()}
    load_quantized(saved[0], module)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def test_an_uncalibrated_model_and_one_in_another_precision_are_not_saved(tmp_path):
    from spdfq.quantized import place

    chosen = teacher("vit")
    with pytest.raises(SpdfqError, match="not frozen"):
        save_quantized(place(chosen, back_end()), tmp_path, chosen)
    with pytest.raises(DataError, match=r"stored in float32, this one is torch.bfloat16; save model.float\(\)"):
        save_quantized(quantized(chosen).bfloat16(), tmp_path, chosen)
    assert not list(tmp_path.iterdir())


# what is refused


def test_a_folder_that_is_not_there_or_lacks_a_file_is_named(saved):
    folder, _ = saved
    with pytest.raises(DataError, match=r"nowhere/config.json: no such file; a quantized model is a folder with"):
        load_quantized("nowhere")
    (folder / "model.safetensors").unlink()
    with pytest.raises(DataError, match=r"quantized/model.safetensors: no such file"):
        load_quantized(folder, other("vit"))


def edited_tensor(folder):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors["head.bias"] += 1
    save_file(tensors, path)


def flipped_bit(folder):
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    "damage",
    [
        edited_tensor,
        flipped_bit,
        lambda folder: (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-50]),
        lambda folder: (folder / "model.safetensors").write_bytes(b""),
    ],
    ids=["edited", "one bit", "truncated", "empty"],
)
def test_tensors_that_are_not_the_saved_ones_are_refused(saved, damage):
    damage(saved[0])
    with pytest.raises(
        DataError, match=r"model.safetensors: truncated, edited or of another model than its config.json"
    ):
        load_quantized(saved[0], other("vit"))


def config(folder, change):
    path = folder / "config.json"
    table = json.loads(path.read_text())
    change(table)
    path.write_text(json.dumps(table))


@pytest.mark.parametrize(
    "change",
    [
        lambda table: table["quantizers"]["head.weight"].update(bits=4),
        lambda table: table["teacher"].update(mean=[0.4, 0.5, 0.5]),
        lambda table: table["sites"].pop("head.input"),
        lambda table: table.update(tensors_sha256="0" * 64),
        lambda table: table.pop("config_digest"),
        lambda table: table.update(recipe={"seed": 1}),
    ],
    ids=["bits", "mean", "site", "digest of the tensors", "no digest", "recipe"],
)
def test_a_config_that_was_edited_is_refused(saved, change):
    config(saved[0], change)
    with pytest.raises(DataError, match=r"config.json: was edited after it was written; save the model again"):
        load_quantized(saved[0], other("vit"))


def test_a_config_that_was_laid_out_anew_is_the_same(saved):
    config(saved[0], lambda table: None)
    assert torch.equal(load_quantized(saved[0], other("vit"))(images()), saved[1])


@pytest.mark.parametrize("version", [0, 2, "1", None])
def test_another_format_is_told_before_anything_else(saved, version):
    config(saved[0], lambda table: table.update(format=version, whatever=1))
    (saved[0] / "model.safetensors").write_bytes(b"")
    with pytest.raises(DataError, match=rf"config.json: format {version!r}, but this version of spdfq reads format 1"):
        load_quantized(saved[0], other("vit"))


@pytest.mark.parametrize("text", ["", '{"format": 1', "[]", "{}", "3", "\0"])
def test_a_config_that_is_none_is_refused(saved, text):
    (saved[0] / "config.json").write_text(text)
    with pytest.raises(DataError, match=r"config.json: not .*; save the model again"):
        load_quantized(saved[0], other("vit"))


@pytest.mark.parametrize(
    ("name", "changes", "stray"),
    [
        ("vit", {"embed_dim": 48}, r"[a-z0-9_.]+"),
        ("vit", {"depth": 1}, "blocks.1.[a-z0-9_.]+"),
        ("vit", {"depth": 3}, "blocks.2.[a-z0-9_.]+"),
        ("vit", {"num_classes": 7}, "head.[a-z]+"),
        ("vit", {"class_token": False, "global_pool": "avg"}, "[a-z_]+"),
        ("swin", {}, "[a-z0-9_.]+"),
    ],
    ids=str,
)
def test_another_architecture_is_refused(saved, name, changes, stray):
    with pytest.raises(ModelError, match=rf": {stray} does not fit this architecture; the file was saved from another"):
        load_quantized(saved[0], network(name, **changes))


def test_an_architecture_for_images_of_another_size_is_refused(saved):
    with pytest.raises(ModelError, match=r"VisionTransformer: cannot run on one image 3x32x32 \(AssertionError: Input"):
        load_quantized(saved[0], network("vit", img_size=40))


@pytest.mark.parametrize("folder", [5, None, ["quantized"]])
def test_a_folder_that_is_no_path_is_refused(folder):
    with pytest.raises(DataError, match="load_quantized: expected the folder of a quantized model, got "):
        load_quantized(folder)


@pytest.mark.parametrize("module", ["vit", torch.nn.Linear])
def test_a_module_that_is_none_is_refused(saved, module):
    with pytest.raises(ModelError, match=r"Teacher: module must be an nn\.Module, got ('vit'|the class Linear)"):
        load_quantized(saved[0], module)


def test_a_module_of_ones_own_has_to_be_given(saved, tmp_path):
    message = (
        r"VisionTransformer: was saved without the model section of a recipe; "
        r"give its module: load_quantized\(folder, module\)"
    )
    with pytest.raises(ModelError, match=message):
        load_quantized(saved[0])
    chosen = teacher("vit")
    save_quantized(quantized(chosen), tmp_path, chosen, load_recipe("quickstart").to_dict())
    with pytest.raises(ModelError, match=message):
        load_quantized(tmp_path)


def test_a_quantizer_that_is_not_installed_is_named(saved, monkeypatch):
    from spdfq.registry import quantizers

    quantizers.names()
    monkeypatch.delitem(quantizers._entries, "log2")
    with pytest.raises(DataError, match=r"blocks.0.attn.softmax: unknown quantizer 'log2'"):
        load_quantized(saved[0], other("vit"))


def test_saving_over_a_checkpoint_replaces_it(saved):
    chosen = teacher("swin")
    model = quantized(chosen)
    save_quantized(model, saved[0], chosen)
    assert torch.equal(load_quantized(Path(saved[0]), other("swin"))(images()), model(images()))


def test_the_model_spec_of_the_recipe_is_checked(tmp_path):
    chosen = load_teacher(ModelSpec(name="bundled:vit_fmnist"))
    spec = back_end(NO_OVERRIDES)
    model = quantize(chosen, torch.randn(2, 1, 28, 28, generator=torch.Generator().manual_seed(0)), spec, RUNTIME)
    save_quantized(model, tmp_path, chosen, {"model": {"name": "bundled:vit_fmnist", "depth": 3}})
    with pytest.raises(ModelError, match=r"model.depth: unknown key"):
        load_quantized(tmp_path)


def test_a_bundled_model_reloads_without_a_recipe_and_another_number_of_heads_is_refused(tmp_path):
    chosen = load_teacher("bundled:vit_fmnist")
    pixels = torch.zeros(2, 1, 28, 28)
    model = quantize(chosen, pixels + torch.linspace(-0.5, 0.5, 28), back_end(), RUNTIME)
    save_quantized(model, tmp_path, chosen)
    assert torch.equal(load_quantized(tmp_path)(pixels), model(pixels))
    other = load_teacher("bundled:vit_fmnist").module
    for block in other.blocks:
        block.attn.num_heads, block.attn.head_dim = 1, 96
    with pytest.raises(ModelError, match=r"blocks.0.attn.query does not fit this architecture"):
        load_quantized(tmp_path, other)
