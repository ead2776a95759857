"""How far a model's output is from the teacher's."""

import torch.nn.functional as F
from torch import Tensor


def divergence(output: Tensor, target: Tensor, headless: bool = False) -> Tensor:
    """How far outputs are from the teacher's, ``[B]``.

    Args:
        output: ``[B, C]``.
        target: the teacher's, ``[B, C]``.
        headless: they are features and no logits: the squared difference over the teacher's own square, not the KL
            divergence of the softmax, which sees no shift of all features.
    """
    output, target = output.float(), target.float()
    if headless:
        return (output - target).square().sum(-1) / target.square().sum(-1).clamp(min=1e-12)
    return F.kl_div(output.log_softmax(-1), target.log_softmax(-1), log_target=True, reduction="none").sum(-1)
