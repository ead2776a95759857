"""The inputs of linear layers in the teacher and in the quantized model, layer by layer."""

from collections.abc import Iterable, Iterator
from itertools import groupby

import torch
import torch.nn.functional as F
from attrs import define, field, frozen
from torch import Tensor, nn

from spdfq.backends.learning.blocks import BlockCall, Hidden, block_calls, block_names
from spdfq.backends.learning.stream import Stream, rows
from spdfq.errors import ModelError
from spdfq.quantized.model import QuantizedModel
from spdfq.quantized.products import INPUT, input_site, products
from spdfq.quantizers import Product


@frozen
class Layer:
    """A linear layer.

    Args:
        weight: name of its weight.
        bias: name of its bias, where that can be changed.
    """

    weight: str
    bias: str | None


@define(eq=False)
class Products:
    """What least squares need of a layer's inputs A ``[n, d]`` and of what its outputs lack, Y ``[n, k]``.

    Where the bias can be changed, a column of ones is the last of A.

    Args:
        gram: ``AᵀA``, float64 ``[d, d]``.
        gap: ``AᵀY``, float64 ``[d, k]``.
    """

    gram: Tensor
    gap: Tensor

    def add(self, inputs: Tensor, gap: Tensor) -> None:
        """Take in some rows of A and Y, float32; their products are formed in float32 and summed in float64."""
        self.gram += inputs.T @ inputs
        self.gap += inputs.T @ gap


class _Reached(Exception):
    pass


@define(eq=False)
class Feed:
    """Images on their way through the teacher and the quantized model, in step, block by block.

    Args:
        model: the quantized model.
        teacher: the float network.
        images: ``[n, C, H, W]``.
        batch: images per forward pass.
    """

    model: QuantizedModel
    teacher: nn.Module
    images: Tensor
    batch: int
    _calls: dict[str, BlockCall] = field(init=False)
    _streams: tuple[Stream, Stream] = field(init=False)
    _hidden: tuple[Hidden, Hidden] = field(default=((), ()), init=False)

    def __attrs_post_init__(self) -> None:
        teacher, student = (Stream(net, self.images, self.batch) for net in (self.teacher, self.model.network))
        self._streams = teacher, student
        try:
            calls = block_calls(self.teacher, block_names(self.model), self.images[:1])
        except ModelError:  # without blocks every layer is reached from the images
            calls = []
        self._calls = {call.name: call for call in calls}

    def by_block(self, layers: Iterable[Layer]) -> Iterator[tuple[BlockCall | None, list[Layer]]]:
        """The layers with the block they lie in, ``None`` outside of blocks."""
        for block, group in groupby(layers, lambda layer: self._block_of(layer.weight)):
            yield self._calls.get(block), list(group)

    def _block_of(self, name: str) -> str:
        return next((block for block in self._calls if name.startswith(f"{block}.")), "")

    def enter(self, call: BlockCall | None) -> None:
        """Bring the images to a block."""
        if call:
            teacher = self._streams[0].enter(call)
            with self.model.quantizing():
                self._hidden = teacher, self._streams[1].enter(call)

    def leave(self, call: BlockCall | None) -> None:
        """Bring the images through the block that was entered."""
        if call:
            self._streams[0].leave(call, self._hidden[0])
            with self.model.quantizing():
                self._streams[1].leave(call, self._hidden[1])
            self._hidden = (), ()

    def products(self, layer: Layer, call: BlockCall | None) -> Products:
        """Of a layer's quantized inputs, behind all quantized layers before it, and what its outputs lack."""
        weight, bias = self._parameters(self.model.network, layer)
        found: Products | None = None
        for start in range(0, len(self.images), self.batch):
            part = slice(start, start + self.batch)
            wanted = F.linear(self._input(0, layer, call, part), *self._parameters(self.teacher, layer))
            inputs = self._input(1, layer, call, part)
            gap = wanted - F.linear(inputs, weight, bias)
            if layer.bias:
                inputs = torch.cat([inputs, inputs.new_ones(len(inputs), 1)], 1)
            found = found or _empty(inputs, gap)
            found.add(inputs, gap)
        return found or _empty(weight, weight.T)

    def _parameters(self, network: nn.Module, layer: Layer) -> tuple[Tensor, Tensor | None]:
        named = dict(network.named_parameters())
        return named[layer.weight].float(), named.get(layer.bias or "")

    def _input(self, side: int, layer: Layer, call: BlockCall | None, part: slice) -> Tensor:
        """What a layer multiplies, float32 ``[rows, d]``, for some of the images."""
        network: nn.Module = self.model.network if side else self.teacher
        site, quantized = input_site(layer.weight), self.model.quantized if side else _as_it_is
        found: list[Tensor] = []

        def stop(name: str, product: Product) -> None:
            if name == site:
                found.append(quantized(name, INPUT, product.operand).float().flatten(0, -2))
                raise _Reached

        with products(network, quantized, points=self.model.points, watch=stop):
            try:
                if call:
                    call.run(network, rows(self._hidden[side], len(self.images), part))
                else:
                    network(self.images[part])
            except _Reached:
                pass
        return found[0]


def _as_it_is(_: str, __: str, tensor: Tensor) -> Tensor:
    return tensor


def _empty(inputs: Tensor, gap: Tensor) -> Products:
    columns = inputs.shape[1]
    gram, cross = (inputs.new_zeros(columns, n, dtype=torch.float64) for n in (columns, gap.shape[1]))
    return Products(gram, cross)
