"""Losses that compare the teacher with a quantized student: outputs (PSAQ-ViT V2) and attention (MaskAQ)."""

from typing import Any, ClassVar

import torch
from attrs import define, field, validators
from einops import rearrange
from torch import Tensor

from spdfq.attention import QUERIES_AND_KEYS, AttentionRecord
from spdfq.errors import SpdfqError
from spdfq.losses.base import Loss, LossInputs, at_least_float32
from spdfq.registry import losses
from spdfq.runtime.arguments import check_alike
from spdfq.runtime.runtime import uniform


def teacher_student_discrepancy(teacher: Tensor, student: Tensor) -> Tensor:
    """Mean absolute difference of two models' logits (arXiv 2209.05687); the images raise it, the student lowers it.

    Args:
        teacher: ``[B, K]``.
        student: ``[B, K]``.

    Returns:
        A scalar.

    Raises:
        SpdfqError: another shape, or two shapes.
    """
    check_alike("teacher", teacher, "student", student, "B, K")
    return (at_least_float32(teacher) - at_least_float32(student)).abs().mean()


def masked_attention_distance(teacher: Tensor, student: Tensor, mask: Tensor) -> Tensor:
    """Mean absolute difference of two models' attention rows over the patches of a mask (arXiv 2606.04373).

    Args:
        teacher: ``[B, K]``.
        student: ``[B, K]``.
        mask: ``[B, K]`` of zeros and ones.

    Returns:
        A scalar.

    Raises:
        SpdfqError: another shape, or different shapes.
    """
    check_alike("teacher", teacher, "student", student, "B, K")
    check_alike("teacher", teacher, "mask", mask, "B, K")
    gap = (at_least_float32(teacher) - at_least_float32(student)).abs()
    return (gap * mask).sum() / mask.sum().clamp(min=1)


@losses.register("teacher_student_discrepancy", paper="arXiv:2209.05687")
@define(kw_only=True)
class TeacherStudentDiscrepancyLoss(Loss):
    """Negative mean absolute difference of the teacher's and the student's logits: images on which they differ.

    Adversarial synthesis needs it: the images raise the difference that the student lowers.

    Args:
        weight: factor of this loss (unpublished).
    """

    needs_student: ClassVar[bool] = True

    def __call__(self, inputs: LossInputs) -> Tensor:
        """The loss of a group."""
        student, teacher = self.given(inputs, "student_logits"), self.given(inputs, "logits")[: len(inputs.images)]
        check_alike("student_logits", student, "logits of the images", teacher, "B, K")
        return -teacher_student_discrepancy(teacher, student)


def _shares(_: Any, __: Any, value: tuple[float, float]) -> None:
    if not 1 >= value[0] >= value[1] > 0:
        raise ValueError(f"expected two shares above 0 and at most 1, the second at most the first, got {list(value)}")


@losses.register("masked_attention_alignment", paper="arXiv:2606.04373")
@define(kw_only=True)
class MaskedAttentionAlignmentLoss(Loss):
    """Difference of the teacher's and the student's attention to important patches: images on which they agree.

    It compares, block by block, the raw scores of the class query over patch tokens, mean over heads; without a class
    token, the mean over all queries. The mask holds the patches with the largest scores, mean over blocks, except for
    some that are dropped at random. In windowed attention each block and each window has its own mask.

    Args:
        weight: factor of this loss (0.1 in MaskAQ).
        share: share of the patches in the mask in the first and in the last iteration, linear in between.
        dropped: share of the mask that is dropped at random in each iteration.
    """

    needs: ClassVar[frozenset[str]] = frozenset({QUERIES_AND_KEYS})
    needs_student: ClassVar[bool] = True

    share: tuple[float, float] = field(default=(0.5, 0.1), validator=_shares)
    dropped: float = field(default=0.3, validator=[validators.ge(0.0), validators.lt(1.0)])

    def __call__(self, inputs: LossInputs) -> Tensor:
        """The loss of a group."""
        self.given(inputs, "draws")
        teacher = attention_rows(self.recorded(inputs))
        student = attention_rows(self.recorded(inputs, "student_attention"))
        if len(teacher) != len(student):
            raise SpdfqError(f"{len(teacher)} blocks of the teacher were recorded, but {len(student)} of the student")
        masks = self._masks([row.detach() for row in teacher], inputs)
        terms = [masked_attention_distance(*block) for block in zip(teacher, student, masks, strict=True)]
        return torch.stack(terms).mean()

    def _masks(self, rows: list[Tensor], inputs: LossInputs) -> list[Tensor]:
        """One mask for all blocks; one for each block if blocks have windows or differ in their tokens."""
        if all(row.shape == (len(inputs.images), rows[0].shape[1]) for row in rows):
            return [self._mask(torch.stack(rows).mean(0), inputs, 0)] * len(rows)
        return [self._mask(row, inputs, block) for block, row in enumerate(rows)]

    def _mask(self, scores: Tensor, inputs: LossInputs, block: int) -> Tensor:
        """``[B, K]``: ones at the largest scores, without those dropped."""
        order = inputs.each(("mask", block), self._kept, *scores.shape, inputs.iterations)
        inside = self._inside(inputs.iteration, scores.shape[1], inputs.iterations)
        return torch.zeros_like(scores).scatter(1, scores.topk(inside).indices.gather(1, order), 1)

    def _kept(self, generator: torch.Generator, iteration: int, images: int, patches: int, iterations: int) -> Tensor:
        """``[B, kept]``: which patches of the mask are not dropped."""
        inside = self._inside(iteration, patches, iterations)
        kept = max(1, round(inside * (1 - self.dropped)))
        return uniform(generator, images, inside).argsort(-1)[:, :kept]

    def _inside(self, iteration: int, patches: int, iterations: int) -> int:
        """How many patches of an image the mask holds before some are dropped."""
        first, last = self.share
        share = first + (last - first) * iteration / max(1, iterations - 1)
        return max(1, int(share * patches + 1e-6))


def attention_rows(record: AttentionRecord) -> list[Tensor]:
    """For each block, raw scores ``[B, K]`` over patch tokens, mean over heads.

    They are those of the class query; without a class token, the mean over all queries.
    """
    rows = []
    for query, key in zip(record.queries, record.keys, strict=True):
        one = query[:, :, 0] if record.has_class else query[:, :, record.prefix :].mean(-2)
        scores = rearrange(one.float(), "b heads d -> b heads 1 d") @ key[:, :, record.prefix :].float().mT
        rows.append(rearrange(scores, "b heads 1 k -> b heads k").mean(1))
    return rows
