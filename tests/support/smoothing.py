"""Helpers for the tests of the step `smooth`."""

import torch

from spdfq.backends import Rotate, Smooth
from spdfq.quantized import place
from support.backends import back_end, images, taken

SMOOTH = "quantization.steps=[{type='smooth'}, {type='calibrate', observer='minmax', weight_observer='minmax'}]"


def smoothed(chosen, *lines, rotate=False, **options):
    """A placed model of the teacher after the step."""
    model = place(chosen, back_end(*lines))
    if rotate:
        taken(Rotate(), model, chosen, images=images(2))
    return taken(Smooth(**options), model, chosen, images=images(5))


def notes(model):
    return [note.removeprefix("smooth: ") for note in model.notes if note.startswith("smooth: ")]


def values_at(model, site, batch):
    """What the float network has at a site, ``[tokens, features]``."""
    seen = []

    def visit(name, _, tensor):
        if name == site:
            seen.append(tensor.flatten(0, -2))
        return tensor

    with torch.no_grad(), model.visiting(visit):
        model.network(batch)
    return torch.cat(seen)
