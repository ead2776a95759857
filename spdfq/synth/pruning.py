"""Token pruning: unimportant patches are left out of the forward passes, which makes them cheaper."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any, Literal

import torch
from attrs import define, field, frozen, validators
from einops import rearrange, repeat
from torch import Tensor, nn
from torch.nn import functional

from spdfq.attention import AttentionRecord, prefix_tokens, record_attention
from spdfq.errors import DataError, SpdfqError
from spdfq.recipe.structure import Checked
from spdfq.runtime.shared_modules import own_hooks
from spdfq.synth.changes import Change, follow_all
from spdfq.synth.sources import noise
from spdfq.teacher import Teacher

Grid = tuple[int, int]


def _ascending(_: Any, __: Any, value: tuple[int, ...]) -> None:
    if not value or value[0] < 1 or any(later <= earlier for earlier, later in pairwise(value)):
        raise ValueError(f"expected iterations from 1 up in ascending order, got {list(value)}")


@frozen(kw_only=True)
class TokenPruning(Checked):
    """Leave out the patches that the class token attends to least, or most.

    The teacher's blocks no longer see these patches, so an iteration costs less and no loss of the model reaches their
    pixels any more. Each image loses its own patches. Crops keep all patches. The model must have a class token and add
    its position embeddings before the blocks.

    Leaving out the least important patches is Sparse Model Inversion (arXiv 2510.27186). Leaving out the most important
    ones, whose pixels are then finished and do not change any more, is Patch Rebirth Inversion (arXiv 2509.23235, our
    reading of its abstract).

    Args:
        at: iterations before which some of the remaining patches are left out.
        share: share of the remaining patches that is left out each time, rounded down to whole patches.
        leave_out: which of the remaining patches.
    """

    at: tuple[int, ...] = field(default=(50, 100, 200, 300), validator=_ascending)
    share: float = field(default=0.3, validator=[validators.gt(0.0), validators.lt(1.0)])
    leave_out: Literal["least_attended", "most_attended"] = "least_attended"

    def left(self, patches: int, iteration: int) -> int:
        """How many patches of an image remain in an iteration."""
        for _ in range(sum(iteration >= start for start in self.at)):
            patches -= int(self.share * patches)
        return patches


@define(eq=False)
class Pruner:
    """Which patches of each image of a group remain.

    Args:
        spec: when and how many patches are left out.
        layout: where the patch tokens are in the network.
        alive: ``[B, h*w]`` boolean: the patches that remain, in the images before augmentation.
    """

    spec: TokenPruning
    layout: "TokenLayout"
    alive: Tensor

    def due(self, iteration: int) -> bool:
        """Whether patches are left out before this iteration."""
        return iteration in self.spec.at

    def prune(self, scores: Tensor, iteration: int) -> None:
        """Leave out the patches with the lowest scores, or the highest.

        Args:
            scores: ``[B, K]``, one for each patch that remained until now, in order.
            iteration: decides how many remain.
        """
        remaining = self.spec.left(self.alive.shape[1], iteration)
        kept = scores.topk(remaining, largest=self.spec.leave_out == "least_attended").indices
        positions = _positions(self.alive, scores.shape[1]).gather(1, kept)
        self.alive.zero_().scatter_(1, positions, True)

    def tokens(self, iteration: int, changes: tuple[Change, ...], size: tuple[int, int]) -> Tensor | None:
        """``[B, K]`` patch tokens of the augmented images that remain, ascending; ``None`` if all remain."""
        remaining = self.spec.left(self.alive.shape[1], iteration)
        if remaining == self.alive.shape[1]:
            return None
        maps = rearrange(self.alive.float(), "b (h w) -> b 1 h w", h=self.layout.grid[0])
        moved = follow_all(changes, maps, size, nearest=True)
        return _positions(rearrange(moved, "b 1 h w -> b (h w)"), remaining)

    def finished(self, images: Tensor) -> Tensor | None:
        """``[B, 1, H, W]`` boolean: the pixels that must not change any more; ``None`` if all may.

        Args:
            images: ``[B, C, H, W]``, before augmentation.
        """
        if self.spec.leave_out == "least_attended":
            return None
        finished = rearrange(~self.alive, "b (h w) -> b 1 h w", h=self.layout.grid[0])
        return functional.interpolate(finished.float(), images.shape[-2:], mode="nearest-exact").bool()

    def tensors(self) -> dict[str, Tensor]:
        """What must be stored."""
        return {"alive": self.alive}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Load what `tensors` returned.

        Raises:
            DataError: it belongs to another group.
        """
        stored = tensors.get("alive")
        if stored is None or stored.shape != self.alive.shape:
            found = "missing" if stored is None else list(stored.shape)
            raise DataError(f"the remaining patches are {found}, expected {list(self.alive.shape)}")
        self.alive.copy_(stored)


def _positions(alive: Tensor, count: int) -> Tensor:
    """``[B, count]`` ascending positions of the nonzero entries in each row.

    Sorting needs no count of them, which an accelerator would have to be waited for.
    """
    return alive.to(torch.uint8).sort(dim=1, descending=True, stable=True).indices[:, :count]


@frozen
class TokenLayout:
    """Where a network's patch tokens are.

    Args:
        block: name of the first block.
        grid: token grid ``(h, w)``.
        prefix: number of tokens before the patch tokens.
    """

    block: str
    grid: Grid
    prefix: int

    @contextmanager
    def only(self, network: nn.Module, tokens: Tensor | None) -> Iterator[None]:
        """Inside the ``with`` block, the blocks see the prefix and these patch tokens only.

        Args:
            network: a network of this layout.
            tokens: ``[B, K]``; ``None`` means all.
        """
        if tokens is None:
            yield
            return
        prefix = repeat(torch.arange(self.prefix, device=tokens.device), "n -> b n", b=len(tokens))
        chosen = torch.cat([prefix, self.prefix + tokens], 1)

        def gather(_: nn.Module, args: tuple) -> tuple:
            return args[0].gather(1, repeat(chosen, "b n -> b n d", d=args[0].shape[-1])), *args[1:]

        with own_hooks([(network.get_submodule(self.block).register_forward_pre_hook, gather)]):
            yield

    def scores(self, record: AttentionRecord) -> Tensor:
        """``[B, K]``: attention of the class token in the last block, mean over heads."""
        return record.class_attention[-1].mean(1)


@torch.no_grad()
def find_token_layout(teacher: Teacher) -> TokenLayout:
    """Find where to leave patches out, and try whether the model allows it.

    Raises:
        SpdfqError: the model has no class token, does not attend over all patches, or has blocks that depend on the
            position of a token in the sequence (rotary or relative positions, convolutions).
    """
    prefix, has_class = prefix_tokens(teacher.module)
    if not has_class:
        raise SpdfqError(_refusal(teacher, "has no class token to rank its patches by"))
    image = noise(1, teacher, torch.Generator().manual_seed(0)).to(teacher.device)
    with teacher.frozen() as network:
        with record_attention(network) as record:
            logits = network(image)
        grid, block = record.grids[0], re.match(r"(.*?\d+)(?:\.|$)", record.names[0])
        if block is None or len({row.shape[-1] for row in record.class_attention}) > 1:
            raise SpdfqError(_refusal(teacher, "has no numbered blocks that all attend over the same patches"))
        layout = TokenLayout(block[1], grid, prefix)
        if why := _why_unfit(network, layout, image, logits):
            raise SpdfqError(_refusal(teacher, why))
    return layout


def _why_unfit(network: nn.Module, layout: TokenLayout, image: Tensor, logits: Tensor) -> str | None:
    """Why the blocks cannot run without some patches; ``None`` if they can.

    Attention without positions ignores the order of the tokens. So the logits must not change if the order does.
    """
    everything = repeat(torch.arange(layout.grid[0] * layout.grid[1], device=image.device), "n -> 1 n")
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


def _refusal(teacher: Teacher, why: str) -> str:
    return f"synthesis.pruning: {teacher.name} {why}; leave [synthesis.pruning] out"
