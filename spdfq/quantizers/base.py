"""What every quantizer shares: observing, freezing, its integers and its stored tensors."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from attrs import Attribute, define, field
from torch import Tensor, nn

from spdfq.errors import DataError, NonFiniteError, SpdfqError
from spdfq.quantizers.lookup import looked_up, pays_in_two_bytes
from spdfq.quantizers.observers import MinMaxObserver, Observer, Product, Statistics

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
    ``largest`` where a stored byte may not exceed another number than the last code, in ``integers`` whether an integer
    runtime can run it (``yes`` or ``with tables``), and gives three pure functions: `fitted`, `encode`, `reconstruct`.
    The latter two treat each element by itself.

    Args:
        bits: width of a code in bits, 2 to 8.
    """

    stores: ClassVar[dict[str, torch.dtype]] = {"scale": torch.float32}
    largest: ClassVar[dict[str, int]] = {}
    integers: ClassVar[str]

    bits: int = field(default=4, validator=check_bits)

    def __attrs_pre_init__(self) -> None:
        super().__init__()
        self._statistics: Statistics | None = None
        self._product: Product | None = None
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
    def signed(self) -> bool:
        """Whether it takes negative values."""
        return True

    @property
    def one_ended(self) -> bool:
        """Whether a range is one number to it: its upper end, or the end of larger magnitude."""
        return False

    @property
    def channel_axis(self) -> int | None:
        """The axis along which each index has its own range; None where the whole tensor shares one."""
        return None

    def axis_of(self, name: str) -> int | None:
        """The axis along which each index has its own value of a stored tensor; None where all share one."""
        return self.channel_axis

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
            images = 1 if x.ndim == 0 or self.channel_axis in (0, -x.ndim) else len(x)
            self._statistics = Statistics(rows, rows.shape[1] // images)
        self._statistics.add(rows, low, high)

    @torch.no_grad()
    def freeze(self, observer: Observer | None = None, product: Product | None = None) -> None:
        """Fixes the parameters by the range that ``observer`` (default: `MinMaxObserver`) chooses; drops the samples.

        Args:
            observer: chooses the range.
            product: judges candidates by the error of its output instead of that of the values.

        Raises:
            SpdfqError: nothing was observed since the last `freeze`.
        """
        seen = self._statistics
        if seen is None:
            raise SpdfqError(f"{self} has observed nothing: call observe(x) with calibration data before freeze()")
        self._product = product
        try:
            parameters = self.fit(seen, observer or MinMaxObserver())
        finally:
            self._product = None
        self._fix({name: p if self.axis_of(name) is not None else p[0] for name, p in parameters.items()})
        self._statistics = None

    def fit(self, seen: Statistics, observer: Observer) -> Parameters:
        """The parameters for what was observed, ``[C]`` each (``[1]`` where all share one)."""
        return self.fitted(*observer.range_of(seen, self))

    def error(self, samples: Tensor, parameters: Parameters) -> Tensor:
        """How far `fitted` parameters ``[C]`` are off, ``[C]``: what observers and `fit` minimise.

        The mean squared error of ``samples`` float32 ``[C, n]``, or of the output of the product that `freeze` was
        given.
        """
        if self._product is None:
            return (self.quantize_with(samples, parameters) - samples).square().mean(dim=1)
        quantized = self.dequantized(self._product.operand.float(), self._laid(self._product.operand, parameters))
        return self._product.error(quantized, len(samples) if self.channel_axis == 0 else None).expand(len(samples))

    def forward(self, x: Tensor) -> Tensor:
        """The dequantized ``x``, same shape and dtype; computed in float32 under any autocast.

        Raises:
            SpdfqError: the quantizer is not frozen.
        """
        parameters = self._laid(x, self.tensors())
        learned = any(parameter.requires_grad for parameter in (*parameters.values(), *self.parameters()))
        if pays_in_two_bytes(x) and not learned and not any(parameter.dim() for parameter in parameters.values()):
            return looked_up(lambda every: self.dequantized(every, parameters), x)
        return self.dequantized(x.float(), parameters).to(x.dtype)

    def dequantized(self, x: Tensor, parameters: Parameters) -> Tensor:
        """``reconstruct(encode(x))`` with its gradient; a child may do the same in fewer passes over memory."""
        return self.reconstruct(self.encode(x, parameters), parameters)

    @torch.no_grad()
    def codes(self, x: Tensor) -> Tensor:
        """The integers of ``x``: uint8 of its shape, 0 .. levels - 1; NaN raises NonFiniteError."""
        if missing := int(x.isnan().sum()):
            raise NonFiniteError(f"{missing} of {x.numel()} values are NaN and have no code; check the weights")
        return self.encode(x.float(), self._laid(x, self.tensors())).to(torch.uint8)

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """The float32 values of integer ``codes``, bitwise those `forward` gives."""
        return self.reconstruct(codes.float(), self._laid(codes, self.tensors()))

    def quantize_with(self, values: Tensor, parameters: Parameters) -> Tensor:
        """Dequantized ``values`` float32 ``[C, n]`` under `fitted` parameters ``[C]``, frozen or not."""
        columns = {name: parameter[:, None] for name, parameter in parameters.items()}
        return self.dequantized(values, columns)

    def tensors(self) -> dict[str, Tensor]:
        """What must be stored to rebuild this frozen quantizer: the tensors of ``stores``, ``[n]`` or ``[]`` each."""
        fixed = {name: tensor for name in self.stores if (tensor := self._buffers[name]) is not None}
        if len(fixed) < len(self.stores):
            raise SpdfqError(f"{self} is not frozen: call observe(x) and freeze(), or restore(tensors), first")
        return fixed

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Freezes this quantizer with what `tensors` gave; anything else raises DataError."""
        if set(tensors) != set(self.stores):
            raise DataError(f"{self} is stored as {sorted(self.stores)}, not {sorted(tensors)}")
        for name, tensor in tensors.items():
            self._check_stored(name, tensor)
        shapes = {(self.axis_of(name), tensor.shape) for name, tensor in tensors.items()}
        if len(shapes) > len({axis for axis, _ in shapes}):
            raise DataError(f"{sorted(tensors)} differ in length; the file is damaged or of another quantizer")
        self._fix(tensors)
        self._statistics = None

    def _check_stored(self, name: str, tensor: Tensor) -> None:
        rank = 0 if self.axis_of(name) is None else 1
        if tensor.dtype != self.stores[name] or tensor.dim() != rank:
            raise DataError(
                f"stored {name} must be {self.stores[name]} of {rank} dimensions, not {tensor.dtype} of {tensor.dim()}"
            )
        if tensor.is_floating_point() and not bool((tensor.isfinite() & (tensor > 0)).all()):
            raise DataError(f"stored {name} must be finite and above 0; the file is damaged")
        largest = self.largest.get(name, self.levels - 1)
        if tensor.dtype == torch.uint8 and bool((tensor > largest).any()):
            raise DataError(f"stored {name} exceeds {largest}, the most there is at {self.bits} bits")

    def _fix(self, parameters: Parameters) -> None:
        # not `self.scale = ...`: the __setattr__ that attrs writes bypasses nn.Module's
        for name, tensor in parameters.items():
            self.register_buffer(name, tensor.detach().clone())

    def _rows(self, x: Tensor) -> Tensor:
        if x.numel() == 0:
            raise DataError(f"cannot observe an empty tensor of shape {tuple(x.shape)}")
        if self.channel_axis is None:
            return x.reshape(1, -1)
        axis = self._axis(x, self.channel_axis)
        return x.movedim(axis, 0).reshape(x.shape[axis], -1)

    def _laid(self, x: Tensor, parameters: Parameters) -> Parameters:
        """Stored or `fitted` parameters in a shape that broadcasts against ``x``."""
        return {name: self._spread(parameter, x, self.axis_of(name)) for name, parameter in parameters.items()}

    def _spread(self, parameter: Tensor, x: Tensor, axis: int | None) -> Tensor:
        if axis is None:
            return parameter.reshape(())
        axis = self._axis(x, axis)
        if x.shape[axis] != len(parameter):
            raise DataError(f"{self} was frozen for {len(parameter)} channels, not for shape {tuple(x.shape)}")
        return parameter.reshape([-1 if index == axis else 1 for index in range(x.dim())])

    def _axis(self, x: Tensor, axis: int) -> int:
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
