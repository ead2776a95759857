"""What every quantizer shares: observing, freezing, its integers and its stored tensors."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from attrs import Attribute, define, field
from torch import Tensor, nn

from spdfq.errors import DataError, NonFiniteError, SpdfqError
from spdfq.quantizers.observers import MinMaxObserver, Observer, Statistics

Parameters = dict[str, Tensor]


def straight_through(smooth: Tensor, rounded: Tensor) -> Tensor:
    """The values of ``rounded`` (to the bit) with the gradient of ``smooth``."""
    # the bracket is exactly 0 for finite values, so no rounding error can move a code off its integer
    return rounded.detach() + (smooth - smooth.detach())


def bounded(x: Tensor, low: float, high: float) -> Tensor:
    """``x`` clamped, with gradient 1 from ``low`` to ``high`` inclusive and 0 outside."""
    # Tensor.clamp passes no gradient at the bounds themselves since torch 2.15, and the end codes lie on them
    return torch.where((x >= low) & (x <= high), x, x.detach().clamp(low, high))


def check_bits(_: Any, attribute: "Attribute[int]", value: int) -> None:
    """Attrs validator: a code fits one byte and there are values on both sides of zero."""
    if not isinstance(value, int) or isinstance(value, bool) or not 2 <= value <= 8:
        raise ValueError(f"{attribute.name} must be a whole number from 2 to 8, not {value!r}")


@define(eq=False, slots=False, kw_only=True)
class Quantizer(nn.Module, ABC):
    """Maps a tensor to one of ``2**bits`` values, with a straight-through gradient on the rounding alone.

    `observe` data, `freeze` the range, then call it. A child says in ``stores`` what a frozen one consists of, in
    ``signed`` whether it takes negative values, and gives three pure functions: `fitted`, `encode`, `reconstruct`.

    Args:
        bits: width of a code in bits, 2 to 8.
    """

    stores: ClassVar[dict[str, torch.dtype]] = {"scale": torch.float32}
    signed: ClassVar[bool] = True

    bits: int = field(default=4, validator=check_bits)

    def __attrs_pre_init__(self) -> None:
        super().__init__()
        self._statistics: Statistics | None = None
        for name in self.stores:
            self.register_buffer(name, None)

    @abstractmethod
    def fitted(self, low: Tensor, high: Tensor) -> Parameters:
        """The parameters for a range: ``low``, ``high`` float32 ``[C]`` -> the tensors of ``stores``, ``[C]`` each."""

    @abstractmethod
    def encode(self, x: Tensor, parameters: Parameters) -> Tensor:
        """Codes 0 .. levels - 1 as float32, with gradient; ``parameters`` broadcast against float32 ``x``."""

    @abstractmethod
    def reconstruct(self, codes: Tensor, parameters: Parameters) -> Tensor:
        """The float32 values of float32 ``codes``; ``parameters`` broadcast against them."""

    @property
    def levels(self) -> int:
        """Number of codes."""
        return 2**self.bits

    @property
    def channel_axis(self) -> int | None:
        """The axis along which each index has its own parameters; None where the whole tensor shares them."""
        return None

    @property
    def frozen(self) -> bool:
        """Whether the range is fixed, so that the quantizer can be called."""
        return all(self._buffers[name] is not None for name in self.stores)

    @torch.no_grad()
    def observe(self, x: Tensor) -> None:
        """Collects extremes and a bounded sample of ``x``; call it once for each batch.

        Once frozen, it collects anew and the old range stays in use until the next `freeze`.

        Raises:
            NonFiniteError: ``x`` holds NaN or infinity (as float32).
            DataError: ``x`` is empty, lacks the channel axis or changes its length, or has negative values that this
                quantizer does not take.
        """
        rows = self._rows(x.detach().float())
        low, high = rows.aminmax(dim=1)
        self._refuse(rows, low, high)
        if self._statistics is None:
            self._statistics = Statistics(rows)
        self._statistics.add(rows, low, high)

    @torch.no_grad()
    def freeze(self, observer: Observer | None = None) -> None:
        """Fixes the parameters by the range that ``observer`` (default: `MinMaxObserver`) chooses; drops the samples.

        Raises:
            SpdfqError: nothing was observed since the last `freeze`.
        """
        seen = self._statistics
        if seen is None:
            raise SpdfqError(f"{self} has observed nothing: call observe(x) with calibration data before freeze()")
        low, high = (observer or MinMaxObserver()).choose(seen.samples, seen.low, seen.high, self)
        parameters = self.fitted(low, high)
        self._fix(parameters if self.channel_axis is not None else {name: p[0] for name, p in parameters.items()})
        self._statistics = None

    def forward(self, x: Tensor) -> Tensor:
        """The dequantized ``x``, same shape and dtype; computed in float32 under any autocast.

        Raises:
            SpdfqError: the quantizer is not frozen.
        """
        return self.dequantized(x.float(), self._along(x)).to(x.dtype)

    def dequantized(self, x: Tensor, parameters: Parameters) -> Tensor:
        """``reconstruct(encode(x))`` with its gradient; a child may do the same in fewer passes over memory."""
        return self.reconstruct(self.encode(x, parameters), parameters)

    @torch.no_grad()
    def codes(self, x: Tensor) -> Tensor:
        """The integers of ``x``: uint8 of its shape, 0 .. levels - 1; NaN raises NonFiniteError."""
        if missing := int(x.isnan().sum()):
            raise NonFiniteError(f"{missing} of {x.numel()} values are NaN and have no code; check the weights")
        return self.encode(x.float(), self._along(x)).to(torch.uint8)

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """The float32 values of integer ``codes``, bitwise those `forward` gives."""
        return self.reconstruct(codes.float(), self._along(codes))

    def quantize_with(self, values: Tensor, parameters: Parameters) -> Tensor:
        """Dequantized ``values`` float32 ``[C, n]`` under `fitted` parameters ``[C]``, frozen or not."""
        columns = {name: parameter[:, None] for name, parameter in parameters.items()}
        return self.dequantized(values, columns)

    def tensors(self) -> dict[str, Tensor]:
        """What must be stored to rebuild this frozen quantizer: the tensors of ``stores``, ``[C]`` or ``[]`` each."""
        fixed = {name: tensor for name in self.stores if (tensor := self._buffers[name]) is not None}
        if len(fixed) < len(self.stores):
            raise SpdfqError(f"{self} is not frozen: call observe(x) and freeze(), or restore(tensors), first")
        return fixed

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Freezes this quantizer with what `tensors` gave; anything else raises DataError."""
        if set(tensors) != set(self.stores):
            raise DataError(f"{self} is stored as {sorted(self.stores)}, not {sorted(tensors)}")
        if len({tensor.shape for tensor in tensors.values()}) > 1:
            raise DataError(f"{sorted(tensors)} must have one shape; the file is damaged or of another quantizer")
        for name, tensor in tensors.items():
            self._check_stored(name, tensor)
        self._fix(tensors)
        self._statistics = None

    def _check_stored(self, name: str, tensor: Tensor) -> None:
        rank = 0 if self.channel_axis is None else 1
        if tensor.dtype != self.stores[name] or tensor.dim() != rank:
            raise DataError(
                f"stored {name} must be {self.stores[name]} of {rank} dimensions, not {tensor.dtype} of {tensor.dim()}"
            )
        if name == "scale" and not bool((tensor.isfinite() & (tensor > 0)).all()):
            raise DataError("stored scale must be finite and above 0; the file is damaged")
        if tensor.dtype == torch.uint8 and bool((tensor > self.levels - 1).any()):
            raise DataError(f"stored {name} exceeds {self.levels - 1}, the last code of {self.bits} bits")

    def _fix(self, parameters: Parameters) -> None:
        # not `self.scale = ...`: the __setattr__ that attrs writes bypasses nn.Module's
        for name, tensor in parameters.items():
            self.register_buffer(name, tensor.detach().clone())

    def _rows(self, x: Tensor) -> Tensor:
        if x.numel() == 0:
            raise DataError(f"cannot observe an empty tensor of shape {tuple(x.shape)}")
        axis = self._axis_of(x)
        return x.reshape(1, -1) if axis is None else x.movedim(axis, 0).reshape(x.shape[axis], -1)

    def _along(self, x: Tensor) -> Parameters:
        parameters, axis = self.tensors(), self._axis_of(x)
        if axis is None:
            return parameters
        return {name: self._spread(parameter, x, axis) for name, parameter in parameters.items()}

    def _spread(self, parameter: Tensor, x: Tensor, axis: int) -> Tensor:
        if x.shape[axis] != len(parameter):
            raise DataError(f"{self} was frozen for {len(parameter)} channels, not for shape {tuple(x.shape)}")
        return parameter.reshape([-1 if index == axis else 1 for index in range(x.dim())])

    def _axis_of(self, x: Tensor) -> int | None:
        axis = self.channel_axis
        if axis is None:
            return None
        if not -x.dim() <= axis < x.dim():
            raise DataError(f"{self} has its channels on an axis that shape {tuple(x.shape)} lacks; set another axis")
        return axis % x.dim()

    def _refuse(self, rows: Tensor, low: Tensor, high: Tensor) -> None:
        if not bool((low.isfinite() & high.isfinite()).all()):
            count = int((~rows.isfinite()).sum())
            raise NonFiniteError(
                f"{count} of {rows.numel()} observed values are NaN or infinite; "
                "check the images, or run the model in float32 precision"
            )
        if not self.signed and bool((low < 0).any()):
            raise DataError(f"{self} takes values from 0 up, but observed {float(low.min()):g}; use another quantizer")

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Quantizer":
        # model.bfloat16() must not coarsen the scale: the codes would change without a word
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, old in before.items():
            new = self._buffers[name]
            if old is not None and new is not None and new.dtype != old.dtype:
                self._buffers[name] = old.to(new.device)
        return self
