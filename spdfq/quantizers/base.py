"""The base class of quantizers: observe values, freeze a range, map tensors to codes and back."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar

import torch
from attrs import define, field
from einops import rearrange
from torch import Tensor, nn

from spdfq.errors import DataError, NonFiniteError, SpdfqError
from spdfq.quantizers.cpu_tables import two_byte_results, two_byte_table_pays
from spdfq.quantizers.observers import MinMaxObserver, Observer
from spdfq.quantizers.option_checks import BYTE, check_bits
from spdfq.quantizers.product import Product
from spdfq.quantizers.remembered import Remembered
from spdfq.quantizers.statistics import Statistics
from spdfq.recipe.structure import Checked
from spdfq.runtime.arguments import check_tensor

Parameters = dict[str, Tensor]
"""The tensors that a frozen quantizer consists of, by the names in `Quantizer.stores`."""


def straight_through(smooth: Tensor, rounded: Tensor) -> Tensor:
    """The values of ``rounded``, bit for bit, with the gradient of ``smooth``."""
    # the bracket is exactly 0 for finite values, so a code stays an integer
    return rounded.detach() + (smooth - smooth.detach())


def bounded(x: Tensor, low: float, high: float) -> Tensor:
    """``x`` clamped, with gradient 1 from ``low`` to ``high`` inclusive and 0 outside."""
    # since torch 2.15 Tensor.clamp passes no gradient at the bounds themselves, which are the first and the last code
    return torch.where((x >= low) & (x <= high), x, x.detach().clamp(low, high))


@define(eq=False, slots=False, kw_only=True)
class Quantizer(nn.Module, Checked, ABC):
    """Base class: maps each element of a tensor to one of ``2**bits`` values; only the rounding is straight-through.

    `observe` data, `freeze` the range, then call it. A child class defines three pure functions, `fitted`, `encode` and
    `reconstruct`, of which the last two work element by element, and these class variables:

    * ``stores``: names and dtypes of the tensors that a frozen quantizer consists of.
    * ``largest``: the largest valid number of a stored tensor of integers, where that is not the last code.
    * ``integers``: whether an integer runtime can run it, ``yes`` or ``with tables``.

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
        self._of_weight: Remembered[Tensor] = Remembered()
        for name in self.stores:
            self.register_buffer(name, None)

    @abstractmethod
    def fitted(self, low: Tensor, high: Tensor) -> Parameters:
        """The parameters for the ranges ``low``, ``high`` float32 ``[C]``: the tensors of ``stores``, ``[C]`` each."""

    @abstractmethod
    def encode(self, x: Tensor, parameters: Parameters) -> Tensor:
        """Codes 0 .. levels - 1 of float32 ``x``, float32 with a gradient; ``parameters`` broadcast against ``x``."""

    @abstractmethod
    def reconstruct(self, codes: Tensor, parameters: Parameters) -> Tensor:
        """The float32 values of float32 ``codes``; ``parameters`` broadcast against them."""

    @property
    def levels(self) -> int:
        """Number of codes."""
        return 2**self.bits

    @property
    def code_dtype(self) -> torch.dtype:
        """The dtype of codes: uint8 up to 8 bits, int32 above, because torch computes little with uint16."""
        return torch.uint8 if self.bits <= BYTE else torch.int32

    @property
    def signed(self) -> bool:
        """Whether it accepts negative values."""
        return True

    @property
    def one_ended(self) -> bool:
        """Whether only one end of a range matters: the upper end, or the end of larger magnitude."""
        return False

    @property
    def channel_axis(self) -> int | None:
        """The axis whose indices each have their own range; ``None`` if the whole tensor shares one."""
        return None

    def axis_of(self, name: str) -> int | None:
        """The axis whose indices each have their own value of a stored tensor; ``None`` if all share one."""
        return self.channel_axis

    def dtype_of(self, name: str) -> torch.dtype:
        """The dtype of a stored tensor."""
        return self.stores[name]

    @property
    def frozen(self) -> bool:
        """Whether the range is fixed. Only then can the quantizer be called."""
        return all(self._buffers[name] is not None for name in self.stores)

    @torch.no_grad()
    def observe(self, x: Tensor) -> None:
        """Collects extremes and a bounded sample of ``x``; call it once for each batch.

        A frozen quantizer starts a new collection and keeps its old range until the next `freeze`.

        Raises:
            NonFiniteError: ``x`` holds NaN or infinity (as float32).
            SpdfqError: ``x`` is not a tensor.
            DataError: ``x`` is empty, has no channel axis, has another number of channels than before, or has negative
                values that this quantizer does not accept.
        """
        check_tensor("x", x, "...")
        rows = self._rows(x.detach().float())
        low, high = rows.aminmax(dim=1)
        self._check_values(rows, low, high)
        if self._statistics is None:
            images = 1 if x.ndim == 0 or self.channel_axis in (0, -x.ndim) else len(x)
            self._statistics = Statistics(rows, rows.shape[1] // images)
        self._statistics.add(rows, low, high)

    @torch.no_grad()
    def freeze(self, observer: Observer | None = None, product: Product | None = None) -> None:
        """Fixes the parameters for the range that the observer chooses, and drops the samples.

        Args:
            observer: chooses the range; `MinMaxObserver` by default.
            product: if given, candidates are judged by the error of its output instead of the error of the values.

        Raises:
            SpdfqError: nothing was observed since the last `freeze`, or ``observer`` or ``product`` is of another type.
        """
        if observer is not None and not isinstance(observer, Observer):
            found = f"the class {observer.__name__}" if isinstance(observer, type) else repr(observer)
            raise SpdfqError(f"observer must be an observer such as MinMaxObserver(), got {found}")
        if product is not None and not isinstance(product, Product):
            raise SpdfqError(f"product must be a spdfq.quantizers.Product, got {type(product).__name__}")
        seen = self._statistics
        if seen is None:
            raise SpdfqError(f"{self} has observed nothing: call observe(x) with calibration data before freeze()")
        self._product = product
        try:
            parameters = self.fit(seen, observer or MinMaxObserver())
        finally:
            self._product = None
        self._store({name: p if self.axis_of(name) is not None else p[0] for name, p in parameters.items()})
        self._statistics = None

    def fit(self, seen: Statistics, observer: Observer) -> Parameters:
        """The parameters for everything that was observed, ``[C]`` each (``[1]`` if all channels share one)."""
        return self.fitted(*observer.range_of(seen, self))

    def error(self, samples: Tensor, parameters: Parameters) -> Tensor:
        """The error ``[C]`` of parameters ``[C]`` that `fitted` gave; observers and `fit` minimise it.

        It is the mean squared error of ``samples`` float32 ``[C, n]``, or of the output of the product that `freeze`
        was given.
        """
        if self._product is None:
            return (self.quantize_with(samples, parameters) - samples).square().mean(dim=1)
        quantized = self.dequantized(self._product.operand.float(), self._broadcast(self._product.operand, parameters))
        return self._product.error(quantized, len(samples) if self.channel_axis == 0 else None).expand(len(samples))

    def forward(self, x: Tensor) -> Tensor:
        """The dequantized ``x``, same shape and dtype (float32 for integers); computed in float32 under any autocast.

        Raises:
            SpdfqError: the quantizer is not frozen, or ``x`` is not a tensor.
        """
        check_tensor("x", x, "...")
        parameters = self._broadcast(x, self.tensors())
        if (
            two_byte_table_pays(x)
            and not self.learned
            and not any(parameter.dim() for parameter in parameters.values())
        ):
            return two_byte_results(lambda every: self.dequantized(every, parameters), x)
        dequantized = self.dequantized(x.float(), parameters)
        return dequantized.to(x.dtype) if x.is_floating_point() else dequantized

    def of_weight(self, weight: Tensor) -> Tensor:
        """The dequantized weight; computed once as long as neither the weight nor this quantizer changes.

        Raises:
            SpdfqError: the quantizer is not frozen.
        """
        if torch.is_grad_enabled() and (weight.requires_grad or self.learned):
            return self(weight)
        return self._of_weight.of([weight, *self.tensors().values(), *self.parameters()], lambda: self(weight))

    @property
    def learned(self) -> bool:
        """Whether something of it collects gradients."""
        return any(tensor.requires_grad for tensor in (*self.tensors().values(), *self.parameters()))

    def dequantized(self, x: Tensor, parameters: Parameters) -> Tensor:
        """``reconstruct(encode(x))`` with its gradient; a child may compute the same in fewer passes over memory."""
        return self.reconstruct(self.encode(x, parameters), parameters)

    @torch.no_grad()
    def codes(self, x: Tensor) -> Tensor:
        """The codes of ``x``, 0 .. levels - 1: `code_dtype`, of the same shape.

        Raises:
            NonFiniteError: ``x`` holds NaN.
            SpdfqError: the quantizer is not frozen, or ``x`` is not a tensor.
        """
        check_tensor("x", x, "...")
        if missing := int(x.isnan().sum()):
            raise NonFiniteError(f"{missing} of {x.numel()} values are NaN and have no code; check the weights")
        return self.encode(x.float(), self._broadcast(x, self.tensors())).to(self.code_dtype)

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """The float32 values of integer ``codes``, bit for bit those that `forward` gives."""
        check_tensor("codes", codes, "...")
        return self.reconstruct(codes.float(), self._broadcast(codes, self.tensors()))

    def quantize_with(self, values: Tensor, parameters: Parameters) -> Tensor:
        """Dequantizes ``values`` float32 ``[C, n]`` with parameters ``[C]`` from `fitted`, frozen or not."""
        columns = {name: parameter[:, None] for name, parameter in parameters.items()}
        return self.dequantized(values, columns)

    def tensors(self) -> dict[str, Tensor]:
        """The tensors of ``stores`` that rebuild this frozen quantizer, ``[n]`` or ``[]`` each."""
        fixed = {name: tensor for name in self.stores if (tensor := self._buffers[name]) is not None}
        if len(fixed) < len(self.stores):
            raise SpdfqError(f"{self} is not frozen: call observe(x) and freeze(), or restore(tensors), first")
        return fixed

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Freezes this quantizer with tensors that `tensors` gave.

        Raises:
            DataError: names, dtypes, shapes or values of the tensors do not fit.
        """
        if not isinstance(tensors, dict) or set(tensors) != set(self.stores):
            found = sorted(tensors) if isinstance(tensors, dict) else type(tensors).__name__
            raise DataError(f"{self} is stored as {sorted(self.stores)}, not {found}")
        for name, tensor in tensors.items():
            self._check_stored(name, tensor)
        shapes = {(self.axis_of(name), tensor.shape) for name, tensor in tensors.items()}
        if len(shapes) > len({axis for axis, _ in shapes}):
            raise DataError(f"{sorted(tensors)} differ in length; the file is damaged or of another quantizer")
        self._store(tensors)
        self._statistics = None

    def _check_stored(self, name: str, tensor: Tensor) -> None:
        rank = 0 if self.axis_of(name) is None else 1
        dtype = self.dtype_of(name)
        if tensor.dtype != dtype or tensor.dim() != rank:
            raise DataError(f"stored {name} must be {dtype} of {rank} dimensions, not {tensor.dtype} of {tensor.dim()}")
        if tensor.is_floating_point() and not bool((tensor.isfinite() & (tensor > 0)).all()):
            raise DataError(f"stored {name} must be finite and above 0; the file is damaged")
        largest = self.largest.get(name, self.levels - 1)
        if not tensor.is_floating_point() and bool(((tensor < 0) | (tensor > largest)).any()):
            raise DataError(f"stored {name} must lie in 0 to {largest} at {self.bits} bits; the file is damaged")

    def _store(self, parameters: Parameters) -> None:
        # not `self.scale = ...`, because attrs replaces the __setattr__ of nn.Module
        for name, tensor in parameters.items():
            self.register_buffer(name, tensor.detach().clone())

    def _rows(self, x: Tensor) -> Tensor:
        """``x`` as one row for each channel, ``[C, n]``; ``[1, n]`` if the whole tensor shares one range."""
        if x.numel() == 0:
            raise DataError(f"cannot observe an empty tensor of shape {tuple(x.shape)}")
        if self.channel_axis is None:
            return x.reshape(1, -1)
        return rearrange(x.movedim(self._axis(x, self.channel_axis), 0), "channels ... -> channels (...)")

    def _broadcast(self, x: Tensor, parameters: Parameters) -> Parameters:
        """Stored parameters in shapes that broadcast against ``x``."""
        return {name: self._along_axis(parameter, x, self.axis_of(name)) for name, parameter in parameters.items()}

    def _along_axis(self, parameter: Tensor, x: Tensor, axis: int | None) -> Tensor:
        if axis is None:
            return parameter.reshape(()) if parameter.dim() else parameter
        axis = self._axis(x, axis)
        if x.shape[axis] != len(parameter):
            raise DataError(f"{self} was frozen for {len(parameter)} channels, not for shape {tuple(x.shape)}")
        return parameter.reshape([-1 if index == axis else 1 for index in range(x.dim())])

    def _axis(self, x: Tensor, axis: int) -> int:
        if not -x.dim() <= axis < x.dim():
            raise DataError(f"{self} has its channels on an axis that shape {tuple(x.shape)} lacks; set another axis")
        return axis % x.dim()

    def _check_values(self, rows: Tensor, low: Tensor, high: Tensor) -> None:
        if not bool((low.isfinite() & high.isfinite()).all()):
            count = int((~rows.isfinite()).sum())
            raise NonFiniteError(
                f"{count} of {rows.numel()} observed values are NaN or infinite; "
                "check the images, or run the model in float32 precision"
            )
        if not self.signed and bool((low < 0).any()):
            raise DataError(
                f"{self} accepts no negative values, but observed {float(low.min()):g}; use another quantizer"
            )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Quantizer":
        # keeps the dtypes: with the scale in bfloat16 after model.bfloat16(), the codes would silently change
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, old in before.items():
            new = self._buffers[name]
            if old is not None and new is not None and new.dtype != old.dtype:
                self._buffers[name] = old.to(new.device)
        return self
