"""Between two checks, a synthesis neither copies to or from the device nor waits for it."""

from functools import cache

import pytest
import torch
from support.networks import build
from support.second_device import second_device, transfers

from spdfq.api import make_images
from spdfq.recipe import load_recipe, shipped
from spdfq.runtime import Runtime
from spdfq.synth import loop
from spdfq.synth.loop import CHECK_EVERY
from spdfq.teacher import Teacher

# one check lies between the iterations, and the recalibration of a student between two checks
ITERATIONS, RECALIBRATE = CHECK_EVERY + 5, CHECK_EVERY + 2
RARE = [
    "synthesis.sampler={type='multi_semantic', redraw=1}",
    "synthesis.augmentations=[{type='flip', per_image=true}, 'random_resized_crop', 'low_pass', 'high_pass']",
]


@cache
def recipe(name):
    changes = ["synthesis.images=2"]
    loaded = load_recipe({"extends": ["models/vit_fmnist", name, "backends/minmax"]}, changes)
    if not hasattr(loaded.synthesis, "iterations"):
        return None
    changes = [f"synthesis.iterations={ITERATIONS}"]
    changes += ["synthesis.pruning.at=[3,12]"] if loaded.synthesis.pruning else []
    changes += [f"synthesis.student.recalibrate={RECALIBRATE}"] if loaded.synthesis.student else []
    return load_recipe(loaded, changes)


RECIPES = [name for name in shipped() if name.startswith("images/") and recipe(name)]


def counted(recipe, monkeypatch, architecture="vit"):
    """What was copied and waited for in each iteration."""
    step, seen = loop.step, {}

    def watched(groups, iteration):
        with transfers() as counter:
            step(groups, iteration)
        seen[iteration] = dict(counter)

    monkeypatch.setattr(loop, "step", watched)
    depth = {"depths": (1, 1)} if architecture == "swin" else {"depth": 1}
    with second_device() as device:
        network = build(architecture, **depth).to(device)
        there = Teacher(network, mean=[0.5] * 3, std=[0.5] * 3, num_classes=10, input_size=(3, 32, 32))
        make_images(recipe, there, Runtime(device=device))
    assert list(seen) == list(range(ITERATIONS))
    return seen


@pytest.mark.parametrize(
    ("does", "event"),
    {
        "copies": (lambda x: torch.ones(3).to(x.device), "copy to the device"),
        "makes": (lambda x: torch.tensor([1, 2], device=x.device), "copy to the device"),
        "indexes": (lambda x: x[torch.tensor([0])], "copy to the device: index"),
        "returns": (lambda x: x.cpu(), "copy from the device"),
        "reads": (lambda x: float(x[0]), "wait: _local_scalar_dense"),
        "decides": (lambda x: bool((x > 0).all()), "wait: _local_scalar_dense"),
        "lists": (lambda x: x.tolist(), "wait: tolist"),
        "selects": (lambda x: x[x > 0], "wait: boolean index"),
        "finds": (lambda x: x.nonzero(), "wait: nonzero"),
    }.values(),
)
def test_copies_and_waits_are_counted(does, event):
    with second_device() as device:
        there = torch.ones(3).to(device)
        with transfers() as counter:
            (there + 1).sum().sqrt()
            assert not counter
            does(there)
    assert set(counter) == {event}


@pytest.mark.parametrize(
    ("name", "architecture"), [*((name, "vit") for name in RECIPES), ("images/spdfq_swin", "swin")]
)
def test_nothing_is_copied_between_two_checks(name, architecture, monkeypatch):
    seen = counted(recipe(name), monkeypatch, architecture)
    # makes the student, and draws the priors, whose shapes are those of the first forward pass
    del seen[0]
    if recipe(name).synthesis.student:
        # remains: an observer refuses values that are not finite, and a frozen zero point is read once
        assert set(seen.pop(RECALIBRATE)) == {"wait: _local_scalar_dense"}
    assert not any(seen.values()), seen


@pytest.mark.parametrize("together", [1, 2])
def test_nothing_is_copied_for_what_no_shipped_recipe_has(together, monkeypatch):
    changes = ["synthesis.group=1", f"synthesis.groups_per_pass={together}"] if together > 1 else []
    seen = counted(load_recipe(recipe("images/cross_entropy"), [*RARE, *changes]), monkeypatch)
    assert not any(seen.values()), seen
