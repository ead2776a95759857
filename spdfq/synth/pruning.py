"""Token pruning: patches that hardly matter leave the forward passes, which then cost less."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
from attrs import define, field, frozen, validators
from torch import Tensor, nn

from spdfq.attention import AttentionRecord, prefix_tokens, record_attention
from spdfq.errors import DataError, SpdfqError
from spdfq.synth.changes import Change, follow_all
from spdfq.synth.sources import noise
from spdfq.teacher import Teacher

Grid = tuple[int, int]


def _ascending(_: Any, __: Any, value: tuple[int, ...]) -> None:
    if not value or value[0] < 1 or any(later <= earlier for earlier, later in pairwise(value)):
        raise ValueError(f"expected iterations from 1 up in ascending order, got {list(value)}")


@frozen(kw_only=True)
class TokenPruning:
    """Leave out the patches that the class token attends to least (Sparse Model Inversion, arXiv 2510.27186).

    From then on they are absent from the teacher's blocks, so that an iteration costs less; no model loss reaches their
    pixels any more. Each image has its own. Crops are forwarded whole. It takes a class token and position
    embeddings that are added before the blocks.

    Args:
        at: iterations before which some of the remaining patches are left out.
        share: of the remaining patches, rounded down.
    """

    at: tuple[int, ...] = field(default=(50, 100, 200, 300), validator=_ascending)
    share: float = field(default=0.3, validator=[validators.gt(0.0), validators.lt(1.0)])

    def left(self, patches: int, iteration: int) -> int:
        """How many of the patches take part in an iteration."""
        for _ in range(sum(iteration >= start for start in self.at)):
            patches -= int(self.share * patches)
        return patches


@define(eq=False)
class Pruner:
    """Which patches of each image of a group are left.

    Args:
        spec: when and how many are left out.
        layout: where in the network.
        alive: ``[B, h*w]`` boolean, in the images as they are before they are augmented.
    """

    spec: TokenPruning
    layout: "TokenLayout"
    alive: Tensor

    def due(self, iteration: int) -> bool:
        """Whether patches are left out before this iteration."""
        return iteration in self.spec.at

    def prune(self, scores: Tensor, iteration: int) -> None:
        """Leave out the patches of the lowest ``scores`` ``[B, K]``, which are those of the patches left so far."""
        kept = self.spec.left(self.alive.shape[1], iteration)
        best = scores.topk(kept).indices
        positions = _positions(self.alive, scores.shape[1]).gather(1, best)
        self.alive.zero_().scatter_(1, positions, True)

    def tokens(self, iteration: int, changes: tuple[Change, ...], size: tuple[int, int]) -> Tensor | None:
        """``[B, K]`` patch tokens of the augmented images that are left, ascending; nothing where all are."""
        kept = self.spec.left(self.alive.shape[1], iteration)
        if kept == self.alive.shape[1]:
            return None
        maps = self.alive.float().view(-1, 1, *self.layout.grid)
        return _positions(follow_all(changes, maps, size, nearest=True).flatten(1), kept)

    def tensors(self) -> dict[str, Tensor]:
        """What must be stored."""
        return {"alive": self.alive}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Take up what `tensors` gave.

        Raises:
            DataError: it is of another group.
        """
        stored = tensors.get("alive")
        if stored is None or stored.shape != self.alive.shape:
            found = "nothing" if stored is None else list(stored.shape)
            raise DataError(f"the patches left are {found}, expected {list(self.alive.shape)}")
        self.alive.copy_(stored)


def _positions(alive: Tensor, kept: int) -> Tensor:
    """``[B, kept]`` where a row is not zero, ascending; without waiting for an accelerator to count."""
    return alive.to(torch.uint8).sort(dim=1, descending=True, stable=True).indices[:, :kept]


@frozen
class TokenLayout:
    """Where a network's patch tokens are.

    Args:
        block: name of its first block.
        grid: ``(h, w)``.
        prefix: tokens before the patches.
    """

    block: str
    grid: Grid
    prefix: int

    @contextmanager
    def only(self, network: nn.Module, tokens: Tensor | None) -> Iterator[None]:
        """Inside, the blocks see the prefix and these patch tokens ``[B, K]`` alone; all where there are none given."""
        if tokens is None:
            yield
            return
        prefix = torch.arange(self.prefix, device=tokens.device).expand(len(tokens), -1)
        chosen = torch.cat([prefix, self.prefix + tokens], 1).unsqueeze(-1)

        def gather(_: nn.Module, args: tuple) -> tuple:
            return args[0].gather(1, chosen.expand(-1, -1, args[0].shape[-1])), *args[1:]

        handle = network.get_submodule(self.block).register_forward_pre_hook(gather)
        try:
            yield
        finally:
            handle.remove()

    def scores(self, record: AttentionRecord) -> Tensor:
        """``[B, K]`` the class token's attention in the last block, mean over heads."""
        return record.class_attention[-1].mean(1)


@torch.no_grad()
def find_token_layout(teacher: Teacher) -> TokenLayout:
    """Where to leave patches out, after a look at whether the model allows it.

    Raises:
        SpdfqError: no class token, attention that is not over all patches, or blocks that depend on where in the
            sequence a token stands (rotary or relative positions, convolutions).
    """
    prefix, has_class = prefix_tokens(teacher.module)
    if not has_class:
        raise SpdfqError(_refused(teacher, "has no class token to rank its patches by"))
    image = noise(1, teacher, torch.Generator().manual_seed(0)).to(teacher.device)
    with teacher.frozen() as network:
        with record_attention(network) as record:
            logits = network(image)
        grid, block = record.grids[0], re.match(r"(.*?\d+)(?:\.|$)", record.names[0])
        if block is None or len({row.shape[-1] for row in record.class_attention}) > 1:
            raise SpdfqError(_refused(teacher, "has no numbered blocks that all attend over the same patches"))
        layout = TokenLayout(block[1], grid, prefix)
        if why := _unfit(network, layout, image, logits):
            raise SpdfqError(_refused(teacher, why))
    return layout


def _unfit(network: nn.Module, layout: TokenLayout, image: Tensor, logits: Tensor) -> str | None:
    """Why the blocks cannot do without some patches; attention alone would not notice their order either."""
    everything = torch.arange(layout.grid[0] * layout.grid[1], device=image.device).unsqueeze(0)
    try:
        with layout.only(network, everything.flip(1)):
            reversed_ = network(image)
        if not torch.allclose(reversed_, logits, rtol=1e-3, atol=1e-3 * float(logits.abs().max())):
            return "has blocks that depend on where in the sequence a patch stands"
        with layout.only(network, everything[:, 1:]):
            network(image)
    except (RuntimeError, ValueError, IndexError, TypeError, AssertionError) as error:
        return f"cannot run without some of its patches ({str(error).partition(chr(10))[0]})"
    return None


def _refused(teacher: Teacher, why: str) -> str:
    return f"synthesis.pruning: {teacher.name} {why}; leave [synthesis.pruning] out"
