"""The forward passes of groups: which views and tokens the teacher sees together, and what is recorded."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial

import torch
from attrs import frozen
from torch import Tensor, nn

from spdfq.attention import AttentionRecord, record_attention
from spdfq.runtime import Runtime
from spdfq.synth.compiled import CompiledPasses
from spdfq.synth.pruning import Pruner, TokenLayout, TokenPruning, find_token_layout
from spdfq.teacher import Teacher


@frozen(eq=False)
class ForwardPasses:
    """Forward passes over images and their crops, of one group or of several.

    Args:
        teacher: in evaluation mode.
        runtime: gives the precision.
        layout: where the patch tokens are in the network; ``None`` without token pruning.
        compiled: runs the recorded passes that are differentiated; ``None`` runs them as they are written.
    """

    teacher: Teacher
    runtime: Runtime
    layout: TokenLayout | None = None
    compiled: CompiledPasses | None = None

    def logits(self, views: Tensor) -> Tensor:
        """The teacher's logits, float32 ``[n, K]``, for views ``[n, C, h, w]``; nothing is recorded."""
        with self.runtime.autocast():
            logits: Tensor = self.teacher.module(views).float()
        return logits

    def recorded(
        self,
        images: Sequence[Tensor],
        crops: Sequence[Tensor],
        needs: frozenset[str],
        tokens: Sequence[Tensor] = (),
    ) -> tuple[Tensor, AttentionRecord]:
        """Pass images and crops through the teacher, and record its attention to the images.

        Args:
            images: ``[B, C, h, w]`` of each group.
            crops: ``[M, C, h, w]`` of each group that has some.
            needs: what to record.
            tokens: ``[B, K]`` of each group: the patch tokens of the images that remain; nothing means all.

        Returns:
            Logits float32 ``[ΣB + ΣM, K]``, the images of all groups first, and the record of all their images.
        """
        # crops keep all their patches, so they need a pass of their own if some patches of the images are left out
        together = [] if tokens else crops
        inputs = [torch.cat([*images, *together]), *([torch.cat([*tokens])] if tokens else [])]
        count = sum(map(len, images))
        forward = partial(self._recorded, needs, count)
        if self.compiled and torch.is_grad_enabled():
            logits, record = self.compiled((needs, count), forward, *inputs)
        else:
            logits, record = forward(*inputs)
        if crops and tokens:
            logits = torch.cat([logits, self.logits(torch.cat([*crops]))])
        return logits, record

    def _recorded(
        self, needs: frozenset[str], count: int, views: Tensor, tokens: Tensor | None = None
    ) -> tuple[Tensor, AttentionRecord]:
        with self.recording(self.teacher.module, needs, count, tokens) as record:
            logits: Tensor = self.teacher.module(views).float()
        return logits, record

    @contextmanager
    def recording(
        self,
        module: nn.Module,
        needs: frozenset[str],
        count: int,
        tokens: Tensor | None = None,
        network: nn.Module | None = None,
    ) -> Iterator[AttentionRecord]:
        """Inside the ``with`` block, record the attention of ``module`` to the images.

        Args:
            module: the teacher's module, or a quantized model.
            needs: what to record.
            count: number of images; they come before the crops.
            tokens: ``[count, K]`` the patch tokens that ``module`` gets to see; ``None`` means all.
            network: the network inside ``module`` that has the teacher's module names; ``module`` itself by default.
        """
        layout = self.layout if tokens is not None else None
        with (
            layout.only(network or module, tokens) if layout else nullcontext(),
            record_attention(module, needs, rows=count, grid=layout.grid if layout else None) as record,
            self.runtime.autocast(),
        ):
            yield record


def new_pruner(spec: TokenPruning | None, teacher: Teacher, count: int) -> Pruner | None:
    """A pruner for ``count`` images with all their patches; ``None`` without token pruning."""
    if spec is None:
        return None
    layout = find_token_layout(teacher)
    alive = torch.ones(count, layout.grid[0] * layout.grid[1], dtype=torch.bool, device=teacher.device)
    return Pruner(spec, layout, alive)
