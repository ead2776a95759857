"""The forward passes of a group: which views and tokens the teacher sees together, and what of it is recorded."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from attrs import frozen
from torch import Tensor, nn

from spdfq.attention import CLASS_ATTENTION, AttentionRecord, record_attention
from spdfq.runtime import Runtime
from spdfq.synth.pruning import Pruner, TokenPruning, find_token_layout
from spdfq.teacher import Teacher


@frozen(eq=False)
class ForwardPasses:
    """Forward passes over the images of a group and their crops.

    Args:
        teacher: in evaluation mode.
        runtime: gives the precision.
        count: B, how many images the group has.
        pruner: which of their patches take part, where not all do.
    """

    teacher: Teacher
    runtime: Runtime
    count: int
    pruner: Pruner | None

    def logits(self, views: Tensor) -> Tensor:
        """The teacher's answer, float32 ``[n, K]``, to views that are not recorded."""
        with self.runtime.autocast():
            answer: Tensor = self.teacher.module(views).float()
        return answer

    def recorded(
        self, images: Tensor, crops: Tensor | None, needs: frozenset[str], tokens: Tensor | None
    ) -> tuple[Tensor, AttentionRecord]:
        """The answer to images and crops, and the attention to the images, of which ``tokens`` take part."""
        # crops are whole: beside images without some of their patches they take a pass of their own
        together = [] if crops is None or tokens is not None else [crops]
        with self.recording(self.teacher.module, needs, tokens) as record:
            answers = [self.teacher.module(torch.cat([images, *together])).float()]
        if crops is not None and tokens is not None:
            answers.append(self.logits(crops))
        return torch.cat(answers), record

    @contextmanager
    def recording(
        self, module: nn.Module, needs: frozenset[str], tokens: Tensor | None = None, network: nn.Module | None = None
    ) -> Iterator[AttentionRecord]:
        """Inside, attention of ``module`` to the images is recorded; it sees these patch tokens of theirs alone.

        Args:
            module: the teacher's, or another whose parts, in ``network``, have the same names.
            needs: what is recorded.
            tokens: ``[B, K]``; all where there are none given.
            network: ``module`` itself where it is left out.
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
        """Where it is time, leave out patches that the images as they are, without augmentation, do not need."""
        if self.pruner is None or not self.pruner.due(iteration):
            return
        tokens = self.pruner.tokens(iteration - 1, (), (images.shape[-2], images.shape[-1]))
        _, record = self.recorded(images, None, frozenset({CLASS_ATTENTION}), tokens)
        self.pruner.prune(self.pruner.layout.scores(record), iteration)


def new_pruner(spec: TokenPruning | None, teacher: Teacher, count: int) -> Pruner | None:
    """A pruner for ``count`` images that have all their patches."""
    if spec is None:
        return None
    layout = find_token_layout(teacher)
    alive = torch.ones(count, layout.grid[0] * layout.grid[1], dtype=torch.bool, device=teacher.device)
    return Pruner(spec, layout, alive)
