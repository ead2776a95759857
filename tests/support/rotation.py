"""Helpers for the tests of the step `rotate`."""

import timm
import torch

from spdfq.backends import Rotate
from spdfq.quantized import place
from support.backends import back_end, images, taken, teacher_of

ROTATE = "quantization.steps=[{type='rotate'}, {type='calibrate', observer='minmax', weight_observer='minmax'}]"
SMALL = {"img_size": 32, "num_classes": 10, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}


def perturbed(module):
    """No weight is zero, and norms and LayerScales have channels of very different size."""
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return module.eval()


def built(network, *arguments, **options):
    """A teacher with fixed weights, none of them zero."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return teacher_of(perturbed(network(*arguments, **options)))


def of_timm(name, **changes):
    return built(timm.create_model, name, **{**SMALL, **changes})


def rotated(chosen, **options):
    """A placed model of the teacher after the step."""
    model = place(chosen, back_end())
    return taken(Rotate(**options), model, chosen, images=images(2))


@torch.no_grad()
def change(model, chosen):
    """The largest change of the output, relative to its maximum."""
    wanted = chosen.module(images(3))
    return float((model.network(images(3)) - wanted).abs().max() / wanted.abs().max())


def notes(model):
    return [note.removeprefix("rotate: ") for note in model.notes if note.startswith("rotate: ")]


def changed(model, chosen):
    """Names of the weights and biases that the step changed."""
    before, after = dict(chosen.module.named_parameters()), dict(model.network.named_parameters())
    return {name for name in before.keys() & after.keys() if not torch.equal(before[name], after[name])}
