"""Evenly spaced values."""

from functools import cache
from typing import Any, ClassVar, Literal

import torch
from attrs import Attribute, define, field
from torch import Tensor

from spdfq.quantizers.base import Parameters, Quantizer, bounded, straight_through
from spdfq.quantizers.lookup import in_reach, layout, pieces
from spdfq.registry import quantizers

FLOAT = torch.finfo(torch.float32)
# beyond it a code times the scale could overflow
LARGEST = FLOAT.max / 4


def usable(scale: Tensor) -> Tensor:
    """The scale, or 1 where it is no normal number."""
    # subnormal numbers are flushed to zero on some devices, and x / 0 is no code
    return torch.where(scale < FLOAT.tiny, 1.0, scale)


def check_granularity(_: Any, attribute: "Attribute[str]", value: str) -> None:
    """Attrs validator for what shares one scale."""
    if value not in ("tensor", "channel"):
        raise ValueError(f'{attribute.name} must be "tensor" or "channel", not {value!r}')


def check_flag(_: Any, attribute: "Attribute[bool]", value: bool) -> None:
    """Attrs validator for true or false."""
    if not isinstance(value, bool):
        raise ValueError(f"{attribute.name} must be true or false, not {value!r}")


def check_axis(_: Any, attribute: "Attribute[int]", value: int) -> None:
    """Attrs validator for an axis, counted from either end."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError(f"{attribute.name} must be a whole number such as 0 or -1, not {value!r}")


@define(eq=False, slots=False, kw_only=True)
class AffineQuantizer(Quantizer):
    """Base class: evenly spaced values, ``s * (clamp(round(x / s) + z, 0, n - 1) - z)``.

    A child says in `step` what s and z are. The gradient to x is 1 where the rounded value has a code and 0 where it is
    clamped; where s wants a gradient, it gets that of LSQ (arXiv:1902.08153).

    Args:
        bits: width of a code in bits, 2 to 8.
    """

    stores: ClassVar[dict[str, torch.dtype]] = {"scale": torch.float32, "zero_point": torch.uint8}
    integers: ClassVar[str] = "yes"

    def step(self, parameters: Parameters) -> Parameters:
        """Scale and zero point of each value; here the stored ones."""
        return parameters

    def encode(self, x: Tensor, parameters: Parameters) -> Tensor:
        """Codes of float32 ``x``: ``clamp(round(x / s) + z, 0, n - 1)``."""
        step = self.step(parameters)
        # x / s may overflow; whatever exceeds n steps is clamped below anyway, with the same zero gradient
        steps = (x / step["scale"]).clamp(-self.levels, self.levels)
        return bounded(straight_through(steps, steps.round()) + step["zero_point"], 0, self.levels - 1)

    def reconstruct(self, codes: Tensor, parameters: Parameters) -> Tensor:
        """Values of float32 ``codes``: ``(codes - z) * s``."""
        step = self.step(parameters)
        return (codes - step["zero_point"]) * step["scale"]

    def dequantized(self, x: Tensor, parameters: Parameters) -> Tensor:
        """``reconstruct(encode(x))``, to the bit, in few passes over memory: reconstruction lives in here."""
        step = self.step(parameters)
        if step["scale"].requires_grad:
            return super().dequantized(x, parameters)
        result: Tensor
        if in_reach(x) and (zero_point := _shared(step["zero_point"])) is not None:
            low, trained = -zero_point, x.requires_grad and torch.is_grad_enabled()
            result = _FakeQuantizeWithoutMask.apply(x, step["scale"], low, low + self.levels - 1, trained)
        else:
            result = _FakeQuantize.apply(x, step["scale"], step["zero_point"], self.levels)
        return result


@quantizers.register("uniform", paper="arXiv:1712.05877")
@define(eq=False, slots=False, kw_only=True)
class UniformQuantizer(AffineQuantizer):
    """Evenly spaced values: ``s * (clamp(round(x / s) + z, 0, n - 1) - z)`` with ``n = 2**bits``.

    Stores ``scale`` (s, float32) and ``zero_point`` (z, uint8), ``[]`` per tensor or ``[C]`` per channel. Zero is
    always a value. Asymmetric: the range is extended to contain zero, ``s = (high - low) / (n - 1)``,
    ``z = round(-low / s)``; rounding z moves both ends of the grid by up to half a step. Symmetric: ``z = n / 2``,
    ``s = max(|low|, |high|) / (n / 2 - 1)``. In both, a value inside the range is off by half a step at most, also at
    the ends. A range too small for a normal float32 step counts as zero and gets scale 1.

    The gradient to x is 1 where the rounded value has a code and 0 where it is clamped.

    Paper: Jacob et al., arXiv:1712.05877, section 2.1.

    Args:
        bits: width of a code in bits, 2 to 8.
        symmetric: put zero in the middle of the codes; for weights.
        granularity: what shares one scale, the whole "tensor" or each "channel".
        axis: the channel axis where granularity is "channel", 0 for the output channels of weights.
    """

    symmetric: bool = field(default=False, validator=check_flag)
    granularity: Literal["tensor", "channel"] = field(default="tensor", validator=check_granularity)
    axis: int = field(default=0, validator=check_axis)

    @property
    def one_ended(self) -> bool:
        """Whether only the end of larger magnitude counts."""
        return self.symmetric

    @property
    def channel_axis(self) -> int | None:
        """The channel axis, or None per tensor."""
        return self.axis if self.granularity == "channel" else None

    def fitted(self, low: Tensor, high: Tensor) -> Parameters:
        """Scale and zero point for ranges ``low``, ``high`` float32 ``[C]``, extended to contain zero."""
        low, high = low.clamp(-LARGEST, 0.0), high.clamp(0.0, LARGEST)
        if self.symmetric:
            half = self.levels // 2
            scale = usable(torch.maximum(-low, high) / (half - 1))
            zero_point = torch.full_like(scale, half)
        else:
            scale = usable((high - low) / (self.levels - 1))
            zero_point = (-low / scale).round().clamp(0, self.levels - 1)
        return {"scale": scale, "zero_point": zero_point.to(torch.uint8)}


class _FakeQuantize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, zero_point: Tensor, levels: int) -> Tensor:
        rounded = (x / scale).round_().add_(zero_point)
        codes = rounded.clamp(0, levels - 1)
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward(rounded != codes)
        return codes.sub_(zero_point).mul_(scale)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        (clamped,) = ctx.saved_tensors
        return gradients[0].masked_fill(clamped, 0.0), None, None, None


def _shared(zero_point: Tensor) -> int | None:
    """The zero point that all channels share, if there is one."""
    low, high = zero_point.aminmax() if zero_point.numel() else (0, 1)
    return int(low) if low == high else None


class _FakeQuantizeWithoutMask(torch.autograd.Function):
    """The same to the bit, with one zero point, in less time: a mask costs more on a CPU than all the rest.

    For the gradient it keeps ``x / scale``: 4 bytes of each number instead of 1. At NaN the gradient may be 0 or pass.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, low: int, high: int, trained: bool) -> Tensor:
        steps = torch.empty_like(x, memory_format=layout(x))
        torch.div(x, scale, out=steps)
        values = torch.empty_like(steps) if trained else steps
        zero, factor = scale.new_zeros(()), 1.0 if scale.dim() else float(scale)
        for exact, value in pieces(steps, values):
            rounded = torch.round(exact, out=value).clamp_(low, high)
            torch.add(zero, rounded, alpha=factor, out=value)  # no zero is below zero, as decoding gives none
        if scale.dim():
            values.mul_(scale)
        if trained:
            ctx.ends = _rounded_to(low, -1), _rounded_to(high, 1)
            ctx.save_for_backward(steps)
        return values

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None, None]:
        (steps,) = ctx.saved_tensors
        return torch.ops.aten.hardtanh_backward(gradients[0], steps, *ctx.ends), None, None, None, None


@cache
def _rounded_to(whole: int, side: int) -> float:
    """The end, exclusive, on one side of the float32 numbers that are rounded to ``whole``; halves go to even ones."""
    half = torch.tensor(whole + side / 2)
    return float(half if whole % 2 else half.nextafter(torch.tensor(side * torch.inf)))
