"""``runtime.compile``: the teacher's recorded pass as a compiled program, equal within a tolerance, or refused."""

import pytest
import torch
from attrs import evolve
from support.networks import build
from torch import nn

from spdfq.api import make_images
from spdfq.errors import SpdfqError
from spdfq.recipe import load_recipe
from spdfq.runtime import Runtime
from spdfq.synth import compiled
from spdfq.synth.compiled import CompiledPasses
from spdfq.teacher import Teacher

RUNTIME = Runtime()
COMPILED = evolve(RUNTIME, compile=True)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Makes the programs without the machine code, which takes a minute for each."""
    monkeypatch.setattr(compiled, "_BACKEND", "aot_eager")


def teacher(module=None):
    module = module or build("vit", depth=1)
    return Teacher(module, mean=[0.5] * 3, std=[0.5] * 3, num_classes=10, input_size=(3, 32, 32))


def recipe(name, *changes):
    parts = ["models/vit_fmnist", f"images/{name}", "backends/minmax"]
    return load_recipe({"extends": parts}, ["synthesis.images=2", "synthesis.iterations=2", *changes])


@pytest.mark.parametrize(
    ("name", "changes", "programs"),
    [
        ("psaq_vit", ("synthesis.group=1",), 1),  # two groups share a program
        ("mimiq", ("synthesis.group=1", "synthesis.groups_per_pass=2"), 1),  # and here a pass
        ("spdfq", ("synthesis.sampler.every=2",), 2),  # with crops and without
        ("smi", ("synthesis.pruning.at=[1]",), 2),  # with all patches and with some
        ("maskaq", (), 1),
    ],
)
def test_images_are_those_of_the_teacher_as_it_is_written(name, changes, programs, monkeypatch):
    made, compile_ = [], CompiledPasses._compiled
    monkeypatch.setattr(CompiledPasses, "_compiled", lambda *args: made.append(args) or compile_(*args))
    plain, found = (make_images(recipe(name, *changes), teacher(), runtime) for runtime in (RUNTIME, COMPILED))
    assert len(made) == programs
    assert (found.images - plain.images).abs().median() < 1e-4
    torch.testing.assert_close(found.curves[:, 0], plain.curves[:, 0], rtol=1e-4, atol=1e-4)


class Unusual(nn.Module):
    """A network with something that a compiled program cannot repeat."""

    def __init__(self, what):
        super().__init__()
        self.network, self.what = build("vit", depth=1), what

    def forward(self, images):
        logits = self.network(images)
        if torch.is_grad_enabled() and self.what == "decides":
            return logits if logits.sum().item() > 0 else 2 * logits
        if torch.is_grad_enabled() and self.what == "draws":
            return logits + torch.rand(10)
        return logits


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("decides", r"^runtime\.compile: Unusual cannot be compiled \(.+\); set runtime\.compile = false$"),
        ("draws", r"^runtime\.compile: the compiled Unusual differs by .* of the largest value; set runtime"),
    ],
)
def test_a_teacher_that_a_program_cannot_replace_is_refused(what, message):
    with pytest.raises(SpdfqError, match=message):
        make_images(recipe("cross_entropy"), teacher(Unusual(what)), COMPILED)
