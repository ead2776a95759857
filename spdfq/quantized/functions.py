"""The functions of PyTorch that `visiting` has to tell apart: which multiply, add, normalise or only move values."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PRODUCTS_WITH_WEIGHT = {
    *(F.linear, F.conv1d, F.conv2d, F.conv3d),
    *(F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d),
}
# the axis of the output that belongs to axis 0 of the weight
OUTPUT_CHANNELS = {F.linear: -1, F.conv1d: 1, F.conv2d: 1, F.conv3d: 1}
# products whose operands are not replaced
OTHER_PRODUCTS = {
    *(torch.mm, torch.mv, torch.dot, torch.inner, torch.tensordot, torch.chain_matmul, torch.linalg.multi_dot),
    *(torch.addmm, torch.addmv, torch.addbmm, torch.baddbmm),
    *(Tensor.mm, Tensor.mv, Tensor.dot, Tensor.inner, Tensor.__rmatmul__),
    *(Tensor.addmm, Tensor.addmv, Tensor.addbmm, Tensor.baddbmm),
    *(F.bilinear, torch.bilinear, torch.linalg.vecdot),
}
# the result has the values of the first argument, perhaps elsewhere, padded or in another dtype
MOVES = {
    *(F.dropout, torch.dropout, Tensor.to, Tensor.float, Tensor.type_as, Tensor.contiguous, Tensor.view),
    *(Tensor.reshape, Tensor.permute, Tensor.transpose, Tensor.flatten, Tensor.unsqueeze, Tensor.squeeze),
    *(torch.reshape, torch.permute, torch.transpose, torch.flatten, torch.unsqueeze, torch.squeeze),
    *(torch.roll, Tensor.roll, F.pad, Tensor.__getitem__),
}
NORMS = {F.layer_norm, torch.layer_norm, F.rms_norm, torch.rms_norm}
SUMS = {torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__}
SUMS_IN_PLACE = {Tensor.add_, Tensor.__iadd__}

_MULTIPLY_BY_WEIGHT = {nn.Linear.forward, nn.Conv2d.forward}
_MULTIPLY_NOTHING = {nn.LayerNorm.forward, nn.GELU.forward, nn.Dropout.forward, nn.Identity.forward}


def is_known_by_weight(module: nn.Module) -> bool:
    """Whether the only product of a module is that with its own parameter, so that no site is named after its call."""
    changed = "forward" in vars(module) or module._forward_hooks or module._forward_pre_hooks
    forward = type(module).forward
    multiplies = forward in _MULTIPLY_BY_WEIGHT and module._parameters.get("weight") is not None
    return not changed and (multiplies or forward in _MULTIPLY_NOTHING)
