"""Learning the scales of quantizers by gradient descent, as in LSQ."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import Tensor

from spdfq.errors import NonFiniteError
from spdfq.quantizers.base import Quantizer


@contextmanager
def learned_scales(quantizers: Iterable[Quantizer]) -> Iterator[list[Tensor]]:
    """Inside the ``with`` block, the scales of frozen quantizers are leaf tensors that collect gradients.

    For ``uniform`` the gradient to s is that of LSQ (arXiv:1902.08153, section 2): ``round(x / s) - x / s`` where x has
    a code, and the clamped code (without the zero point) elsewhere. LSQ also divides it by the root of the number of
    values times the number of codes, which makes no difference under Adam. The learned scales stay after the block.

    Args:
        quantizers: frozen ones.

    Raises:
        NonFiniteError: at the end of the block, a scale is not finite or not above 0.
    """
    owners = list(quantizers)
    scales = [quantizer.tensors()["scale"] for quantizer in owners]
    for scale in scales:
        scale.requires_grad_(True)
    try:
        yield scales
    finally:
        for scale in scales:
            scale.requires_grad_(False)
            scale.grad = None
    for owner, scale in zip(owners, scales, strict=True):
        if not bool((scale.isfinite() & (scale > 0)).all()):
            raise NonFiniteError(f"the learned scale of {owner} is no longer finite and above 0; try a lower lr")
