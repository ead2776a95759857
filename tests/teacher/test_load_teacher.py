"""Models by name: the bundled ones are as good as promised, and bad names, sizes and weights are one clear line."""

from pathlib import Path

import huggingface_hub.constants
import pytest
import timm
import torch
from attrs import evolve
from safetensors.torch import load_file, save_file

import spdfq.teacher.architectures
from spdfq.data import FashionMnist
from spdfq.errors import DataError, ModelError
from spdfq.evaluation.accuracy import accuracy, logits_over
from spdfq.recipe import Evaluation, ModelSpec, load_recipe
from spdfq.runtime import Runtime
from spdfq.teacher import load_teacher
from spdfq.teacher.architectures import notes
from spdfq.teacher.zoo import BUNDLED, data_file

TINY = ("vit_tiny_patch16_224.augreg_in21k_ft_in1k", {"num_classes": 7, "img_size": 32})


# bundled


@pytest.mark.parametrize("name", sorted(BUNDLED))
def test_bundled_models_name_at_least_88_percent_of_the_bundled_test_images_right(name):
    teacher = load_teacher(ModelSpec(name=f"bundled:{name}"))
    dataset = FashionMnist(limit=600)  # of 2,000
    found = logits_over(teacher.module, teacher, Evaluation(dataset=dataset), Runtime(), "test")
    assert accuracy(found.logits, found.labels)["top1"] >= 88.0
    assert teacher.parameters <= 1_200_000


@pytest.mark.parametrize("name", sorted(BUNDLED))
def test_bundled_weights_are_stored_in_half_precision_and_load_as_float32(name):
    stored = load_file(data_file(f"{name}.safetensors"))
    assert {tensor.dtype for tensor in stored.values() if tensor.is_floating_point()} == {torch.float16}
    module = load_teacher(ModelSpec(name=f"bundled:{name}")).module
    assert {parameter.dtype for parameter in module.parameters()} == {torch.float32}
    assert all(torch.equal(module.state_dict()[key], tensor.float()) for key, tensor in stored.items())


@pytest.mark.parametrize("name", sorted(BUNDLED))
def test_bundled_models_carry_their_own_data_configuration(name):
    teacher = load_teacher(ModelSpec(name=f"bundled:{name}"), weights=False)
    assert (teacher.mean, teacher.std) == ((0.2860,), (0.3530,))
    assert (teacher.input_size, teacher.num_classes, teacher.crop_pct) == ((1, 28, 28), 10, 1.0)


def test_an_unknown_bundled_model_is_named_with_the_known_ones():
    with pytest.raises(
        ModelError, match=r"no bundled model 'vit_fmist'; did you mean vit_fmnist.*\(bundled: vit_fmnist, "
    ):
        load_teacher(ModelSpec(name="bundled:vit_fmist"))
    with pytest.raises(ModelError, match="a bundled model has its own num_classes and img_size"):
        load_teacher(ModelSpec(name="bundled:vit_fmnist", img_size=32))


# timm and the hub


@pytest.mark.parametrize(
    ("name", "mean", "size", "crop"),
    [
        ("deit_tiny_patch16_224.fb_in1k", (0.485, 0.456, 0.406), 224, ("center", 0.9, "bicubic")),
        ("vit_tiny_patch16_224.augreg_in21k_ft_in1k", (0.5, 0.5, 0.5), 224, ("center", 0.9, "bicubic")),
        ("vit_tiny_patch16_384.augreg_in21k_ft_in1k", (0.5, 0.5, 0.5), 384, ("center", 1.0, "bicubic")),
        ("tiny_vit_21m_512.dist_in22k_ft_in1k", (0.485, 0.456, 0.406), 512, ("squash", 1.0, "bicubic")),
    ],
)
def test_normalisation_size_and_crop_are_those_of_the_tag(name, mean, size, crop):
    teacher = load_teacher(ModelSpec(name=name), weights=False)
    assert (teacher.mean, teacher.input_size) == (mean, (3, size, size))
    assert (teacher.crop_mode, teacher.crop_pct, teacher.interpolation) == crop


def test_a_timm_model_brings_its_own_normalisation_and_takes_the_size_asked_for():
    name, options = TINY
    teacher = load_teacher(ModelSpec(name=name, pretrained=False, **options))
    assert (teacher.mean, teacher.std) == ((0.5,) * 3, (0.5,) * 3)
    assert (teacher.input_size, teacher.num_classes) == ((3, 32, 32), 7)
    assert (teacher.crop_pct, teacher.interpolation, teacher.crop_mode) == (0.9, "bicubic", "center")
    assert not teacher.module.training


def test_random_weights_are_the_same_each_time_and_the_global_stream_is_left_alone():
    name, options = TINY
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = load_teacher(ModelSpec(name=name, pretrained=False, **options))
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(6)
    assert load_teacher(ModelSpec(name=name, pretrained=False, **options)).fingerprint() == first.fingerprint()


def test_an_unknown_timm_name_suggests_the_nearest():
    with pytest.raises(
        ModelError, match=r"has no model 'vit_tinny_patch16_224'; did you mean vit_tiny_patch16_224 or "
    ):
        load_teacher(ModelSpec(name="vit_tinny_patch16_224"))
    with pytest.raises(
        ModelError, match=r"has no weights 'augreg_in1k'; did you mean vit_tiny_patch16_224\.augreg_in21k"
    ):
        load_teacher(ModelSpec(name="vit_tiny_patch16_224.augreg_in1k"))


def test_a_model_without_published_weights_is_refused_and_not_left_random():
    with pytest.raises(ModelError, match="timm has no weights for vit_small_patch16_36x1_224; give"):
        load_teacher(ModelSpec(name="vit_small_patch16_36x1_224"))


def one_line(name, **options):
    with pytest.raises(ModelError) as caught:
        load_teacher(ModelSpec(name=name, **options))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_hub_out_of_reach_is_one_clear_line_without_retries(monkeypatch, caplog):
    asked = []
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(spdfq.teacher.architectures, "_hub_answers", lambda: asked.append(1))
    message = one_line(TINY[0], img_size=32)
    assert message == (
        "model.name: the weights of vit_tiny_patch16_224.augreg_in21k_ft_in1k could not be downloaded from the hub (it "
        "cannot be reached); check the network, or give local weights: model.checkpoint = 'weights.safetensors'"
    )
    assert asked == [1]
    assert caplog.records == []
    assert huggingface_hub.constants.HF_HUB_OFFLINE is False


def test_the_hub_is_asked_once_and_an_unreachable_one_does_not_answer(monkeypatch):
    class Session:
        def head(self, url, timeout):
            assert timeout <= 10
            raise ConnectionError("no route")

    monkeypatch.setattr(huggingface_hub.utils, "get_session", Session)
    assert spdfq.teacher.architectures._hub_answers() is False


def test_what_the_hub_answers_is_passed_on_in_one_line(monkeypatch):
    real = timm.create_model

    def fail(name, pretrained=False, **options):
        if pretrained:
            raise RuntimeError("403 Forbidden\nplease log in")
        return real(name, pretrained=False, **options)

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(spdfq.teacher.architectures, "_hub_answers", lambda: True)
    monkeypatch.setattr(timm, "create_model", fail)
    assert "could not be downloaded from the hub (RuntimeError: 403 Forbidden); check the network" in one_line(TINY[0])
    assert huggingface_hub.constants.HF_HUB_OFFLINE is False


@pytest.mark.parametrize("pretrained", [True, False])
def test_options_an_architecture_cannot_take_are_not_blamed_on_the_hub(pretrained):
    message = one_line("test_resnet.r160_in1k", img_size=64, pretrained=pretrained)
    assert message.startswith("model: timm cannot build test_resnet.r160_in1k with img_size = 64 (TypeError: ")


def test_a_size_is_that_of_the_images_also_where_the_model_does_not_state_it():
    options = {"pretrained": False, "num_classes": 2}
    square = load_teacher(ModelSpec(name="maxvit_rmlp_pico_rw_256", img_size=64, **options))
    assert square.input_size == (3, 64, 64)
    wide = load_teacher(ModelSpec(name="vit_tiny_patch16_224", img_size=(32, 64), **options))
    assert (wide.input_size, wide.module.patch_embed.grid_size) == ((3, 32, 64), (2, 4))
    given = load_recipe("quickstart", ["model={name='vit_tiny_patch16_224', img_size=[32, 64]}"])
    assert given.model.img_size == (32, 64)


@pytest.mark.parametrize(("name", "size"), [("vit_small_patch16_dinov3", 100), ("vit_tiny_patch16_224", 8)])
def test_a_size_the_model_cannot_run_at_is_one_clear_line(name, size):
    message = one_line(name, img_size=size, pretrained=False)
    assert message.startswith(f"model.img_size: {name} cannot run on {size}x{size} pixels (")
    assert message.endswith("); use another size, or leave it out")


@pytest.mark.parametrize("size", [4, (32, 4)])
def test_a_size_of_less_than_8_pixels_is_refused(size):
    with pytest.raises(ValueError, match=r"must be at least 8 pixels, got"):
        ModelSpec(name="vit_tiny_patch16_224", img_size=size)


# local weights


@pytest.fixture
def saved(tmp_path):
    """A checkpoint of the bundled ViT's shape with weights of its own, and those weights."""
    state = {name: tensor + 0.5 for name, tensor in BUNDLED["vit_fmnist"].create().state_dict().items()}
    path = tmp_path / "weights.safetensors"
    save_file(state, path)
    return path, state


def spec(path):
    return ModelSpec(name="bundled:vit_fmnist", checkpoint=str(path))


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_weights_that_are_codes_are_refused_by_name(saved, dtype):
    path, state = saved
    save_file({name: tensor.to(dtype) for name, tensor in state.items() if tensor.is_floating_point()}, path)
    with pytest.raises(ModelError, match=rf"is {str(dtype)[6:]}, not float32, float16 or bfloat16; convert the"):
        load_teacher(spec(path))


def test_a_checkpoint_that_may_not_be_read_is_told_as_such(saved, monkeypatch):
    def refuse(path, mode):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(PermissionError, match="weights"):
        load_teacher(spec(saved[0]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_local_checkpoint_of_any_precision_loads_into_float32(saved, dtype):
    path, state = saved
    save_file({name: tensor.to(dtype) for name, tensor in state.items()}, path)
    loaded = load_teacher(spec(path)).module.state_dict()
    assert {tensor.dtype for tensor in loaded.values()} == {torch.float32}
    assert all(torch.equal(loaded[name], tensor.to(dtype).float()) for name, tensor in state.items())


def test_a_timm_architecture_takes_a_local_checkpoint_without_the_hub(tmp_path):
    name, options = TINY
    source = load_teacher(ModelSpec(name=name, pretrained=False, **options)).module
    with torch.no_grad():
        source.head.bias += 1
    save_file(source.state_dict(), tmp_path / "w.safetensors")
    teacher = load_teacher(ModelSpec(name=name, checkpoint=str(tmp_path / "w.safetensors"), **options))
    assert torch.equal(teacher.module.head.bias, source.head.bias)


def test_a_truncated_checkpoint_is_one_clear_line(saved):
    path, _ = saved
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(
        DataError, match=r"^model\.checkpoint: .*weights\.safetensors: damaged, or not a safetensors file"
    ):
        load_teacher(spec(path))


def test_a_checkpoint_of_random_bytes_is_one_clear_line(saved):
    path, _ = saved
    path.write_bytes(bytes(range(256)))
    with pytest.raises(DataError, match="damaged, or not a safetensors file"):
        load_teacher(spec(path))


def test_a_checkpoint_with_nan_is_refused_with_the_weight(saved):
    path, state = saved
    state["head.bias"][3] = float("nan")
    save_file(state, path)
    with pytest.raises(DataError, match=r"holds NaN or infinite weights, the first of them in head\.bias"):
        load_teacher(spec(path))


def test_a_checkpoint_of_another_model_says_what_does_not_fit(saved):
    path, state = saved
    del state["head.bias"]
    save_file(state, path)
    with pytest.raises(ModelError, match=r"does not fit VisionTransformer: lacks head\.bias$"):
        load_teacher(spec(path))
    save_file({**state, "head.bias": torch.zeros(3), "a": torch.zeros(1)}, path)
    with pytest.raises(ModelError, match=r"holds a, which the model lacks; head\.bias is \[3\] instead of \[10\]$"):
        load_teacher(spec(path))
    save_file({"a": torch.zeros(1)}, path)
    with pytest.raises(
        ModelError, match=r"lacks cls_token, pos_embed, patch_embed\.proj\.weight and 77 more; holds a, which"
    ):
        load_teacher(spec(path))


PREFIXES = ("module.", "model.", "_orig_mod.", "model_ema.", "backbone.", "state_dict.", "model._orig_mod.", "my.vit.")


def renamed(state, *prefixes):
    return {f"{prefix}{name}": tensor.clone() for prefix in prefixes for name, tensor in state.items()}


@pytest.mark.parametrize("prefix", PREFIXES)
def test_a_common_prefix_of_all_names_is_left_out_and_told(saved, prefix):
    path, state = saved
    save_file(renamed(state, prefix), path)
    module = load_teacher(spec(path)).module
    assert all(torch.equal(module.state_dict()[name], tensor) for name, tensor in state.items())
    assert notes(spec(path), module) == [f"model: {path}: names begin with {prefix!r}, which is left out"]
    bare = evolve(spec(path), num_classes=0)
    assert notes(bare, load_teacher(bare).module)


def test_names_without_a_prefix_are_no_news(saved):
    path, _ = saved
    assert notes(spec(path), load_teacher(spec(path)).module) == []
    assert notes(ModelSpec(name="bundled:vit_fmnist"), load_teacher("bundled:vit_fmnist").module) == []


@pytest.mark.parametrize(
    ("prefixes", "named"),
    [
        (("model.", "model_ema."), "'model.' and 'model_ema.'"),
        (("", "model_ema."), "without a prefix and 'model_ema.'"),
    ],
)
def test_several_sets_of_weights_in_a_file_are_named(saved, prefixes, named):
    path, state = saved
    save_file(renamed(state, *prefixes), path)
    with pytest.raises(ModelError, match=rf"safetensors: holds 2 sets of weights, {named}; keep the one you want$"):
        load_teacher(spec(path))


def test_other_tensors_beside_a_prefix_are_named(saved):
    path, state = saved
    save_file({**renamed(state, "model."), "loss.weight": torch.ones(1)}, path)
    with pytest.raises(ModelError, match=r"also holds loss\.weight, without the prefix 'model\.'; leave them out$"):
        load_teacher(spec(path))


def test_weights_of_another_head_say_how_many_classes_they_have(tmp_path):
    options = {"name": "vit_tiny_patch16_224", "img_size": 32}
    path = tmp_path / "w.safetensors"
    save_file(load_teacher(ModelSpec(**options, pretrained=False, num_classes=7)).module.state_dict(), path)
    for asked in (None, 9):
        message = one_line(**options, checkpoint=str(path), num_classes=asked)
        assert message.endswith(
            f"has 7 classes, the model {asked or 1000}; set model.num_classes = 7, or give other weights"
        )
    save_file({name: tensor for name, tensor in load_file(path).items() if not name.startswith("head.")}, path)
    message = one_line(**options, checkpoint=str(path))
    assert message.endswith("has no head; set model.num_classes = 0, or give weights with a head")


@pytest.mark.parametrize("weights", [True, False])
def test_a_head_that_the_weights_of_the_hub_do_not_have_is_refused_and_not_left_random(weights):
    with pytest.raises(
        ModelError, match=r"^model\.num_classes: the weights of vit_tiny.* have 1000 classes, not 7; leave it"
    ):
        load_teacher(ModelSpec(name=TINY[0], num_classes=7), weights=weights)
    with pytest.raises(
        ModelError, match=r"the weights of vit_small_patch14_dinov2\.lvd142m have no head, not 7; leave"
    ):
        load_teacher(ModelSpec(name="vit_small_patch14_dinov2.lvd142m", num_classes=7), weights=weights)


# models in a folder, and of other owners on the hub


@pytest.fixture
def own_folder(tmp_path):
    """What timm's save_for_hf writes, and the network it was given."""
    module = load_teacher(ModelSpec(name="vit_tiny_patch16_224", pretrained=False, num_classes=3, img_size=32)).module
    timm.models.save_for_hf(module, tmp_path / "own", model_args={"img_size": 32}, safe_serialization=True)
    return tmp_path / "own", module


def test_a_folder_of_timm_is_a_model(own_folder):
    folder, module = own_folder
    teacher = load_teacher(f"local-dir:{folder}")
    assert (teacher.num_classes, teacher.input_size, teacher.mean) == (3, (3, 32, 32), (0.5, 0.5, 0.5))
    assert torch.equal(teacher.module.head.weight, module.head.weight)
    assert load_teacher(ModelSpec(name=f"local-dir:{folder}", num_classes=0)).headless
    message = one_line(f"local-dir:{folder}", num_classes=5)
    assert message.endswith("has 3 classes, the model 5; set model.num_classes = 3, or give other weights")


def test_a_folder_that_is_no_model_is_one_line(own_folder, tmp_path):
    folder, _ = own_folder
    assert one_line(f"local-dir:{tmp_path}").startswith(
        f"model.name: local-dir:{tmp_path}: no such folder, or it has no"
    )
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    assert "has no model.safetensors, the only file of weights that is read here" in one_line(f"local-dir:{folder}")
    (folder / "config.json").write_text('{"model_type": "vit"}')
    message = one_line(f"local-dir:{folder}", pretrained=False)
    assert message.endswith("with its own settings (its config.json is not timm's: no 'architecture')")


def test_a_model_of_another_owner_on_the_hub_is_read_from_the_cache_where_the_hub_is_out_of_reach(
    own_folder, tmp_path, monkeypatch
):
    folder, module = own_folder
    snapshot = tmp_path / "cache/models--me--mine/snapshots/abc"
    snapshot.parent.mkdir(parents=True)
    folder.rename(snapshot)
    (tmp_path / "cache/models--me--mine/refs").mkdir()
    (tmp_path / "cache/models--me--mine/refs/main").write_text("abc")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    teacher = load_teacher("hf-hub:me/mine")
    assert torch.equal(teacher.module.head.weight, module.head.weight)
    assert "have 3 classes, not 5" in one_line("hf-hub:me/mine", num_classes=5)
    assert one_line("hf-hub:me/other") == (
        "model.name: hf-hub:me/other could not be downloaded from the hub (it cannot be reached); check the network, "
        "or give a local copy: model.name = 'local-dir:path'"
    )
    hint = "has no model 'me/mine'; a model of the Hugging Face hub is 'hf-hub:owner/name', one in a folder 'local-dir:"
    assert hint in one_line("me/mine")


def test_a_missing_or_pickled_checkpoint_is_refused(tmp_path):
    with pytest.raises(ModelError, match=r"none\.safetensors: no such file"):
        load_teacher(spec(tmp_path / "none.safetensors"))
    torch.save({}, tmp_path / "w.pth")
    with pytest.raises(ModelError, match=r"only \.safetensors files are read"):
        load_teacher(spec(tmp_path / "w.pth"))


def test_the_name_of_a_bundled_model_without_its_prefix_gets_a_hint():
    with pytest.raises(ModelError, match=r"has no model 'vit_fmnist'; the bundled one is 'bundled:vit_fmnist'"):
        load_teacher("vit_fmnist")
