"""The blocks of a transformer, and how they are called."""

import operator
from collections.abc import Callable
from typing import Any

import torch
from attrs import frozen
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from spdfq.errors import ModelError
from spdfq.quantized.model import QuantizedModel
from spdfq.quantized.products import ATTENTION

Hidden = tuple[Tensor, ...]
"""Tensors ``[n * k, ...]`` that hold k rows for each of n images, image by image (k > 1: windows, inner tokens)."""


def block_names(model: QuantizedModel) -> list[str]:
    """Names of the blocks, in the order they run: the numbered modules that hold an attention product.

    ``blocks.0`` for a ViT, ``layers.1.blocks.0`` for a Swin. A numbered module that holds other blocks is none itself;
    attention beside them (``stages.1.downsample`` of a LeViT) is a block of its own.

    Raises:
        ModelError: the model has no attention in numbered modules.
    """
    attending = [name.rpartition(".")[0] for name, site in model.sites.items() if site.kind in ATTENTION]
    numbered = {_numbered(name) for name in attending} - {""}
    found = dict.fromkeys(_apart(_numbered(name), name, numbered) for name in attending if _numbered(name))
    if not found:
        raise ModelError(f"{type(model.network).__name__}: has no numbered blocks with attention to reconstruct")
    return list(found)


def _numbered(name: str) -> str:
    """The innermost ancestor whose last component is a number, or an empty string."""
    parts = name.split(".")
    while parts and not parts[-1].isdigit():
        parts.pop()
    return ".".join(parts)


def _apart(block: str, attending: str, others: set[str]) -> str:
    """The block, or what of it holds the attending module but none of the other blocks."""
    while block != attending and any(other.startswith(f"{block}.") for other in others):
        end = attending.find(".", len(block) + 1)
        block = attending if end < 0 else attending[:end]
    return block


@frozen(eq=False)
class BlockCall:
    """How a block is called.

    Args:
        name: of the block.
        position: of the call, among all calls of blocks in a forward pass.
        given: its arguments, positional ones by number and the others by name; ``None`` in place of each tensor that
            holds something of every image. What else there is is the same for all images (rotary embeddings, sizes).
        streams: positions and names of those tensors.
        returned: positions, among the tensors it returns, of those that hold something of every image.
        follows: its streams are the very tensors that the call before returned.
    """

    name: str
    position: int
    given: dict[int | str, Any]
    streams: tuple[int | str, ...]
    returned: tuple[int, ...]
    follows: bool

    def taken(self, args: tuple, kwargs: dict[str, Any]) -> Hidden:
        """What of a call's arguments belongs to the images."""
        given = _numbered_arguments(args, kwargs)
        return tuple(given[key] for key in self.streams)

    def run(self, network: nn.Module, hidden: Hidden) -> Hidden:
        """The block's output, as far as it belongs to the images."""
        given = self.given | dict(zip(self.streams, hidden, strict=True))
        args = [value for key, value in given.items() if isinstance(key, int)]
        kwargs = {key: value for key, value in given.items() if isinstance(key, str)}
        return self._of_images(network.get_submodule(self.name)(*args, **kwargs))

    def watch(self, network: nn.Module, told: Callable[[Hidden], object]) -> RemovableHandle:
        """Tells of the block's output, as far as it belongs to the images, in every forward pass of the network."""
        return network.get_submodule(self.name).register_forward_hook(lambda *args: told(self._of_images(args[-1])))

    def _of_images(self, output: Any) -> Hidden:
        tensors = _tensors(output)
        return tuple(tensors[index] for index in self.returned)


def block_calls(network: nn.Module, names: list[str], example: Tensor) -> list[BlockCall]:
    """How a forward pass of an example ``[1, C, H, W]`` calls each block, for the first time if there are more.

    Raises:
        ModelError: a block that is not called, or takes or returns nothing that grows with the number of images.
    """
    single, double = (_watched(network, names, example.repeat(count, 1, 1, 1)) for count in (1, 2))
    calls: dict[str, BlockCall] = {}
    before: Hidden = ()
    for position, (one, two) in enumerate(zip(single, double, strict=True)):
        streams = tuple(key for key, value in one.given.items() if _grows(value, two.given[key]))
        returned = tuple(index for index, value in enumerate(one.output) if _grows(value, two.output[index]))
        if not streams or not returned:
            raise ModelError(f"{one.name}: takes or returns no tensor of every image, so it cannot be reconstructed")
        taken = tuple(one.given[key] for key in streams)
        follows = len(taken) == len(before) and all(map(operator.is_, taken, before))
        given = one.given | dict.fromkeys(streams)
        calls.setdefault(one.name, BlockCall(one.name, position, given, streams, returned, follows))
        before = tuple(one.output[index] for index in returned)
    if missing := [name for name in names if name not in calls]:
        raise ModelError(f"{missing[0]}: is never called itself, only its parts are, so it cannot be reconstructed")
    return list(calls.values())


@frozen(eq=False)
class _Seen:
    name: str
    given: dict[int | str, Any]
    output: Hidden


@torch.no_grad()
def _watched(network: nn.Module, names: list[str], images: Tensor) -> list[_Seen]:
    """Every call of a block in one forward pass."""
    seen: list[_Seen] = []

    def watch(name: str) -> Any:
        def called(_: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
            seen.append(_Seen(name, _numbered_arguments(args, kwargs), _tensors(output)))

        return called

    handles = [network.get_submodule(name).register_forward_hook(watch(name), with_kwargs=True) for name in names]
    try:
        network(images)
    finally:
        for handle in handles:
            handle.remove()
    return seen


def _numbered_arguments(args: tuple, kwargs: dict[str, Any]) -> dict[int | str, Any]:
    numbered: dict[int | str, Any] = dict(enumerate(args))
    return numbered | kwargs


def _grows(one: Any, two: Any) -> bool:
    """Whether a tensor of one image has twice the length with two images."""
    return isinstance(one, Tensor) and one.ndim > 0 and len(two) == 2 * len(one)


def _tensors(output: Any) -> Hidden:
    return (output,) if isinstance(output, Tensor) else tuple(item for item in output if isinstance(item, Tensor))
