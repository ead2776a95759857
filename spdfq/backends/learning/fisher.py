"""The importance of each output value of a block: its squared gradient, the diagonal of the Fisher information."""

from typing import Any

import torch
from torch import Tensor, nn

from spdfq.backends.blocks import BlockCall, Hidden, tensors_of, with_tensors
from spdfq.backends.divergence import divergence
from spdfq.quantized.model import QuantizedModel
from spdfq.quantized.visiting import Visit
from spdfq.runtime.shared_modules import own_hooks


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

    The network is quantized up to and including the block, and in float after it. So the divergence is the effect of
    the quantization so far.

    Args:
        teacher: the float network.
        model: the quantized model.
        call: of the block.
        images: ``[n, C, H, W]``.
        batch: images per forward pass.
        quantized: quantizes the sites up to the block.
        headless: see `divergence`.
    """
    parts = [_gradients(teacher, model, call, part, quantized, headless) for part in images.split(batch)]
    joined = tuple(torch.cat(column).square_() for column in zip(*parts, strict=True))
    mean = sum(float(tensor.sum()) for tensor in joined) / sum(tensor.numel() for tensor in joined)
    # if no value changes the output, all are equally important
    return tuple(tensor / mean if mean else torch.ones_like(tensor) for tensor in joined)


def _gradients(
    teacher: nn.Module, model: QuantizedModel, call: BlockCall, images: Tensor, quantized: Visit, headless: bool
) -> Hidden:
    """Gradients of the summed divergence at the streams that the block returns.

    A hook detaches the block's output, so that the output becomes a leaf of the computation graph and the graph starts
    there.
    """
    leaves: list[Tensor] = []

    def detach_output(_: nn.Module, __: Any, output: Any) -> Any:
        if leaves:  # a later call of the same block
            return output
        output, leaves[:] = _with_leaves(output, call)
        return output

    def quantize_up_to_block(name: str, kind: str, tensor: Tensor) -> Tensor:
        return tensor if leaves else quantized(name, kind, tensor)

    with torch.no_grad():
        wanted = teacher(images)
    block = model.network.get_submodule(call.name)
    hook = own_hooks([(block.register_forward_hook, detach_output)])
    with hook, torch.enable_grad(), model.visiting(quantize_up_to_block):
        logits = model.network(images)
    # summed, not averaged: the gradient of an image must not depend on the batch size
    total = divergence(logits, wanted, headless).sum()
    # zero for what the network does not use, such as the attention weights that a block returns too
    gradients = torch.autograd.grad(total, leaves, materialize_grads=True)
    return tuple(tensor.movedim(axis, 0) for tensor, axis in zip(gradients, call.returned.values(), strict=True))


def _with_leaves(output: Any, call: BlockCall) -> tuple[Any, list[Tensor]]:
    """A block's output with its streams replaced by leaves, and the leaves."""
    tensors = tensors_of(output)
    leaves = {index: tensors[index].detach().requires_grad_() for index in call.returned}
    return with_tensors(output, leaves), list(leaves.values())
