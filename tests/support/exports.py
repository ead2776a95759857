"""Exported files and what they compute."""

from functools import cache

import torch
from torch.onnx._internal.exporter import _registration

import spdfq
from spdfq.exporters.export import exporter_named
from spdfq.exporters.products import quantized_products
from support.backends import bits

# for each export torch reads the source code of the same 500 functions again, which takes a third of a second
_registration.onnxscript_apis.get_torchlib_ops = cache(_registration.onnxscript_apis.get_torchlib_ops)

UNIFORM = "quantization.softmax={type='uniform', bits=8}"
W8A8 = [*bits(8), UNIFORM]


def opened(exported):
    """The file in its first runtime."""
    return exporter_named(exported.format).runtimes()[0](exported.path)


def exported(model, teacher, folder, format="onnx", **options):
    return spdfq.export(model, teacher, folder / f"model.{format}", format=format, **options)


@torch.no_grad()
def agreement(file, model, images):
    """Share of the images with the same first class."""
    return float((file(images).argmax(1) == model(images).argmax(1)).float().mean())


def all_integers(file, model, teacher, constant=0):
    """Whether each quantized product of a model is an integer kernel of the file, and nothing else multiplies."""
    return file.float_products == [] and file.integer_products == quantized_products(model, teacher) - constant
