"""Rotation: an orthogonal change of basis that spreads outlier channels over all channels."""

from collections.abc import Sequence
from typing import ClassVar

import torch
from attrs import define
from torch import Tensor

from spdfq.backends.base import NEITHER, Calibration, Step
from spdfq.backends.transforms.float_changes import Kept, check_same_output, refuse_after_calibration
from spdfq.backends.transforms.hadamard import orthogonal
from spdfq.backends.transforms.rotatable import score_obstacle, stream_obstacle, value_obstacle
from spdfq.backends.transforms.smooth import Smooth
from spdfq.backends.transforms.streams import Attention, Part, Rows, Stream, Structure
from spdfq.backends.transforms.tracing import structure
from spdfq.errors import SpdfqError
from spdfq.quantized.model import QuantizedModel
from spdfq.registry import steps
from spdfq.runtime.runtime import generator


@steps.register("rotate", paper="arXiv:2404.00456")
@define(kw_only=True)
class Rotate(Step):
    """Rotate the residual stream and the attention heads, so that no channel is an outlier. Exact in float.

    Each LayerNorm loses its weight and bias to the layers behind it, and its centring, M = I - 11ᵀ/C, to the layers and
    embeddings before it; an RMSNorm without parameters remains (SliceGPT, arXiv 2401.15024). A LayerScale moves into
    the layer before it. With a random orthogonal matrix R, layers that add to the stream become ``RᵀMW`` and layers
    that read it ``W diag(γ) R`` (QuaRot, arXiv 2404.00456). In each attention, one matrix rotates queries and keys, and
    another one the values, which the next layer undoes. The matrices are randomised Hadamard matrices where one of the
    size is known.

    The layers are found by how the network connects them. Where it does not allow a rotation (patch merging, a rotary
    embedding, a norm whose output is added to the stream, a model without a head), nothing changes; ``sites.json`` says
    where and why. Put it before ``calibrate``. The steps that follow compare with the rotated float network.

    Args:
        seed: of the matrices.
        stream: whether the residual stream is rotated.
        heads: whether the attention heads are rotated.
    """

    calibrates: ClassVar[frozenset[str]] = NEITHER
    in_float: ClassVar[bool] = True

    seed: int = 0
    stream: bool = True
    heads: bool = True

    def check(self, model: QuantizedModel, before: Sequence[Step]) -> None:
        """Refuses ranges that were chosen before, and smoothed channels, because a rotation mixes the channels."""
        refuse_after_calibration("rotate", model, before)
        if any(isinstance(step, Smooth) for step in before):
            raise SpdfqError("rotate: mixes the channels that 'smooth' made similar; put it before 'smooth'")

    @torch.no_grad()
    def run(self, model: QuantizedModel, calibration: Calibration) -> None:
        """Rotates the network; its notes list what stays as it is.

        Raises:
            SpdfqError: a range was chosen before.
            ModelError: the output changed.
        """
        refuse_after_calibration("rotate", model)
        images = calibration.images[:2]
        before = model.network(images)
        found = structure(model.network, images[:1])
        if self.heads:
            self._rotate_heads(model, found)
        if self.stream:
            self._rotate_streams(model, found)
        check_same_output("rotate", model.network(images), before)

    def _rotate_streams(self, model: QuantizedModel, found: Structure) -> None:
        streams = [stream for stream in found.roots() if stream.norms]
        kept = Kept("the stream", "rotated")
        if not streams:
            model.note("rotate", ["no residual stream is rotated: no norm takes a sum of layers and parameters"])
        obstacles = [stream_obstacle(model.network, found, stream) for stream in streams]
        for index, (stream, obstacle) in enumerate(zip(streams, obstacles, strict=True)):
            if obstacle is None:
                rotate_stream(model, stream, orthogonal(stream.features, generator(self.seed, "stream", index)))
            else:
                kept.add(obstacle, *stream.norms)
        rotated = {name for stream in streams for name in stream.norms}
        kept.add(
            "it is no sum of layers and parameters alone", *(name for name in found.other_norms if name not in rotated)
        )
        model.note("rotate", kept.lines())

    def _rotate_heads(self, model: QuantizedModel, found: Structure) -> None:
        if not found.attentions and not found.own_products:
            model.note("rotate", ["no head is rotated: no attention was seen"])
        products, scores, values = (
            Kept("products", "rotated"),
            Kept("queries and keys", "rotated"),
            Kept("values", "rotated"),
        )
        products.add("not computed by scaled_dot_product_attention", *found.own_products)
        for index, attention in enumerate(found.attentions):
            if obstacle := score_obstacle(found, attention):
                scores.add(obstacle, attention.name)
            else:
                heads = [*(attention.query or ()), *(attention.key or ())]
                _rotate_rows(model, heads, orthogonal(len(heads[0][1]), generator(self.seed, "scores", index)))
            if obstacle := value_obstacle(found, attention):
                values.add(obstacle, attention.name)
            else:
                _rotate_values(model, attention, generator(self.seed, "values", index))
        model.note("rotate", [*scores.lines(), *values.lines(), *products.lines()])


def rotate_stream(model: QuantizedModel, stream: Stream, rotation: Tensor) -> None:
    """Rotates a stream that has no obstacle by an orthogonal matrix, float64 ``[C, C]``."""
    centred = next(iter(stream.norms.values())).centres
    written = rotation - rotation.mean(0) if centred else rotation  # M R
    read = {id(part): (part, norm) for part, norm in stream.readers}
    for part, norm in read.values():
        weight = _rows_of(model, part)
        columns = weight.flatten(1)
        if norm is not None and norm.bias is not None:
            shift = _float64(model.network.get_parameter(norm.bias))
            if bool(shift.any()):
                _add_to_bias(model, part, columns @ shift)
        if norm is not None and norm.weight is not None:
            columns = columns * _float64(model.network.get_parameter(norm.weight))
        _put_rows(model, part, columns @ rotation)
    for part, scale in {(id(part), scale): (part, scale) for part, scale in stream.writers}.values():
        if scale is not None:
            factor = model.network.get_parameter(scale)
            _change_outputs(model, part, _float64(factor).flatten().diag())
            factor.fill_(1)
        _change_outputs(model, part, written)
    for name in dict.fromkeys(stream.parameters):
        parameter = model.network.get_parameter(name)
        parameter.copy_(_float64(parameter) @ written)
    for norm in stream.norms.values():
        model.replace_norm(norm.name, norm.features, norm.eps)


def _change_outputs(model: QuantizedModel, part: Part, change: Tensor) -> None:
    """Multiplies the outputs of a layer, as rows, with a matrix."""
    weight = _rows_of(model, part)
    _put_rows(model, part, change.T @ weight.flatten(1))
    if part.bias:
        bias = model.network.get_parameter(part.bias)
        rows = slice(*part.rows)
        bias[rows] = (_float64(bias)[rows] @ change).to(bias)


def _rotate_rows(model: QuantizedModel, heads: list[Rows], rotation: Tensor) -> None:
    """Multiplies the outputs of heads, as rows, with a matrix."""
    for part, rows in heads:
        index = [part.rows[0] + row for row in rows]
        weight = model.network.get_parameter(part.weight)
        chosen = _float64(weight)[index]
        weight[index] = (rotation.T @ chosen.flatten(1)).reshape(chosen.shape).to(weight)
        if part.bias:
            bias = model.network.get_parameter(part.bias)
            bias[index] = (_float64(bias)[index] @ rotation).to(bias)
        places = [place for row in rows if part.made_of and (place := part.made_of[row])]
        if places:
            values = torch.stack([_float64(model.network.get_parameter(name))[at] for name, at in places])
            _put_numbers(model, places, values @ rotation)


def _rotate_values(model: QuantizedModel, attention: Attention, generator: torch.Generator) -> None:
    """Rotates values, and the columns of the layers that take the output."""
    heads = attention.value or []
    sizes = {len(rows) for _, rows in heads}
    rotation = orthogonal(sizes.pop(), generator)
    _rotate_rows(model, heads, rotation)
    for part, columns in {id(part): (part, columns) for part, columns in attention.takers}.values():
        weight = model.network.get_parameter(part.weight)
        rows = slice(*part.rows)
        changed = _float64(weight)[rows]
        for each in columns:
            changed[:, each] = changed[:, each] @ rotation
        weight[rows] = changed.to(weight)


def _rows_of(model: QuantizedModel, part: Part) -> Tensor:
    """The rows of a weight, float64 on the CPU."""
    return _float64(model.network.get_parameter(part.weight))[slice(*part.rows)]


def _put_rows(model: QuantizedModel, part: Part, values: Tensor) -> None:
    weight = model.network.get_parameter(part.weight)
    rows = weight[slice(*part.rows)]
    rows.copy_(values.reshape(rows.shape))


def _add_to_bias(model: QuantizedModel, part: Part, values: Tensor) -> None:
    """Adds to the bias of a layer, which gets one if it has none. Numbers that are always zero stay so."""
    if part.made_of:
        changes = [(place, value) for place, value in zip(part.made_of, values, strict=True) if place]
        numbers = [_float64(model.network.get_parameter(name))[at] + value for (name, at), value in changes]
        _put_numbers(model, [place for place, _ in changes], torch.stack(numbers))
        return
    if part.bias is None:
        part.bias = part.weight.removesuffix("weight") + "bias"
    rows = model.bias(part.bias)[slice(*part.rows)]
    rows.copy_(_float64(rows) + values)


def _put_numbers(model: QuantizedModel, places: list[tuple[str, int]], values: Tensor) -> None:
    """Stores numbers at their places in parameters."""
    for (name, index), value in zip(places, values, strict=True):
        model.network.get_parameter(name)[index] = value


def _float64(tensor: Tensor) -> Tensor:
    """A copy on the CPU, where every device's numbers can be float64."""
    return tensor.detach().cpu().double().clone()
