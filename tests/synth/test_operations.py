"""How many operations an iteration of synthesis runs on a network with the topology of a ViT-B."""

import pytest
import timm
import torch
from support.operations import Operations

from spdfq.recipe import load_recipe
from spdfq.runtime import Runtime
from spdfq.synth.group import Group
from spdfq.synth.group_state import BALANCE_ITERATIONS
from spdfq.synth.loop import step
from spdfq.teacher import Teacher

# bare forward and backward passes take 278
BARS = {"spdfq": 600, "mimiq": 900, "psaq_vit": 900, "spdfq_plus": 1000}


@pytest.fixture(scope="module")
def teacher():
    """12 blocks of 12 heads; the number of operations depends neither on the width nor on the number of tokens."""
    network = timm.create_model("vit_base_patch16_224", img_size=64, embed_dim=48, num_classes=10)
    return Teacher(network, mean=[0.5] * 3, std=[0.5] * 3, num_classes=10, input_size=(3, 64, 64))


@pytest.mark.parametrize(("recipe", "most"), BARS.items())
def test_an_iteration_runs_few_operations(teacher, recipe, most):
    parts = ["models/vit_fmnist", f"images/{recipe}", "backends/minmax"]
    spec = load_recipe({"extends": parts}, ["synthesis.images=2"]).synthesis
    with teacher.frozen(), torch.random.fork_rng():
        group = Group(spec, teacher, Runtime(), 0, 2)
        for iteration in range(BALANCE_ITERATIONS):
            step([group], iteration)
        with Operations() as operations:
            step([group], BALANCE_ITERATIONS)
    assert operations.total <= most, operations.counts.most_common(20)
