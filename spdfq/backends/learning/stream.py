"""Images on their way through the blocks of a network, one block after the other."""

from collections.abc import Iterator
from typing import Any

import torch
from attrs import define, field
from torch import Tensor, nn

from spdfq.backends.learning.blocks import BlockCall, Hidden


def rows(hidden: Hidden, images: int, chosen: Tensor | slice) -> Hidden:
    """What belongs to the chosen ones of so many images."""
    # cloned, because a block may add to its argument in place
    return tuple(tensor.unflatten(0, (images, -1))[chosen].flatten(0, 1).clone() for tensor in hidden)


class _Reached(Exception):
    pass


@define(eq=False)
class Stream:
    """Images on their way through the blocks of a network, one block after the other.

    Args:
        network: whose blocks.
        images: ``[n, C, H, W]``.
        batch: images per forward pass.
    """

    network: nn.Module
    images: Tensor
    batch: int
    _left: int | None = field(default=None, init=False)
    _output: Hidden = field(default=(), init=False)

    def enter(self, call: BlockCall) -> Hidden:
        """What reaches a block: the output of the block before it, or what forward passes that stop there bring."""
        if call.follows and self._left == call.position - 1:
            return self._output
        return _joined([self._stopped_at(call, self.images[part]) for part in self._parts()])

    @torch.no_grad()
    def leave(self, call: BlockCall, hidden: Hidden) -> Hidden:
        """The block's output, kept for the block that follows."""
        parts = [call.run(self.network, rows(hidden, len(self.images), part)) for part in self._parts()]
        self._left, self._output = call.position, _joined(parts)
        return self._output

    def _parts(self) -> Iterator[slice]:
        return (slice(start, start + self.batch) for start in range(0, len(self.images), self.batch))

    @torch.no_grad()
    def _stopped_at(self, call: BlockCall, images: Tensor) -> Hidden:
        found: list[Hidden] = []

        def stop(_: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            found.append(call.taken(args, kwargs))
            raise _Reached

        handle = self.network.get_submodule(call.name).register_forward_pre_hook(stop, with_kwargs=True)
        try:
            self.network(images)
        except _Reached:
            pass
        finally:
            handle.remove()
        return found[0]


def _joined(parts: list[Hidden]) -> Hidden:
    return tuple(torch.cat(column) for column in zip(*parts, strict=True))
