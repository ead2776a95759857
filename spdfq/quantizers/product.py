"""A product as a function of one of its operands, so that a quantizer can be judged by the product's output."""

from collections.abc import Callable
from functools import cached_property

from attrs import define
from einops import rearrange
from torch import Tensor


@define(eq=False, slots=False)
class Product:
    """A product as a function of one operand, while the other operand stays as it is.

    Args:
        operand: the tensor to be quantized, of any shape.
        output: computes the product from a replacement of the operand.
        channels: the axis of the output that belongs to axis 0 of the operand; ``None`` where there is no such axis.
    """

    operand: Tensor
    output: Callable[[Tensor], Tensor]
    channels: int | None = None

    @cached_property
    def expected(self) -> Tensor:
        """The output for the float operand, float32."""
        return self.output(self.operand).float()

    def error(self, quantized: Tensor, channels: int | None) -> Tensor:
        """Mean squared error of the output, ``[1]``; or ``[channels]`` if asked for and the output has that axis."""
        square = (self.output(quantized.to(self.operand.dtype)).float() - self.expected).square()
        if channels is None or self.channels is None or square.shape[self.channels] != channels:
            return square.mean()[None]
        return rearrange(square.movedim(self.channels, 0), "channels ... -> channels (...)").mean(dim=1)
