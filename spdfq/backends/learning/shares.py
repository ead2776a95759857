"""The images of an optimiser step that this process computes, when several processes learn together."""

from collections.abc import Sequence

import torch
from attrs import frozen
from torch import Tensor

from spdfq.runtime.ranks import Ranks


@frozen(eq=False)
class Share:
    """The share of a batch that this process computes. All processes together compute the gradient of the whole batch.

    The errors are functions of the whole batch. So every process computes the outputs of its own images, takes those of
    the others as constants, and has the gradient through its own images alone; the sum is that of one process, up to
    the rounding of its additions. A batch with fewer images than processes is computed by each of them.

    Args:
        ranks: the processes.
        rows: the images of the whole batch.
        own: those of this process.
        before: how many images of the batch belong to earlier processes.
        count: number of images of the batch.
        split: whether the batch is shared.
    """

    ranks: Ranks
    rows: Tensor | slice
    own: Tensor | slice
    before: int
    count: int
    split: bool

    @classmethod
    def of(cls, ranks: Ranks, rows: Tensor | slice, images: Tensor) -> "Share":
        """The share of this process.

        Args:
            ranks: the processes.
            rows: indices of the images of the batch; a slice means all of them.
            images: all images.
        """
        count = len(images) if isinstance(rows, slice) else len(rows)
        if ranks.count == 1 or count < ranks.count:
            return cls(ranks, rows, rows, 0, count, False)
        every = torch.arange(count, device=images.device) if isinstance(rows, slice) else rows
        parts = every.tensor_split(ranks.count)
        before = sum(map(len, parts[: ranks.rank]))
        return cls(ranks, rows, parts[ranks.rank], before, count, True)

    @classmethod
    def whole(cls, rows: Tensor | slice) -> "Share":
        """All images of a batch, without other processes."""
        return cls(Ranks(), rows, rows, 0, 0, False)

    @property
    def weight_of_common(self) -> float:
        """The weight, in each process, of a term that all processes compute alike."""
        return 1 / self.ranks.count if self.split else 1.0

    def joined(self, outputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The outputs for the whole batch. Their first axis holds the same number of rows for each image."""
        if not self.split:
            return tuple(outputs)
        return tuple(_Joined.apply(output, self) for output in outputs)

    def drawn(self, shape: torch.Size, generator: torch.Generator | None, device: torch.device) -> Tensor:
        """Draws from U(0, 1) for this share: the part of what one process would draw for the whole batch.

        That holds if the first axis has the same number of rows for each image. Where the share does not divide it,
        this process draws for its own tensor.
        """
        if not self.split or shape.numel() == 0 or shape[0] % self._images:
            return torch.rand(shape, generator=generator, device=device, dtype=torch.float32)
        start, length, rows = self._place(shape[0])
        whole = torch.rand((rows, *shape[1:]), generator=generator, device=device, dtype=torch.float32)
        return whole[start : start + length]

    def summed(self, gradients: Sequence[Tensor]) -> Sequence[Tensor]:
        """The gradients of the whole batch, from those of this process."""
        if self.ranks.count == 1:
            return gradients
        totals = [gradient.clone() for gradient in gradients]  # autograd may return views of one tensor
        self.ranks.add_up(totals)
        return totals if self.split else [total / self.ranks.count for total in totals]

    @property
    def _images(self) -> int:
        """Number of images of this share of a split batch."""
        return len(self.own)  # type: ignore[arg-type]  # a split batch has indices

    def _place(self, length: int) -> tuple[int, int, int]:
        """Where the rows of this share start in the whole batch, how many they are, and how many there are in all."""
        for_image = length // self._images
        return self.before * for_image, length, self.count * for_image


class _Joined(torch.autograd.Function):
    """The rows of all processes; the gradient of this one's is its part of the gradient of all."""

    @staticmethod
    def forward(ctx, output: Tensor, share: Share) -> Tensor:  # type: ignore[no-untyped-def, override]
        start, length, rows = share._place(len(output))
        whole = output.new_zeros((rows, *output.shape[1:]))
        whole[start : start + length] = output
        share.ranks.add_up([whole])
        ctx.start, ctx.length = start, length
        return whole

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[no-untyped-def, override]
        return gradient[ctx.start : ctx.start + ctx.length], None
