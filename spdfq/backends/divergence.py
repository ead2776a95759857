"""The difference between the output of a model and that of the teacher."""

import torch.nn.functional as F
from torch import Tensor


def divergence(output: Tensor, target: Tensor, headless: bool = False) -> Tensor:
    """The difference of each image's output from the teacher's, ``[B]``: the KL divergence of the class probabilities.

    Args:
        output: ``[B, C]``.
        target: the teacher's output, ``[B, C]``.
        headless: the outputs are features, not logits. The difference is then the squared difference, relative to the
            square of the teacher's features: the softmax of the KL divergence would ignore a shift of all features.
    """
    output, target = output.float(), target.float()
    if headless:
        return (output - target).square().sum(-1) / target.square().sum(-1).clamp(min=1e-12)
    return F.kl_div(output.log_softmax(-1), target.log_softmax(-1), log_target=True, reduction="none").sum(-1)
