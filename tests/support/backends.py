"""Teachers, images and back-ends for the tests of quantization: 32x32 colour images, ten classes."""

import timm
import torch

from spdfq.backends import Calibration, quantize
from spdfq.recipe import load_recipe
from spdfq.runtime import Runtime
from spdfq.runtime.files import read_tensors, write_tensors
from spdfq.teacher import Teacher
from support.networks import ARCHITECTURES, build

_EXPLICIT = {
    "cait": ("cait_xxs24_224", {"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "depth_token_only": 2}),
    "swinv2": (
        "swinv2_tiny_window8_256",
        {"patch_size": 4, "window_size": 4, "embed_dim": 16, "depths": (2, 2), "num_heads": (2, 2)},
    ),
}
FUSED, EXPLICIT = ARCHITECTURES, list(_EXPLICIT)
RUNTIME = Runtime(seed=3)
CALIBRATE = "quantization.steps=[{type='calibrate', observer='minmax', weight_observer='minmax'}]"
NO_OVERRIDES = "quantization.overrides=[]"
_RECIPE = {"extends": ["models/vit_fmnist", "images/gaussian_noise", "backends/blockwise"]}


def network(name, **changes):
    """The same weights each time."""
    if name in FUSED:
        return build(name, **changes)
    entrypoint, arguments = _EXPLICIT[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = timm.create_model(entrypoint, img_size=32, num_classes=10, **{**arguments, **changes}).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def teacher_of(module):
    classes = getattr(module, "num_classes", 10)
    return Teacher(module, mean=(0.5,) * 3, std=(0.5,) * 3, num_classes=classes, input_size=(3, 32, 32))


def teacher(name, **changes):
    return teacher_of(network(name, **changes))


def images(count=5, seed=0):
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


def back_end(*overrides):
    """The quantization section of the shipped back-end: min-max calibration of every site at 4 bits, and overrides."""
    return load_recipe(_RECIPE, [NO_OVERRIDES, CALIBRATE, *overrides]).quantization


def bits(number):
    """Overrides that set every bit-width."""
    return [f"quantization.{what}.bits={number}" for what in ("weights", "activations", "softmax")]


def quantized(name_or_teacher, *overrides, count=5):
    chosen = teacher(name_or_teacher) if isinstance(name_or_teacher, str) else name_or_teacher
    return quantize(chosen, images(count), back_end(*overrides), RUNTIME)


def taken(step, model, chosen, **changes):
    """The model after a step of the back-end."""
    step.run(model, Calibration(**{"teacher": chosen, "runtime": RUNTIME, **changes}))
    return model


def state_of(model):
    return {name: value.detach().clone() for name, value in model.tensors().items()}


def flatten_tensors(path):
    """Give the tensors of a state file other shapes, and leave its metadata as they are."""
    tensors, metadata = read_tensors(path, "")
    write_tensors(path, {name: value.flatten() for name, value in tensors.items()}, metadata)


class Interrupted(Exception):
    """What tests raise in the middle of a step."""
