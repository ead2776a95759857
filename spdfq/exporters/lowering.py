"""A quantized model as integers: weights become integer buffers, and quantizers become a pair of operators."""

from collections.abc import Callable
from typing import TypeGuard

import torch
from attrs import frozen
from torch import Tensor, nn

from spdfq.exporters.logarithms import LookUp, StoredLogarithm
from spdfq.quantized.model import QuantizedModel, copied_network
from spdfq.quantized.sites import KEY, PRODUCT, QUERY, VALUE, WEIGHT
from spdfq.quantized.visiting import visit_sites
from spdfq.quantizers import Quantizer, UniformQuantizer
from spdfq.quantizers.logarithmic import LogarithmicQuantizer
from spdfq.quantizers.option_checks import BYTE

Quantize = Callable[[Tensor, Tensor, Tensor, int, int, int], Tensor]
"""``quantize(x, scale, zero_point, axis, low, high)`` gives codes ``low`` to ``high`` in the zero point's dtype."""
Dequantize = Callable[[Tensor, Tensor, Tensor, int], Tensor]
"""``dequantize(codes, scale, zero_point, axis)`` gives float32 values."""

# symmetric operands of these kinds are signed, for OpenVINO's integer attention; onnxruntime wants unsigned integers
# before layers
_SIGNED = (QUERY, KEY, VALUE, PRODUCT)


@torch.library.custom_op("spdfq::quantize", mutates_args=())
def quantize(x: Tensor, scale: Tensor, zero_point: Tensor, axis: int, low: int, high: int) -> Tensor:
    """Codes of float32 ``x``: ``clamp(round(x / scale) + zero_point, low, high)`` in the zero point's dtype."""
    scale, zero = along(scale, x, axis), along(zero_point, x, axis)
    return ((x / scale).round() + zero.float()).clamp(low, high).to(zero_point.dtype)


@quantize.register_fake
def _(x: Tensor, scale: Tensor, zero_point: Tensor, axis: int, low: int, high: int) -> Tensor:
    return torch.empty_like(x, dtype=zero_point.dtype)


@torch.library.custom_op("spdfq::dequantize", mutates_args=())
def dequantize(codes: Tensor, scale: Tensor, zero_point: Tensor, axis: int) -> Tensor:
    """Values of integer ``codes``: ``(codes - zero_point) * scale``, float32."""
    return plain_dequantize(codes, scale, zero_point, axis)


@dequantize.register_fake
def _(codes: Tensor, scale: Tensor, zero_point: Tensor, axis: int) -> Tensor:
    return torch.empty_like(codes, dtype=torch.float32)


def plain_dequantize(codes: Tensor, scale: Tensor, zero_point: Tensor, axis: int) -> Tensor:
    """`dequantize` in operators that every program can hold."""
    return (codes.float() - along(zero_point, codes, axis).float()) * along(scale, codes, axis)


def along(parameter: Tensor, x: Tensor, axis: int) -> Tensor:
    """A parameter ``[]`` or ``[C]`` in a shape that broadcasts against ``x``, along an axis."""
    return parameter.reshape([-1 if index == axis else 1 for index in range(x.dim())]) if parameter.dim() else parameter


@frozen(eq=False)
class Grid:
    """An evenly spaced quantizer for integers of 8 bits, or of 16 bits for activations that are wider.

    Args:
        scale: float32 ``[]`` or ``[C]``.
        zero_point: int8, uint8, int16 or uint16, like ``scale``.
        axis: of the channels.
        low: the smallest code.
        high: the largest code.
    """

    scale: Tensor
    zero_point: Tensor
    axis: int
    low: int
    high: int

    @classmethod
    def of(cls, quantizer: UniformQuantizer, dimensions: int, signed: bool) -> "Grid":
        """The grid of a frozen quantizer for tensors of so many dimensions; signed codes lie around zero."""
        tensors, half = quantizer.tensors(), quantizer.levels // 2
        zero = tensors["zero_point"].int()
        axis = 0 if quantizer.channel_axis is None else quantizer.channel_axis % dimensions
        wide = quantizer.bits > BYTE
        if signed:
            dtype = torch.int16 if wide else torch.int8
            return cls(tensors["scale"].clone(), (zero - half).to(dtype), axis, -half, half - 1)
        dtype = torch.uint16 if wide else torch.uint8
        return cls(tensors["scale"].clone(), zero.to(dtype), axis, 0, quantizer.levels - 1)


def has_integers(quantizer: Quantizer, kind: str) -> TypeGuard[UniformQuantizer]:
    """Whether a file can hold the codes of a quantizer: evenly spaced, with a scale for each output channel or one.

    Args:
        quantizer: of a site.
        kind: of the site.
    """
    axes = (None, 0) if kind == WEIGHT else (None,)  # with others, onnxruntime fails and OpenVINO refuses the file
    too_wide = kind == WEIGHT and quantizer.bits > BYTE
    return type(quantizer) is UniformQuantizer and quantizer.channel_axis in axes and not too_wide


class Lowered(nn.Module):
    """The network of a quantized model, whose uniform quantizers are integers.

    Its logits are those of the quantized model. Quantizers that are not uniform compute in float as before;
    a weight with such a quantizer is a float32 buffer.

    Args:
        model: calibrated, on the CPU; its network is copied and not changed.
        quantize: as `quantize`; ``None`` leaves the quantizers of activations as they are.
        dequantize: as `dequantize`.
        look_up: as `look_up`.
    """

    def __init__(
        self, model: QuantizedModel, quantize: Quantize | None, dequantize: Dequantize, look_up: LookUp
    ) -> None:
        super().__init__()
        model.check_calibrated()
        self.network = copied_network(model.network).eval().requires_grad_(False)
        self.others = nn.ModuleDict()
        self._points, self._grids = model.points, dict[str, Grid]()
        self._quantize, self._dequantize = quantize, dequantize
        for name, quantizer in model.quantizers.items():
            site, key = model.sites[name], _key(name)
            if site.kind == WEIGHT:
                self._lower_weight(key, model.weight(name).detach(), quantizer)
            elif has_integers(quantizer, site.kind) and quantize is not None:
                middle = bool((quantizer.tensors()["zero_point"] == quantizer.levels // 2).all())
                self._keep(key, Grid.of(quantizer, len(site.shape), middle and site.kind in _SIGNED))
            elif isinstance(quantizer, LogarithmicQuantizer):
                self.others[key] = StoredLogarithm(quantizer, look_up)
            else:
                self.others[key] = quantizer

    def forward(self, images: Tensor) -> Tensor:
        """The logits of normalised images ``[B, C, H, W]``."""
        with visit_sites(self.network, self._visited, points=self._points):
            return self.network(images)

    def _lower_weight(self, key: str, weight: Tensor, quantizer: Quantizer) -> None:
        if not has_integers(quantizer, WEIGHT):
            self.register_buffer(f"{key}_values", quantizer(weight))
            return
        grid = Grid.of(quantizer, weight.dim(), signed=True)
        self.register_buffer(f"{key}_codes", (quantizer.codes(weight).int() + grid.low).to(torch.int8))
        self._keep(key, grid)

    def _keep(self, key: str, grid: Grid) -> None:
        self._grids[key] = grid
        self.register_buffer(f"{key}_scale", grid.scale)
        self.register_buffer(f"{key}_zero_point", grid.zero_point)

    def _visited(self, name: str, kind: str, tensor: Tensor) -> Tensor:
        key = _key(name)
        grid = self._grids.get(key)
        if grid is None and kind == WEIGHT:
            return self.get_buffer(f"{key}_values") if f"{key}_values" in self._buffers else tensor
        if grid is None:
            return self.others[key](tensor) if key in self.others else tensor
        scale, zero = self.get_buffer(f"{key}_scale"), self.get_buffer(f"{key}_zero_point")
        if kind == WEIGHT:
            codes = self.get_buffer(f"{key}_codes")
        else:
            assert self._quantize is not None
            codes = self._quantize(tensor, scale, zero, grid.axis, grid.low, grid.high)
        return self._dequantize(codes, scale, zero, grid.axis)


def _key(site: str) -> str:
    """A site's name without dots, as the name of a buffer."""
    return site.replace("_", "__").replace(".", "_0")
