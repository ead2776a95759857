"""Teachers: any module can be one; its input, its modes and gradients, and its fingerprint."""

import math

import numpy as np
import pytest
import timm
import torch
from support.networks import build
from torch import nn

from spdfq.errors import ModelError
from spdfq.teacher import Teacher, evaluation_mode


class Linear(nn.Module):
    """A small classifier: 2×4×4 images, three classes."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(32, 3)
        self.norm = nn.BatchNorm1d(3)
        self.norm.weight.requires_grad_(False)

    def forward(self, images):
        return self.norm(self.head(images.flatten(1)))


def own(**changes):
    options = {"mean": (0.5, 0.25), "std": (0.5, 0.2), "num_classes": 3, "input_size": (2, 4, 4)}
    return Teacher(Linear(), **(options | changes))


# its input


def test_any_module_can_be_a_teacher():
    teacher = own()
    assert (teacher.name, teacher.parameters, teacher.device.type) == ("Linear", 32 * 3 + 3 + 6, "cpu")
    assert teacher.module(torch.zeros(2, *teacher.input_size)).shape == (2, 3)


def test_a_teacher_reads_its_input_size_from_the_module_where_it_can():
    assert Teacher(build("vit"), mean=[0.5] * 3, std=[0.5] * 3, num_classes=10).input_size == (3, 32, 32)
    resnet = timm.create_model("test_resnet", num_classes=9)
    assert Teacher(resnet, mean=[0] * 3, std=[1] * 3, num_classes=9).input_size == (3, 160, 160)
    with pytest.raises(ModelError, match=r"Linear: its input size is unknown; give Teacher\(\.\.\., input_size="):
        own(input_size=None)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mean": (0.5,)}, "mean has 1 values, std 2, the input 2 channels; they must agree"),
        ({"input_size": (3, 4, 4)}, "mean has 2 values, std 2, the input 3 channels; they must agree"),
        ({"std": (0.5, 0.0)}, r"std must be above 0, got \[0\.5, 0\.0\]"),
        (
            {"num_classes": 1},
            "num_classes must be a whole number, at least 2, or 0 for a backbone .*, got 1",
        ),
    ],
)
def test_a_description_that_contradicts_itself_is_refused(changes, message):
    with pytest.raises(ModelError, match=message):
        own(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mean": 0.5}, r"mean must have a number for each channel, for example \(0\.5, 0\.5, 0\.5\), got 0\.5"),
        ({"mean": "0.5"}, "mean must have a number for each channel, .* got '0.5'"),
        ({"mean": (True, False)}, "mean must have a number for each channel"),
        ({"mean": ()}, "mean must have a number for each channel"),
        (
            {"mean": (127, 127), "std": (128, 128)},
            r"mean is \[127.0, 127.0\], but it is that of pixels in 0..1, .* by 255",
        ),
        ({"std": (58.4, 57.1)}, r"std is \[58.4, 57.1\], but .* divide a mean and std of pixels in 0..255 by 255"),
        ({"mean": (-0.1, 0.5)}, "mean must be from 0 to 1"),
        ({"mean": (math.nan, 0.5)}, "mean must be from 0 to 1"),
        ({"std": (math.nan, 0.5)}, "std must be above 0"),
        ({"num_classes": True}, "num_classes must be a whole number, .* got True"),
        ({"num_classes": 3.0}, "num_classes must be a whole number, .* got 3.0"),
        ({"num_classes": "3"}, "num_classes must be a whole number, .* got '3'"),
        ({"num_classes": -1}, "num_classes must be a whole number, .* got -1"),
        ({"num_classes": 7}, "Linear: returns 3 logits, but the teacher's num_classes is 7; they must agree"),
        ({"input_size": 4}, r"input_size must be three whole numbers \(C, H, W\), got 4"),
        ({"input_size": (4, 4)}, r"input_size must be three whole numbers \(C, H, W\), got \(4, 4\)"),
        ({"input_size": (2, 4.0, 4)}, "input_size must be three whole numbers"),
        ({"input_size": (2, 0, 4)}, "input_size must be three whole numbers"),
        (
            {"input_size": (2, 4, 5)},
            r"Linear: cannot run on one image 2x4x5 \(RuntimeError: mat1 and mat2 .*of the input_size",
        ),
        ({"crop_pct": 87.5}, "crop_pct must be a share of the image such as 0.875, got 87.5"),
        ({"crop_pct": 0}, "crop_pct must be a share"),
        ({"crop_pct": True}, "crop_pct must be a share"),
        ({"interpolation": "cubic"}, "interpolation must be one of nearest, bilinear, .* got 'cubic'"),
        ({"crop_mode": "middle"}, "crop_mode must be one of center, squash, border, got 'middle'"),
        ({"name": 3}, "name must be a string, got 3"),
        ({"output": True}, "output must be the name or the position of a field, got True"),
    ],
    ids=str,
)
def test_a_value_that_cannot_be_right_is_refused(changes, message):
    with pytest.raises(ModelError, match=message) as refused:
        own(**changes)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("module", "message"),
    [
        ("vit", "module must be an nn.Module, got 'vit'"),
        (nn.Linear, "module must be an nn.Module, got the class Linear"),
        (nn.Linear(2, 2, device="meta"), "Linear: weight is on the meta device, without values"),
        (nn.LazyLinear(3), "weight: has no shape yet"),
    ],
)
def test_what_is_no_module_with_weights_is_refused(module, message):
    with pytest.raises(ModelError, match=message):
        Teacher(module, mean=(0.5,), std=(0.5,), num_classes=2, input_size=(1, 1, 2))


def test_values_of_numpy_torch_and_lists_are_a_description_too():
    teacher = own(mean=np.float32([0.5, 0.25]), std=torch.tensor([0.5, 0.25]), input_size=[2, 4, 4], crop_pct=1)
    assert (teacher.mean, teacher.std, teacher.input_size) == ((0.5, 0.25), (0.5, 0.25), (2, 4, 4))


@pytest.mark.parametrize(
    "name", ["vit_base_patch16_clip_224.openai", "tf_efficientnet_b0.in1k", "resnetv2_50.a1h_in1k"]
)
def test_the_descriptions_of_timm_are_accepted(name):
    config = timm.data.resolve_data_config({}, model=nn.Identity())
    config |= timm.get_pretrained_cfg(name).to_dict()
    described = {key: config[key] for key in ("mean", "std", "crop_pct", "crop_mode", "interpolation") if config[key]}
    module = nn.Sequential(nn.Flatten(), nn.Linear(48, 5))
    assert Teacher(module, num_classes=5, input_size=(3, 4, 4), **described).parameters == 245


# the forward pass that shows what the module returns


class Restless(nn.Module):
    """Changes its buffers, and draws random numbers, in each forward pass."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(4, 3)
        self.register_buffer("count", torch.zeros(()))
        self.register_buffer("wide", torch.ones(1).expand(3))
        self.register_buffer("last", None)

    def forward(self, images):
        self.count += 1
        self.wide = self.wide + 1
        return self.head(images.flatten(1)) + torch.rand(3)


def test_making_a_teacher_changes_neither_the_module_nor_the_random_state():
    module = Restless().train()
    module.head.eval()
    wide, before = module.wide, torch.get_rng_state()
    Teacher(module, mean=(0.5,), std=(0.5,), num_classes=3, input_size=(1, 2, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert (float(module.count), module.wide is wide, module.last) == (0.0, True, None)
    assert flags(module) == ([True, False], [True, True])
    assert module.head.weight.grad is None


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: not enough memory")])
def test_a_lack_of_memory_is_not_reported_as_a_wrong_description(error):
    class Full(Linear):
        def forward(self, images):
            raise error

    with pytest.raises(type(error)) as raised:
        Teacher(Full(), mean=(0.5, 0.5), std=(0.5, 0.5), num_classes=3, input_size=(2, 4, 4))
    assert raised.value is error


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
def test_a_module_in_another_precision_is_refused(dtype):
    with pytest.raises(ModelError, match=rf"has weights in {dtype}; give Teacher\(module.float\(\), \.\.\.\)"):
        Teacher(build("vit").to(getattr(torch, dtype)), mean=[0.5] * 3, std=[0.5] * 3, num_classes=10)


def test_pixels_are_normalised_channel_by_channel():
    teacher = own()
    pixels = torch.tensor([0.0, 1.0]).view(1, 2, 1, 1).expand(1, 2, 4, 4)
    normalised = teacher.normalise(pixels)
    # (0 - 0.5) / 0.5 and (1 - 0.25) / 0.2
    assert normalised[0, :, 0, 0].tolist() == pytest.approx([-1.0, 3.75])
    assert torch.allclose(teacher.denormalise(normalised), pixels)
    assert teacher.denormalise(normalised * 9)[0, :, 0, 0].tolist() == [0.0, 1.0]
    low, high = teacher.pixel_range(pixels)
    assert low.flatten().tolist() == pytest.approx([-1.0, -1.25])
    assert high.flatten().tolist() == pytest.approx([1.0, 3.75])


# modes and gradients


def flags(module):
    return [part.training for part in module.modules()], [p.requires_grad for p in module.parameters()]


@pytest.mark.parametrize("fails", [False, True])
def test_a_frozen_teacher_gets_its_modes_and_gradients_back(fails):
    teacher = own()
    teacher.module.train()
    teacher.module.head.eval()
    before = flags(teacher.module)
    assert before == ([True, False, True], [True, True, False, True])

    def use():
        with teacher.frozen() as module:
            assert flags(module) == ([False] * 3, [False] * 4)
            if fails:
                raise RuntimeError

    if fails:
        with pytest.raises(RuntimeError):
            use()
    else:
        use()
    assert flags(teacher.module) == before


def test_evaluation_mode_leaves_gradients_as_they_are():
    module = Linear().train()
    with evaluation_mode(module):
        assert flags(module) == ([False] * 3, [True, True, False, True])
    assert flags(module)[0] == [True] * 3


# the fingerprint


def test_the_fingerprint_follows_weights_architecture_and_input_description():
    torch.manual_seed(0)
    teacher = own()
    known = {teacher.fingerprint()}
    assert (
        Teacher(teacher.module, mean=teacher.mean, std=teacher.std, num_classes=3, input_size=(2, 4, 4)).fingerprint()
        in known
    )
    for change in ({"mean": (0.5, 0.3)}, {"crop_mode": "squash"}, {"interpolation": "bicubic"}):
        options = {"mean": teacher.mean, "std": teacher.std, "num_classes": 3, "input_size": (2, 4, 4)} | change
        known.add(Teacher(teacher.module, **options).fingerprint())
    with torch.no_grad():
        teacher.module.head.bias[1] += 1e-6
    known.add(teacher.fingerprint())
    teacher.module.norm.running_mean += 1e-3
    known.add(teacher.fingerprint())
    assert len(known) == 6


def test_the_fingerprint_follows_what_is_not_in_the_state_dict():
    class Extra(Linear):
        def __init__(self):
            super().__init__()
            self.extra = {"step": 1}

        def get_extra_state(self):
            return self.extra

    def printed(**changes):
        torch.manual_seed(0)
        module = Extra()
        module.register_buffer("made", torch.zeros(1).expand(3), persistent=False)
        module.register_state_dict_post_hook(lambda _, state, *__: state.clear())
        for name, value in changes.items():
            setattr(module, name, value)
        return Teacher(module, mean=(0, 0), std=(1, 1), num_classes=3, input_size=(2, 4, 4)).fingerprint()

    changes = [{}, {"made": torch.ones(3)}, {"extra": {"step": 2}}, {"extra": None}, {"extra": torch.ones(2)}]
    found = [printed(**change) for change in changes]
    assert found == [printed(**change) for change in changes]
    assert len(set(found)) == len(changes)
    with pytest.raises(ModelError, match=r"^Extra: get_extra_state returns a object that only pickle"):
        printed(extra=object())
    with pytest.raises(ModelError, match=r"^made: is sparse or quantized"):
        printed(made=torch.eye(3).to_sparse())


def test_two_depths_of_one_architecture_differ_in_fingerprint():
    shallow, deep = (Teacher(build("vit", depth=n), mean=[0] * 3, std=[1] * 3, num_classes=10) for n in (1, 2))
    assert shallow.fingerprint() != deep.fingerprint()
