"""Teachers: any module can be one; its input, its modes and gradients, and its fingerprint."""

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
