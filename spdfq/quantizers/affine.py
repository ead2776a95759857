"""The base class of quantizers with evenly spaced values."""

from typing import Any, ClassVar

import torch
from attrs import define
from torch import Tensor

from spdfq.quantizers.base import Parameters, Quantizer, bounded, straight_through
from spdfq.quantizers.remembered import Remembered, is_traced

_FLOAT = torch.finfo(torch.float32)
# beyond it a code times the scale could overflow
LARGEST = _FLOAT.max / 4


def usable_scale(scale: Tensor) -> Tensor:
    """The scale, or 1 where it is too small to be a normal float32 number."""
    # some devices flush subnormal numbers to zero, and x / 0 has no code
    return torch.where(scale < _FLOAT.tiny, 1.0, scale)


@define(eq=False, slots=False, kw_only=True)
class AffineQuantizer(Quantizer):
    """Base class: evenly spaced values, ``s * (clamp(round(x / s) + z, 0, n - 1) - z)``.

    A child class defines s and z in `step`. The gradient to x is 1 where the rounded value has a code and 0 where it is
    clamped. If s requires a gradient, it gets that of LSQ (arXiv:1902.08153).

    Args:
        bits: width of a code in bits, 2 to 8.
    """

    stores: ClassVar[dict[str, torch.dtype]] = {"scale": torch.float32, "zero_point": torch.uint8}
    integers: ClassVar[str] = "yes"

    def __attrs_pre_init__(self) -> None:
        super().__attrs_pre_init__()
        self._remembered_ends: Remembered[tuple[float, float]] = Remembered()

    def dtype_of(self, name: str) -> torch.dtype:
        """The dtype of a stored tensor; a zero point has that of codes."""
        return self.code_dtype if name == "zero_point" else super().dtype_of(name)

    def step(self, parameters: Parameters) -> Parameters:
        """``scale`` and ``zero_point`` of each value; here the stored ones."""
        return parameters

    def encode(self, x: Tensor, parameters: Parameters) -> Tensor:
        """Codes of float32 ``x``: ``clamp(round(x / s) + z, 0, n - 1)``."""
        step = self.step(parameters)
        # x / s may overflow; what exceeds n steps is clamped anyway, and its gradient is zero either way
        steps = (x / step["scale"]).clamp(-self.levels, self.levels)
        return bounded(straight_through(steps, steps.round()) + step["zero_point"], 0, self.levels - 1)

    def reconstruct(self, codes: Tensor, parameters: Parameters) -> Tensor:
        """Values of float32 ``codes``: ``(codes - z) * s``."""
        step = self.step(parameters)
        return (codes - step["zero_point"]) * step["scale"]

    def dequantized(self, x: Tensor, parameters: Parameters) -> Tensor:
        """``reconstruct(encode(x))``, bit for bit, in fewer passes over memory."""
        step = self.step(parameters)
        learned = torch.is_grad_enabled() and (x.requires_grad or step["scale"].requires_grad)
        if not learned and (ends := self._ends(step["zero_point"])):
            # adding zero turns -0 into 0, the value of its code
            return (x / step["scale"]).round_().add_(0.0).clamp_(*ends).mul_(step["scale"])
        result: Tensor = _FakeQuantizeAffine.apply(x, step["scale"], step["zero_point"], self.levels)
        return result

    def _ends(self, zero_point: Tensor) -> tuple[float, float] | None:
        """The first and the last code without the zero point, if it is one frozen number that may be read."""
        if zero_point is not self._buffers["zero_point"] or zero_point.dim() or is_traced():
            return None
        return self._remembered_ends.of([zero_point], lambda: self._read_ends(float(zero_point)))

    def _read_ends(self, zero_point: float) -> tuple[float, float]:
        return 0.0 - zero_point, self.levels - 1 - zero_point


class _FakeQuantizeAffine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, zero_point: Tensor, levels: int) -> Tensor:
        rounded = (x / scale).round_().add_(zero_point)
        if not any(ctx.needs_input_grad):
            return rounded.clamp_(0, levels - 1).sub_(zero_point).mul_(scale)  # in place: a new tensor costs as much
        ctx.levels = levels
        codes = rounded.clamp(0, levels - 1).sub_(zero_point)
        # a mask would be smaller than the rounded numbers, but making and using it takes longer
        if not ctx.needs_input_grad[1]:
            ctx.save_for_backward(rounded)
            return codes.mul_(scale)
        ctx.save_for_backward(rounded, x, scale, codes)
        return codes * scale

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        rounded, *others = ctx.saved_tensors
        # passes the gradient strictly between the two bounds: where the rounded value is a code
        passed = torch.ops.aten.hardtanh_backward(gradients[0], rounded, -0.5, ctx.levels - 0.5)
        return passed, _gradient_of_scale(gradients[0], passed, *others) if others else None, None, None


def _gradient_of_scale(gradient: Tensor, passed: Tensor, x: Tensor, scale: Tensor, codes: Tensor) -> Tensor:
    """LSQ's gradient, ``(code - z) - x / s`` for a rounded value and ``code - z`` for a clamped one, summed."""
    if scale.dim():
        return (gradient * codes - passed * x / scale).sum_to_size(scale.shape)
    # two products of vectors write no tensor
    pairs = ((gradient, codes), (passed, x))
    of_codes, of_x = (torch.dot(left.reshape(-1), right.reshape(-1)) for left, right in pairs)
    return of_codes - of_x / scale
