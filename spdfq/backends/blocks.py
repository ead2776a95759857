"""The blocks of a transformer, and how to call one alone as the network would call it."""

import operator
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import torch
from attrs import frozen
from torch import Tensor, nn

from spdfq.errors import ModelError
from spdfq.quantized.model import QuantizedModel
from spdfq.quantized.sites import ATTENTION
from spdfq.runtime.shared_modules import Hook, own_hooks

K = TypeVar("K")
Hidden = tuple[Tensor, ...]
"""Hidden states ``[n * k, ...]`` of n images: k rows for each, image by image (k > 1: windows, inner tokens)."""


def block_names(model: QuantizedModel) -> list[str]:
    """Names of the blocks, in the order they run: the numbered modules that hold an attention product.

    They are ``blocks.0`` for a ViT, ``layers.1.blocks.0`` for a Swin, ``encoder.layers.encoder_layer_0`` for
    torchvision's ViT. A numbered module that holds other blocks is not
    a block; attention beside those blocks (``stages.1.downsample`` of a LeViT) is a block of its own.

    Raises:
        ModelError: no numbered module of the model has attention.
    """
    attending = [name.rpartition(".")[0] for name, site in model.sites.items() if site.kind in ATTENTION]
    ancestors = {name: block for name in attending if (block := _numbered_ancestor(name))}
    numbered = set(ancestors.values())
    found = dict.fromkeys(_without_other_blocks(block, name, numbered) for name, block in ancestors.items())
    if not found:
        raise ModelError(f"{type(model.network).__name__}: has no numbered blocks with attention to reconstruct")
    return list(found)


def _numbered_ancestor(name: str) -> str:
    """The innermost ancestor whose last component is a number or ends in ``_`` and a number, or an empty string."""
    parts = name.split(".")
    while parts and not parts[-1].rpartition("_")[2].isdigit():
        parts.pop()
    return ".".join(parts)


def _without_other_blocks(block: str, attending: str, others: set[str]) -> str:
    """The block, or the largest part of it that holds the attending module but none of the other blocks."""
    while block != attending and any(other.startswith(f"{block}.") for other in others):
        end = attending.find(".", len(block) + 1)
        block = attending if end < 0 else attending[:end]
    return block


@frozen(eq=False)
class BlockCall:
    """How the network calls a block.

    The streams of a block are those of its tensors that hold rows for every image. All other arguments (rotary
    embeddings, sizes) are the same for all images. Images are on the first axis of a hidden state; the block may have
    them on another one (``[tokens, images, d]`` in CLIP).

    Args:
        name: name of the block.
        position: index of the call among all block calls of a forward pass.
        given: the arguments of the block, positional ones by number and others by name, with ``None`` for each stream.
        streams: the axis of the images in each argument that is a stream, by number or name.
        output: what the block returned for one image.
        returned: the axis of the images in each stream that the block returns, by its index among the tensors returned.
        follows: whether its streams are the very tensors that the previous block call returned.
    """

    name: str
    position: int
    given: dict[int | str, Any]
    streams: dict[int | str, int]
    output: Any
    returned: dict[int, int]
    follows: bool

    def streams_of(self, args: tuple, kwargs: dict[str, Any]) -> Hidden:
        """The streams among the arguments of a call."""
        given = _by_number_or_name(args, kwargs)
        return tuple(given[key].movedim(axis, 0) for key, axis in self.streams.items())

    def run(self, network: nn.Module, hidden: Hidden) -> Hidden:
        """The streams that the block returns for its input streams ``hidden``."""
        taken = zip(self.streams.items(), hidden, strict=True)
        given = self.given | {key: tensor.movedim(0, axis).contiguous() for (key, axis), tensor in taken}
        args = [value for key, value in given.items() if isinstance(key, int)]
        kwargs = {key: value for key, value in given.items() if isinstance(key, str)}
        return self.returned_streams(network.get_submodule(self.name)(*args, **kwargs))

    def output_of(self, hidden: Hidden) -> Any:
        """What the block returns when the streams that it returns are ``hidden``."""
        pairs = zip(self.returned.items(), hidden, strict=True)
        streams = {index: tensor.movedim(0, axis).contiguous() for (index, axis), tensor in pairs}
        return with_tensors(self.output, streams)

    def on_output(self, network: nn.Module, function: Callable[[Hidden], object]) -> Hook:
        """A hook for `own_hooks` that calls ``function`` with the streams that the block returns."""
        block = network.get_submodule(self.name)
        return block.register_forward_hook, lambda *args: function(self.returned_streams(args[-1]))

    def returned_streams(self, output: Any) -> Hidden:
        """The streams in what the block returned."""
        tensors = tensors_of(output)
        return tuple(tensors[index].movedim(axis, 0) for index, axis in self.returned.items())


def block_calls(network: nn.Module, names: list[str], example: Tensor) -> list[BlockCall]:
    """How a forward pass of an example ``[1, C, H, W]`` calls each block; of several calls of a block, the first.

    Raises:
        ModelError: a block is not called, or has no streams.
    """
    calls: dict[str, BlockCall] = {}
    for call in all_block_calls(network, names, example):
        calls.setdefault(call.name, call)
    if missing := [name for name in names if name not in calls]:
        raise ModelError(f"{missing[0]}: is never called itself, only its parts are, so it cannot be reconstructed")
    return list(calls.values())


def all_block_calls(network: nn.Module, names: list[str], example: Tensor) -> list[BlockCall]:
    """Every call of a block in a forward pass of an example ``[1, C, H, W]``, in order.

    Two forward passes, with one image and with two, show which tensors are streams: those whose length doubles.

    Raises:
        ModelError: a block has no streams.
    """
    one_image, two_images = (_recorded_calls(network, names, example.repeat(count, 1, 1, 1)) for count in (1, 2))
    calls: list[BlockCall] = []
    previous: Hidden = ()
    for position, (one, two) in enumerate(zip(one_image, two_images, strict=True)):
        calls.append(_block_call(position, one, two, previous))
        tensors = tensors_of(one.output)
        previous = tuple(tensors[index] for index in calls[-1].returned)
    return calls


@frozen(eq=False)
class _RecordedCall:
    name: str
    given: dict[int | str, Any]
    output: Any


def _block_call(position: int, one: _RecordedCall, two: _RecordedCall, previous: Hidden) -> BlockCall:
    """A call, from its records with one and with two images; ``previous`` are the streams the call before returned."""
    streams = _image_axes(one.given, two.given)
    returned = _image_axes(*(dict(enumerate(tensors_of(seen.output))) for seen in (one, two)))
    if not streams or not returned:
        raise ModelError(f"{one.name}: takes or returns no tensor of every image, so it cannot be reconstructed")
    taken = tuple(one.given[key] for key in streams)
    follows = len(taken) == len(previous) and all(map(operator.is_, taken, previous))
    given = one.given | dict.fromkeys(streams)
    return BlockCall(one.name, position, given, streams, one.output, returned, follows)


def _image_axes(one: dict[K, Any], two: dict[K, Any]) -> dict[K, int]:
    """The axis of each tensor that is twice as long with two images as with one; others are left out."""
    pairs = {key: (tensor.shape, two[key].shape) for key, tensor in one.items() if isinstance(tensor, Tensor)}
    doubled = {
        key: [axis for axis, (length, other) in enumerate(zip(*shapes, strict=False)) if other == 2 * length > 0]
        for key, shapes in pairs.items()
    }
    return {key: axes[0] for key, axes in doubled.items() if axes}


@torch.no_grad()
def _recorded_calls(network: nn.Module, names: list[str], images: Tensor) -> list[_RecordedCall]:
    """All calls of the blocks in one forward pass."""
    calls: list[_RecordedCall] = []

    def recorder(name: str) -> Any:
        def record(_: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
            calls.append(_RecordedCall(name, _by_number_or_name(args, kwargs), output))

        return record

    blocks = {name: network.get_submodule(name) for name in names}
    with own_hooks(
        (partial(block.register_forward_hook, with_kwargs=True), recorder(name)) for name, block in blocks.items()
    ):
        network(images)
    return calls


def _by_number_or_name(args: tuple, kwargs: dict[str, Any]) -> dict[int | str, Any]:
    numbered: dict[int | str, Any] = dict(enumerate(args))
    return numbered | kwargs


def tensors_of(output: Any) -> Hidden:
    """The tensors among what a block returns."""
    return (output,) if isinstance(output, Tensor) else tuple(item for item in output if isinstance(item, Tensor))


def with_tensors(output: Any, tensors: dict[int, Tensor]) -> Any:
    """A block's output with other tensors in some places, which are counted among its tensors."""
    if isinstance(output, Tensor):
        return tensors.get(0, output)
    items = list(output)
    places = [place for place, item in enumerate(items) if isinstance(item, Tensor)]
    for index, tensor in tensors.items():
        items[places[index]] = tensor
    return type(output)(*items) if hasattr(output, "_fields") else type(output)(items)
