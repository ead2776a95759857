"""Teacher against student: where their outputs differ (PSAQ-ViT V2), and their attention (MaskAQ)."""

from typing import Any, ClassVar

import torch
from attrs import define, field, validators
from torch import Tensor

from spdfq.attention import QUERIES_AND_KEYS, AttentionRecord
from spdfq.errors import SpdfqError
from spdfq.losses.base import Loss, LossInputs, at_least_float32
from spdfq.registry import losses


def teacher_student_discrepancy(teacher: Tensor, student: Tensor) -> Tensor:
    """Mean absolute difference of two models' logits (arXiv 2209.05687); the images raise it, the student lowers it.

    Args:
        teacher: ``[B, K]``.
        student: likewise.

    Returns:
        A scalar.
    """
    return (at_least_float32(teacher) - at_least_float32(student)).abs().mean()


def masked_attention_distance(teacher: Tensor, student: Tensor, mask: Tensor) -> Tensor:
    """Mean absolute difference of two models' attention rows over the patches of a mask (arXiv 2606.04373).

    Args:
        teacher: ``[B, K]``.
        student: likewise.
        mask: ``[B, K]`` of zeros and ones.

    Returns:
        A scalar.
    """
    gap = (at_least_float32(teacher) - at_least_float32(student)).abs()
    return (gap * mask).sum() / mask.sum().clamp(min=1)


@losses.register("teacher_student_discrepancy", paper="arXiv:2209.05687")
@define(kw_only=True)
class TeacherStudentDiscrepancyLoss(Loss):
    """Negative mean absolute difference of the teacher's and the student's logits: images that tell the two apart.

    For an adversarial synthesis, whose student lowers the same difference.

    Args:
        weight: factor of this loss (unpublished).
    """

    needs_student: ClassVar[bool] = True

    def __call__(self, inputs: LossInputs) -> Tensor:
        """The loss of a group."""
        student = inputs.student_logits
        if student is None or inputs.logits is None:
            raise SpdfqError(_alone("teacher_student_discrepancy"))
        return -teacher_student_discrepancy(inputs.logits[: len(student)], student)


def _alone(name: str) -> str:
    return f"{name}: there is no quantized student here; only an adversarial synthesis has one, leave the loss out"


def _shares(_: Any, __: Any, value: tuple[float, float]) -> None:
    if not 1 >= value[0] >= value[1] > 0:
        raise ValueError(f"expected two shares above 0 and at most 1, the second at most the first, got {list(value)}")


@losses.register("masked_attention_alignment", paper="arXiv:2606.04373")
@define(kw_only=True)
class MaskedAttentionAlignmentLoss(Loss):
    """Difference of the teacher's and the student's attention where the teacher looks: images on which they agree.

    Compared are raw scores of the class query (of all queries where there is no class token) over patch tokens, mean
    over heads, block by block. The mask holds the patches of largest score, mean over blocks, less some at random; of
    windowed attention each block and window has its own.

    Args:
        weight: factor of this loss (0.1 in MaskAQ).
        share: of the patches in the mask in the first and in the last iteration, linear in between.
        dropped: share of the mask that is left out at random in each iteration.
    """

    needs: ClassVar[frozenset[str]] = frozenset({QUERIES_AND_KEYS})
    needs_student: ClassVar[bool] = True

    share: tuple[float, float] = field(default=(0.5, 0.1), validator=_shares)
    dropped: float = field(default=0.3, validator=[validators.ge(0.0), validators.lt(1.0)])

    def __call__(self, inputs: LossInputs) -> Tensor:
        """The loss of a group."""
        if inputs.student_attention is None:
            raise SpdfqError(_alone("masked_attention_alignment"))
        teacher, student = attention_rows(inputs.attention), attention_rows(inputs.student_attention)
        masks = self._masks([row.detach() for row in teacher], inputs)
        terms = [masked_attention_distance(*block) for block in zip(teacher, student, masks, strict=True)]
        return torch.stack(terms).mean()

    def _masks(self, rows: list[Tensor], inputs: LossInputs) -> list[Tensor]:
        """One mask for all blocks, or, where a block has windows or tokens of its own, one for each."""
        if all(row.shape == (len(inputs.images), rows[0].shape[1]) for row in rows):
            return [self._mask(torch.stack(rows).mean(0), inputs, 0)] * len(rows)
        return [self._mask(row, inputs, block) for block, row in enumerate(rows)]

    def _mask(self, scores: Tensor, inputs: LossInputs, block: int) -> Tensor:
        """``[B, K]``: ones at some of the largest scores."""
        first, last = self.share
        share = first + (last - first) * inputs.iteration / max(1, inputs.iterations - 1)
        inside = max(1, int(share * scores.shape[1] + 1e-6))
        kept = max(1, round(inside * (1 - self.dropped)))
        generator = inputs.generator("mask", block, inputs.iteration)
        order = torch.rand(len(scores), inside, generator=generator).argsort(-1)[:, :kept].to(scores.device)
        return torch.zeros_like(scores).scatter(1, scores.topk(inside).indices.gather(1, order), 1)


def attention_rows(record: AttentionRecord) -> list[Tensor]:
    """Raw scores over patch tokens ``[B, K]``, mean over heads: the class query's, or the mean over all queries."""
    rows = []
    for query, key in zip(record.queries, record.keys, strict=True):
        one = query[:, :, 0] if record.has_class else query[:, :, record.prefix :].mean(-2)
        rows.append((one.float().unsqueeze(-2) @ key[:, :, record.prefix :].float().mT).squeeze(-2).mean(1))
    return rows
