"""Models with a planted fault, and their diagnosis."""

import spdfq
from support.backends import back_end, bits, images

SITE = "blocks.1.mlp.fc1.input"
EIGHT = [*bits(8), "quantization.softmax={type='uniform', bits=8}"]


def rescaled(model, site, factor):
    """The model, with another scale at a site than the one that was calibrated."""
    quantizer = model.quantizers[site]
    tensors = {name: tensor.clone() for name, tensor in quantizer.tensors().items()}
    quantizer.restore(tensors | {"scale": tensors["scale"] * factor})
    return model


def diagnosis(model, chosen, *overrides, count=5, **options):
    return spdfq.diagnose(model, chosen, images(count), back_end(*overrides), **options)


def at(found, site):
    """The values of one site."""
    return next(each for each in found.values if each.site == site)
