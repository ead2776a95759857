"""The memory of a synthesis, predicted from a few images; and how many groups fit into a pass."""

import pytest
import torch
from attrs import evolve
from support.networks import build
from support.teachers import RUNTIME, recipe, tiny_teacher

from spdfq.recipe import load_recipe
from spdfq.runtime.peak_memory import TensorMemory
from spdfq.runtime.ranks import Ranks
from spdfq.synth import memory
from spdfq.synth.memory import MemoryForecast, forecast, groups_together
from spdfq.teacher import Teacher


def teacher():
    return Teacher(build("vit", depth=1), mean=[0.5] * 3, std=[0.5] * 3, num_classes=10)


def spec(name, **changes):
    parts = ["models/vit_fmnist", f"images/{name}", "backends/minmax"]
    return evolve(load_recipe({"extends": parts}).synthesis, iterations=1, **changes)


@pytest.mark.parametrize(("name", "together"), [("mimiq", 1), ("spdfq", 3), ("psaq_vit", 3), ("smi", 1)])
def test_the_prediction_is_within_a_fifth_of_what_a_run_holds(name, together):
    chosen, own = spec(name, images=24, group=8, groups_per_pass=together), teacher()
    with own.frozen():
        found = forecast(chosen, own, RUNTIME)
    with TensorMemory(torch.device("cpu"), own.module.parameters()) as held:
        chosen.synthesize(own, RUNTIME)
    assert found.weights == sum(4 * weight.numel() for weight in own.module.parameters())
    assert 0.8 < found.needed(together) / (found.weights + held.peak) < 1.2


def test_the_memory_of_a_pass_is_that_of_its_groups_beside_the_finished_images():
    found = MemoryForecast(weights=100, images=30, fixed=10, group=20)
    assert found.needed(1) == 100 + 30 + 10 + 20
    assert found.needed(3) == 100 + 30 + 10 + 60
    assert evolve(found, images=200).needed(3) == 100 + 2 * 200  # when they are joined
    assert found.fitting(free=150) == 4  # 0.8 * 150 - 30 - 10 = 80
    assert found.fitting(free=50) == 1


# the number of groups


def predicted(chosen):
    own = tiny_teacher()
    with own.frozen():
        return forecast(chosen, own, RUNTIME)


@pytest.fixture
def free(monkeypatch):
    """Sets how many bytes are free, and gives the groups in a pass and the lines that are announced."""

    def found(bytes_, ranks=1, **changes):
        lines, own = [], tiny_teacher()
        monkeypatch.setattr(memory, "free_memory", lambda device: bytes_)
        runtime = evolve(RUNTIME, announce=lines.append, ranks=Ranks(0, ranks))
        with own.frozen():
            return groups_together(recipe(**{"images": 40, "groups_per_pass": "auto", **changes}), own, runtime), lines

    return found


def test_auto_takes_what_fits_and_says_what_it_needs(free):
    found = predicted(recipe(images=40))
    groups, lines = free(found.group * 5 / 0.8)
    assert groups == 4  # of 5, some memory is for the images
    assert lines == [f"synthesis: about {found.needed(4) / 1e6:.0f} MB of memory for tensors, 4 groups in each pass"]


@pytest.mark.parametrize(
    ("bytes_", "changes", "groups"),
    [
        (0, {}, 1),
        (None, {}, 1),
        (2**50, {}, 20),  # all of them
        (2**50, {"images": 400}, 32),  # 64 images: more are no faster on a CPU
        (2**50, {"images": 400, "group": 100}, 1),
        (0, {"groups_per_pass": 3}, 3),
    ],
)
def test_there_is_at_least_one_group_and_never_more_than_help(bytes_, changes, groups, free):
    found, lines = free(bytes_, **changes)
    assert found == groups
    (line,) = lines
    assert line.startswith("synthesis: about ")
    assert ("groups in each pass" in line) == (groups > 1)


def test_processes_share_the_memory_of_a_cpu(free):
    found = predicted(recipe(images=40))
    assert free(found.group * 12 / 0.8)[0] == 11
    assert free(found.group * 12 / 0.8, ranks=2)[0] == 5
    assert free(2**50, ranks=4)[0] == 5  # of 20 groups


def test_nothing_is_measured_if_nobody_listens(monkeypatch):
    monkeypatch.setattr(memory, "forecast", None)
    assert groups_together(recipe(groups_per_pass=3), tiny_teacher(), RUNTIME) == 3
