"""Carries images through the blocks of a network, one block after the other."""

from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from typing import Any

import torch
from attrs import define, field
from einops import rearrange
from torch import Tensor, nn

from spdfq.backends.blocks import BlockCall, Hidden
from spdfq.runtime.shared_modules import own_hooks


def of_images(hidden: Hidden, images: int, chosen: Tensor | slice) -> Hidden:
    """The part of ``hidden``, which holds so many ``images``, that belongs to the chosen ones."""
    parts = (rearrange(tensor, "(b rows) ... -> b rows ...", b=images)[chosen] for tensor in hidden)
    # cloned, because a block may change its input in place
    return tuple(rearrange(part, "b rows ... -> (b rows) ...").clone() for part in parts)


class _BlockReached(Exception):
    pass


@define(eq=False)
class Propagation:
    """Images on their way through the blocks of a network, one block after the other.

    For each block in turn, `inputs_of` gives its inputs and `through` computes its outputs, which are the inputs of a
    block that follows directly.

    Args:
        network: owns the blocks.
        images: ``[n, C, H, W]``.
        batch: images per forward pass.
    """

    network: nn.Module
    images: Tensor
    batch: int
    _position: int | None = field(default=None, init=False)
    _outputs: Hidden = field(default=(), init=False)

    def inputs_of(self, call: BlockCall) -> Hidden:
        """What enters a block: the outputs of the block before it, or computed by a forward pass that stops there."""
        if call.follows and self._position == call.position - 1:
            return self._outputs
        return joined([self._stopped_at(call, self.images[part]) for part in self._parts()])

    @torch.no_grad()
    def through(self, call: BlockCall, hidden: Hidden) -> Hidden:
        """The outputs of a block for its inputs ``hidden``; they are kept for the next block."""
        parts = [call.run(self.network, of_images(hidden, len(self.images), part)) for part in self._parts()]
        self._position, self._outputs = call.position, joined(parts)
        return self._outputs

    def _parts(self) -> Iterator[slice]:
        return (slice(start, start + self.batch) for start in range(0, len(self.images), self.batch))

    @torch.no_grad()
    def _stopped_at(self, call: BlockCall, images: Tensor) -> Hidden:
        found: list[Hidden] = []

        def stop(_: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            found.append(call.streams_of(args, kwargs))
            raise _BlockReached

        begin = partial(self.network.get_submodule(call.name).register_forward_pre_hook, with_kwargs=True)
        with suppress(_BlockReached), own_hooks([(begin, stop)]):
            self.network(images)
        return found[0]


def joined(parts: list[Hidden]) -> Hidden:
    """The hidden states of all images, from those of parts of them."""
    return tuple(torch.cat(column) for column in zip(*parts, strict=True))
