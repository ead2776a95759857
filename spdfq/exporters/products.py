"""The products of a quantized model whose operands are both quantized."""

from collections.abc import Iterable

import torch

from spdfq.quantized.model import QuantizedModel
from spdfq.quantized.visiting import count_multiplications
from spdfq.teacher import Teacher

PART = "#"
"""In a file, stands between the name of a product and the number of a part of it that is a product of its own."""


def whole_products(names: Iterable[str]) -> list[str]:
    """The products with these names, in their order; the parts of a product are one."""
    found = {name.partition(PART)[0] if PART in name else index: name for index, name in enumerate(names)}
    return [name.partition(PART)[0] for name in found.values()]


def quantized_products(model: QuantizedModel, teacher: Teacher) -> int:
    """How many products of a forward pass have two quantized operands; those of files should be integer kernels.

    A product of a module that runs several times counts as often as it runs.
    """
    counted = model.multiplications
    if not counted:  # a checkpoint of an older version
        example = torch.zeros(1, *teacher.input_size, dtype=torch.float32, device=teacher.device)
        counted = count_multiplications(model.network, example)
    # an operand that is no site was quantized at an earlier one
    floating = model.sites.keys() - model.quantizers.keys()
    calls = {product.sites: product.calls for product in counted if product.sites}
    return sum(count for sites, count in calls.items() if not floating.intersection(sites))
