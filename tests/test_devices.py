"""Nothing of synthesis or quantization is left on the CPU when the model is elsewhere: on a real GPU, or on none."""

from contextlib import nullcontext

import pytest
import torch
from support.networks import build
from support.second_device import second_device

from spdfq.api import make_images
from spdfq.backends import quantize
from spdfq.recipe import load_recipe, shipped
from spdfq.registry import observers, quantizers
from spdfq.runtime import Runtime
from spdfq.teacher import Teacher

DEVICES = ["simulated"]
if torch.cuda.is_available():
    DEVICES.append(pytest.param("cuda", marks=pytest.mark.gpu))
PARTS_OF_OTHERS = {
    "images/psaq_vit_v2",
    "images/spdfq_psaq",
    "images/spdfq_swin",
    "backends/plus",
    "backends/three_stage",
}
IMAGES, BACKENDS = (
    [name for name in shipped() if name.startswith(kind) and name not in PARTS_OF_OTHERS and "real" not in name]
    for kind in ("images/", "backends/")
)
WINDOWED = ["images/spdfq_swin", "images/psaq_vit"]


def teacher(architecture="vit"):
    depth = {"depths": (1, 1)} if architecture == "swin" else {"depth": 1}
    return Teacher(build(architecture, **depth), mean=[0.5] * 3, std=[0.5] * 3, num_classes=10, input_size=(3, 32, 32))


def recipe(images, backend):
    chosen = load_recipe({"extends": ["models/vit_fmnist", images, backend]}, ["synthesis.images=2"])
    steps = list(enumerate(chosen.quantization.steps))
    changes = [f"quantization.steps.{index}.iterations=2" for index, step in steps if hasattr(step, "iterations")]
    for index, step in steps:  # the others search long; each has its test below
        names = [name for name in ("observer", "weight_observer") if hasattr(step, name)]
        changes += [f"quantization.steps.{index}.{name}='minmax'" for name in names]
    if hasattr(chosen.synthesis, "iterations"):
        changes.append("synthesis.iterations=2")
        changes += ["synthesis.pruning.at=[1]"] if chosen.synthesis.pruning else []
        changes += ["synthesis.student.recalibrate=1"] if chosen.synthesis.student else []
    return load_recipe(chosen, changes)


@pytest.fixture(params=DEVICES)
def elsewhere(request):
    """A context that gives a device other than the CPU."""
    return second_device if request.param == "simulated" else lambda: nullcontext(torch.device("cuda"))


def both(work, elsewhere, architecture="vit"):
    """What ``work(teacher, runtime)`` gives on the CPU and elsewhere."""
    plain = work(teacher(architecture), Runtime())
    with elsewhere() as device:
        moved = teacher(architecture)
        moved.module.to(device)
        return plain, work(moved, Runtime(device=device))


def test_the_simulated_device_refuses_what_a_real_one_would(elsewhere):
    x = torch.ones(3)
    with elsewhere() as device:
        there = x.to(device)
        device = there.device  # with its index
        assert (there + 1).device == device
        assert (there * torch.tensor(2.0)).sum().item() == 6
        assert torch.tensor([1, 2], device=device).device == device
        assert there[torch.tensor([0])].device == device
        assert torch.rand(2, generator=torch.Generator(device).manual_seed(7), device=device).device == device
        for wrong in (
            lambda: there + x,
            lambda: x[there.long()],
            lambda: torch.rand(2, generator=torch.Generator().manual_seed(8), device=device),
        ):
            with pytest.raises(RuntimeError, match=r"device|generator"):
                wrong()


@pytest.mark.parametrize(
    ("name", "architecture"), [*((name, "vit") for name in IMAGES), *((name, "swin") for name in WINDOWED)]
)
def test_images_are_made_where_the_model_is(name, architecture, elsewhere):
    chosen = recipe(name, "backends/minmax")
    plain, there = both(lambda teacher, runtime: make_images(chosen, teacher, runtime).images, elsewhere, architecture)
    assert type(there) is torch.Tensor
    assert there.shape == plain.shape
    assert there.isfinite().all()
    assert (there - plain).abs().median() < 1e-3  # the first step of Adam turns a rounding error into a whole step


@pytest.mark.parametrize(
    ("kind", "observer"),
    [*((kind, "percentile_mse") for kind in quantizers.names()), *(("uniform", name) for name in observers.names())],
)
def test_ranges_and_codes_are_where_the_values_are(kind, observer, elsewhere, monkeypatch):
    monkeypatch.setattr("spdfq.quantizers.AdaptiveLogQuantizer.choices", range(35, 40))
    x = torch.rand(40, 6, generator=torch.Generator().manual_seed(0))

    def work(values):
        quantizer = quantizers.get(kind)(bits=4)
        quantizer.observe(values)
        quantizer.freeze(observers.get(observer)())
        assert torch.equal(quantizer.decode(quantizer.codes(values)).cpu(), quantizer(values).cpu())
        return quantizer(values).cpu()

    plain = work(x)
    with elsewhere() as device:
        same = torch.isclose(work(x.to(device)), plain)
    assert same.float().mean() > 0.98  # a rounding error of another kernel may take a value over the edge of a code


@pytest.mark.parametrize(("name", "architecture"), [*((name, "vit") for name in BACKENDS), ("backends/ptf", "swin")])
def test_a_model_is_quantized_where_it_is(name, architecture, elsewhere, monkeypatch):
    monkeypatch.setattr("spdfq.quantizers.AdaptiveLogQuantizer.choices", range(35, 40))
    chosen, images = recipe("images/gaussian_noise", name), torch.randn(2, 3, 32, 32)

    def work(teacher, runtime):
        model = quantize(teacher, images, chosen.quantization, runtime)
        with torch.no_grad():
            return model(images.to(runtime.device)).cpu()

    plain, there = both(work, elsewhere, architecture)
    assert there.shape == plain.shape
    assert there.isfinite().all()
