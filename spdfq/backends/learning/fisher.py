"""How much each value a block puts out matters to the network's output: squared gradients, the Fisher's diagonal."""

from typing import Any

import torch
from torch import Tensor, nn

from spdfq.backends.learning.blocks import BlockCall, Hidden
from spdfq.backends.learning.divergence import divergence
from spdfq.quantized.model import QuantizedModel
from spdfq.quantized.products import Visit


def squared_gradients(
    teacher: nn.Module,
    model: QuantizedModel,
    call: BlockCall,
    images: Tensor,
    batch: int,
    quantized: Visit,
    headless: bool = False,
) -> Hidden:
    """Squared gradients of the divergence from the teacher at a block's output, with mean 1 (BRECQ, 2102.05426).

    The network is quantized up to the block and float behind it, so the gradient is of what quantization did so far.

    Args:
        teacher: the float network.
        model: the quantized model.
        call: of the block.
        images: ``[n, C, H, W]``.
        batch: images per forward pass.
        quantized: how the sites up to the block are quantized.
        headless: see `divergence`.
    """
    parts = [_gradients(teacher, model, call, part, quantized, headless) for part in images.split(batch)]
    joined = tuple(torch.cat(column).square_() for column in zip(*parts, strict=True))
    mean = sum(float(tensor.sum()) for tensor in joined) / sum(tensor.numel() for tensor in joined)
    # where nothing changes the output, everything matters alike
    return tuple(tensor / mean if mean else torch.ones_like(tensor) for tensor in joined)


def _gradients(
    teacher: nn.Module, model: QuantizedModel, call: BlockCall, images: Tensor, quantized: Visit, headless: bool
) -> Hidden:
    found: list[Tensor] = []

    def behind(_: nn.Module, __: Any, output: Any) -> Any:
        if found:
            return output
        tensors = [output] if isinstance(output, Tensor) else list(output)
        places = [index for index, item in enumerate(tensors) if isinstance(item, Tensor)]
        for place in (places[index] for index in call.returned):
            tensors[place] = tensors[place].detach().requires_grad_()
            found.append(tensors[place])
        return tensors[0] if isinstance(output, Tensor) else type(output)(tensors)

    def visit(name: str, kind: str, tensor: Tensor) -> Tensor:
        return tensor if found else quantized(name, kind, tensor)

    with torch.no_grad():
        wanted = teacher(images)
    handle = model.network.get_submodule(call.name).register_forward_hook(behind)
    try:
        with torch.enable_grad(), model.visiting(visit):
            logits = model.network(images)
    finally:
        handle.remove()
    # each image by itself: a mean would scale with the batch
    return torch.autograd.grad(divergence(logits, wanted, headless).sum(), found)
