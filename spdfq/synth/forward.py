"""The forward passes of a group: which views and tokens the teacher sees together, and what is recorded."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial

import torch
from attrs import frozen
from torch import Tensor, nn

from spdfq.attention import CLASS_ATTENTION, AttentionRecord, record_attention
from spdfq.runtime import Runtime
from spdfq.synth.compiled import CompiledPasses
from spdfq.synth.pruning import Pruner, TokenPruning, find_token_layout
from spdfq.teacher import Teacher


@frozen(eq=False)
class ForwardPasses:
    """Forward passes over the images of a group and their crops.

    Args:
        teacher: in evaluation mode.
        runtime: gives the precision.
        count: B, number of images in the group.
        pruner: which patches of the images remain; ``None`` without token pruning.
        compiled: runs the recorded passes that are differentiated; ``None`` runs them as they are written.
    """

    teacher: Teacher
    runtime: Runtime
    count: int
    pruner: Pruner | None
    compiled: CompiledPasses | None = None

    def logits(self, views: Tensor) -> Tensor:
        """The teacher's logits, float32 ``[n, K]``, for views ``[n, C, h, w]``; nothing is recorded."""
        with self.runtime.autocast():
            logits: Tensor = self.teacher.module(views).float()
        return logits

    def recorded(
        self, images: Tensor, crops: Tensor | None, needs: frozenset[str], tokens: Tensor | None
    ) -> tuple[Tensor, AttentionRecord]:
        """Pass images and crops through the teacher, and record its attention to the images.

        Args:
            images: ``[B, C, h, w]``.
            crops: ``[M, C, h, w]``.
            needs: what to record.
            tokens: ``[B, K]`` the patch tokens of the images that remain; ``None`` means all.

        Returns:
            Logits float32 ``[B+M, K]``, and the record.
        """
        # crops keep all their patches, so they need a pass of their own if some patches of the images are left out
        together = [] if crops is None or tokens is not None else [crops]
        inputs = [torch.cat([images, *together]), *([] if tokens is None else [tokens])]
        forward = partial(self._recorded, needs)
        if self.compiled and torch.is_grad_enabled():
            logits, record = self.compiled((needs, self.count), forward, *inputs)
        else:
            logits, record = forward(*inputs)
        if crops is not None and tokens is not None:
            logits = torch.cat([logits, self.logits(crops)])
        return logits, record

    def _recorded(
        self, needs: frozenset[str], views: Tensor, tokens: Tensor | None = None
    ) -> tuple[Tensor, AttentionRecord]:
        with self.recording(self.teacher.module, needs, tokens) as record:
            logits: Tensor = self.teacher.module(views).float()
        return logits, record

    @contextmanager
    def recording(
        self, module: nn.Module, needs: frozenset[str], tokens: Tensor | None = None, network: nn.Module | None = None
    ) -> Iterator[AttentionRecord]:
        """Inside the ``with`` block, record the attention of ``module`` to the images.

        Args:
            module: the teacher's module, or a quantized model.
            needs: what to record.
            tokens: ``[B, K]`` the patch tokens that ``module`` gets to see; ``None`` means all.
            network: the network inside ``module`` that has the teacher's module names; ``module`` itself by default.
        """
        layout = self.pruner.layout if self.pruner and tokens is not None else None
        with (
            layout.only(network or module, tokens) if layout else nullcontext(),
            record_attention(module, needs, rows=self.count, grid=layout.grid if layout else None) as record,
            self.runtime.autocast(),
        ):
            yield record

    @torch.no_grad()
    def prune(self, images: Tensor, iteration: int) -> None:
        """If pruning is due, leave out the patches that the images, without augmentations, need least."""
        if self.pruner is None or not self.pruner.due(iteration):
            return
        tokens = self.pruner.tokens(iteration - 1, (), (images.shape[-2], images.shape[-1]))
        _, record = self.recorded(images, None, frozenset({CLASS_ATTENTION}), tokens)
        self.pruner.prune(self.pruner.layout.scores(record), iteration)


def new_pruner(spec: TokenPruning | None, teacher: Teacher, count: int) -> Pruner | None:
    """A pruner for ``count`` images with all their patches; ``None`` without token pruning."""
    if spec is None:
        return None
    layout = find_token_layout(teacher)
    alive = torch.ones(count, layout.grid[0] * layout.grid[1], dtype=torch.bool, device=teacher.device)
    return Pruner(spec, layout, alive)
