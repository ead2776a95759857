"""The products of a quantized model whose operands are both quantized."""

import torch

from spdfq.quantized.model import QuantizedModel
from spdfq.quantized.visiting import count_multiplications
from spdfq.teacher import Teacher


def quantized_products(model: QuantizedModel, teacher: Teacher) -> int:
    """How many products of a forward pass have two quantized operands; those of files should be integer kernels."""
    counted = model.multiplications
    if not counted:  # a checkpoint of an older version
        example = torch.zeros(1, *teacher.input_size, dtype=torch.float32, device=teacher.device)
        counted = count_multiplications(model.network, example)
    # an operand that is no site was quantized at an earlier one
    floating = model.sites.keys() - model.quantizers.keys()
    return len({product.sites for product in counted if product.sites and not floating.intersection(product.sites)})
