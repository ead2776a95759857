"""The inputs of linear layers in the teacher and in the quantized model, as the sums that least squares needs."""

from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import groupby

import torch
import torch.nn.functional as F
from attrs import define, field, frozen
from einops import rearrange
from torch import Tensor, nn

from spdfq.backends.blocks import BlockCall, Hidden, block_calls, block_names
from spdfq.backends.propagation import Propagation, of_images
from spdfq.errors import ModelError
from spdfq.quantized.model import QuantizedModel
from spdfq.quantized.sites import INPUT, input_site
from spdfq.quantized.visiting import Visit, unchanged, visit_sites
from spdfq.quantizers import Product


@frozen
class LinearLayer:
    """A linear layer.

    Args:
        weight: name of its weight.
        bias: name of its bias, if that can be changed.
        compensated: whether its weight compensates the error of its inputs.
    """

    weight: str
    bias: str | None
    compensated: bool = True


def input_rows(model: QuantizedModel, image: Tensor) -> Counter[str]:
    """The number of rows ``[rows, d]`` of each product's operand for one image ``[1, C, H, W]``, by its site's name."""
    rows = Counter[str]()

    def count(site: str, product: Product) -> None:
        rows[site] += product.operand.shape[:-1].numel()

    with visit_sites(model.network, unchanged, points=model.points, on_product=count):
        model.network(image)
    return rows


@define(eq=False)
class NormalEquations:
    """The sums that a regression of a layer's output error on its inputs needs.

    A ``[n, d]`` are the inputs, with a last column of ones if the bias can be changed. Y ``[n, k]`` is the difference
    between the teacher's and the layer's outputs.

    Args:
        gram: ``AᵀA``, float64 ``[d, d]``.
        cross: ``AᵀY``, float64 ``[d, k]``.
    """

    gram: Tensor
    cross: Tensor

    @classmethod
    def zeros_like(cls, inputs: Tensor, missing: Tensor) -> "NormalEquations":
        """Empty sums for A and Y with as many columns as these."""
        columns = inputs.shape[1]
        gram, cross = (inputs.new_zeros(columns, n, dtype=torch.float64) for n in (columns, missing.shape[1]))
        return cls(gram, cross)

    def add(self, inputs: Tensor, missing: Tensor) -> None:
        """Adds some rows of A and Y, float32; their products are computed in float32 and summed in float64."""
        self.gram += inputs.T @ inputs
        self.cross += inputs.T @ missing


class _InputFound(Exception):
    pass


@define(eq=False)
class LayerInputs:
    """Images on their way through the teacher and the quantized model, block by block, with the inputs of their layers.

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
    _of_teacher: Propagation = field(init=False)
    _of_model: Propagation = field(init=False)
    _teacher_hidden: Hidden = field(default=(), init=False)
    _model_hidden: Hidden = field(default=(), init=False)

    def __attrs_post_init__(self) -> None:
        self._of_teacher = Propagation(self.teacher, self.images, self.batch)
        self._of_model = Propagation(self.model.network, self.images, self.batch)
        try:
            calls = block_calls(self.teacher, block_names(self.model), self.images[:1])
        except ModelError:  # without blocks, every layer is reached from the images
            calls = []
        self._calls = {call.name: call for call in calls}

    def by_block(self, layers: Iterable[LinearLayer]) -> Iterator[tuple[BlockCall | None, list[LinearLayer]]]:
        """The layers, grouped by the block that they lie in; ``None`` for layers outside of blocks."""
        for block, group in groupby(layers, lambda layer: self._block_of(layer.weight)):
            yield self._calls.get(block), list(group)

    def _block_of(self, name: str) -> str:
        return next((block for block in self._calls if name.startswith(f"{block}.")), "")

    def enter(self, call: BlockCall | None) -> None:
        """Brings the images to a block."""
        if call:
            self._teacher_hidden = self._of_teacher.inputs_of(call)
            with self.model.quantizing():
                self._model_hidden = self._of_model.inputs_of(call)

    def leave(self, call: BlockCall | None) -> None:
        """Brings the images through the block that was entered."""
        if call:
            self._of_teacher.through(call, self._teacher_hidden)
            with self.model.quantizing():
                self._of_model.through(call, self._model_hidden)
            self._teacher_hidden = self._model_hidden = ()

    def normal_equations(self, layer: LinearLayer, call: BlockCall | None) -> NormalEquations:
        """Sums over the quantized inputs of a layer, and over the difference of its output from the teacher's.

        All layers before it are quantized.

        Args:
            layer: the layer.
            call: of the block that it lies in, which was entered; ``None`` outside of blocks.
        """
        weight, bias = self._parameters(self.model.network, layer)
        found: NormalEquations | None = None
        for start in range(0, len(self.images), self.batch):
            part = slice(start, start + self.batch)
            wanted = F.linear(self._teacher_input(layer, call, part), *self._parameters(self.teacher, layer))
            inputs = self._model_input(layer, call, part)
            missing = wanted - F.linear(inputs, weight, bias)
            if layer.bias:
                inputs = torch.cat([inputs, inputs.new_ones(len(inputs), 1)], 1)
            found = found or NormalEquations.zeros_like(inputs, missing)
            found.add(inputs, missing)
        return found or NormalEquations.zeros_like(weight, weight.T)

    def _parameters(self, network: nn.Module, layer: LinearLayer) -> tuple[Tensor, Tensor | None]:
        named = dict(network.named_parameters())
        return named[layer.weight].float(), named.get(layer.bias or "")

    def _teacher_input(self, layer: LinearLayer, call: BlockCall | None, part: slice) -> Tensor:
        return self._input(self.teacher, unchanged, self._teacher_hidden, layer, call, part)

    def _model_input(self, layer: LinearLayer, call: BlockCall | None, part: slice) -> Tensor:
        return self._input(self.model.network, self.model.quantized, self._model_hidden, layer, call, part)

    def _input(
        self,
        network: nn.Module,
        visit: Visit,
        hidden: Hidden,
        layer: LinearLayer,
        call: BlockCall | None,
        part: slice,
    ) -> Tensor:
        """The input of a layer, float32 ``[rows, d]``, for some of the images; the forward pass stops there."""
        site = input_site(layer.weight)
        found: list[Tensor] = []

        def stop_at_layer(name: str, product: Product) -> None:
            if name == site:
                found.append(rearrange(visit(name, INPUT, product.operand).float(), "... d -> (...) d"))
                raise _InputFound

        with visit_sites(network, visit, points=self.model.points, on_product=stop_at_layer):
            try:
                if call:
                    call.run(network, of_images(hidden, len(self.images), part))
                else:
                    network(self.images[part])
            except _InputFound:
                pass
        return found[0]
