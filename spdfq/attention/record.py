"""What is recorded of attention during one forward pass."""

import copy
from collections.abc import Sequence

from attrs import define, field
from torch import Tensor

CLASS_ATTENTION = "class_attention"
ATTENTION_OUTPUTS = "attention_outputs"
QUERIES_AND_KEYS = "queries_and_keys"
NEEDS = frozenset({CLASS_ATTENTION, ATTENTION_OUTPUTS, QUERIES_AND_KEYS})
RECORDED = ("class_attention", "attention_outputs", "queries", "keys")
"""Names of the lists of tensors in a record."""
CANNOT_RECORD = "it cannot be recorded, leave out the losses that need it"


@define
class AttentionRecord:
    """The attention of one forward pass. Each list has one entry per attention, in the order in which they ran.

    If a model computes its attention itself (Swin v2), the rows and outputs are taken from the model's own tensors.

    Args:
        names: names of the modules.
        grids: token grid ``(h, w)`` of the keys without prefix tokens: the grid of a window for windowed attention, and
            the pooled grid if keys are pooled (PVT v2).
        class_attention: float32 ``[B, heads, h*w]``: the softmax row of the class query over the patch tokens, or the
            mean over all patch queries if there is no class token. Windows are folded into the batch, image by image.
        attention_outputs: ``[B, heads, n, d]``, with prefix tokens.
        queries: ``[B, heads, n, d]``, with prefix tokens, as they are multiplied: after a rotary embedding, if any.
        keys: ``[B, heads, k, d]``, with prefix tokens, as they are multiplied. The product of queries and keys is the
            raw score, without scale, position bias or mask.
        prefix: number of class and register tokens before the patch tokens.
        has_class: whether the first of them is a class token.
    """

    names: list[str] = field(factory=list)
    grids: list[tuple[int, int]] = field(factory=list)
    class_attention: list[Tensor] = field(factory=list)
    attention_outputs: list[Tensor] = field(factory=list)
    queries: list[Tensor] = field(factory=list)
    keys: list[Tensor] = field(factory=list)
    prefix: int = 0
    has_class: bool = False

    def split(self, counts: Sequence[int]) -> list["AttentionRecord"]:
        """The records of consecutive images, this many in each; the windows of an image stay together."""
        if len(counts) == 1:
            return [self]
        parts = [copy.copy(self) for _ in counts]
        for name in RECORDED:
            entries: list[Tensor] = getattr(self, name)
            pieces = [entry.split([len(entry) // sum(counts) * count for count in counts]) for entry in entries]
            for index, part in enumerate(parts):
                setattr(part, name, [piece[index] for piece in pieces])
        return parts

    def clear(self) -> None:
        """Delete everything that was recorded."""
        for name in ("names", "grids", *RECORDED):
            getattr(self, name).clear()
