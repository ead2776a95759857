"""The residual streams and attention heads of a network: what writes them and what reads them."""

from collections.abc import Iterator
from typing import Any

from attrs import define, field


@define(eq=False)
class Part:
    """A layer's weight, or some rows of it, as a layer of its own.

    Args:
        weight: name of the weight.
        rows: first row, and the one after the last.
        whole: whether these are all rows of the weight.
        bias: name of its bias; ``None`` for no bias, an empty string for one that is computed in the forward pass.
        made_of: of a computed bias that consists of parameters and zeros (BEiT): parameter and index of each number, or
            ``None`` for zero. ``None`` for any other bias.
        groups: of a convolution.
        sources: the streams, LayerNorms and attentions that its inputs come from; ``None`` for any other input.
    """

    weight: str
    rows: tuple[int, int]
    whole: bool
    bias: str | None
    made_of: tuple[tuple[str, int] | None, ...] | None = None
    groups: int = 1
    sources: list[Any] = field(factory=list)


@define(eq=False)
class Norm:
    """A module that is a LayerNorm or RMSNorm over the features.

    Args:
        name: of the module.
        features: number of features.
        eps: of the norm; ``None`` for that of the data type.
        centres: whether it subtracts the mean, as a LayerNorm does.
        weight: name of its weight; ``None`` if it has none.
        bias: name of its bias; ``None`` if it has none.
    """

    name: str
    features: int
    eps: float | None
    centres: bool
    weight: str | None
    bias: str | None


@define(eq=False)
class Stream:
    """Tensors that have the same features because they are added to each other.

    Args:
        features: number of features.
        writers: layers whose output is added, each with the name of a LayerScale behind it or ``None``.
        parameters: names of parameters that are added or prepended.
        norms: what normalises it.
        readers: layers that take it, each with the norm between them or ``None``.
        reasons: why it cannot be rotated.
    """

    features: int
    writers: list[tuple[Part, str | None]] = field(factory=list)
    parameters: list[str] = field(factory=list)
    norms: dict[str, Norm] = field(factory=dict)
    readers: list[tuple[Part, Norm | None]] = field(factory=list)
    reasons: dict[str, None] = field(factory=dict)
    _joined: "Stream | None" = None

    @property
    def root(self) -> "Stream":
        """The stream that this one became a part of, or this one."""
        found = self
        while found._joined is not None:
            found = found._joined
        return found

    def join(self, other: "Stream") -> "Stream":
        """Makes two streams one."""
        first, second = self.root, other.root
        if first is not second:
            first.writers += second.writers
            first.parameters += second.parameters
            first.norms |= second.norms
            first.readers += second.readers
            first.reasons |= second.reasons
            second._joined = first
        return first

    def refuse(self, reason: str) -> None:
        """Notes why the stream cannot be rotated."""
        self.root.reasons[reason] = None


Rows = tuple[Part, tuple[int, ...]]
"""The rows of a weight that one head consists of, in the order of its features."""


@define(eq=False)
class Attention:
    """One attention product.

    Args:
        name: of the module that computes it.
        query: the rows of each query head; ``None`` if they are not outputs of layers.
        key: the same for keys.
        value: the same for values.
        outputs: the head of ``value`` that each head of its output takes; heads can share a value.
        takers: layers that take its output, each with the columns of each of its heads.
    """

    name: str
    query: list[Rows] | None
    key: list[Rows] | None
    value: list[Rows] | None
    outputs: list[int] = field(factory=list)
    takers: list[tuple[Part, list[list[int]]]] = field(factory=list)


@define(eq=False)
class Structure:
    """What a forward pass shows of a network.

    Args:
        streams: all streams, also those without a norm.
        raw: the stream of each layer's own output, by weight and first row.
        parts: all layers.
        attentions: in the order of the forward pass.
        used: values of layers and attentions that other functions take: owner's id and index, with the function.
        scaled: values of layers and attentions that are multiplied by a number before something takes them.
        parameters: names of parameters that are added, concatenated or used in another way outside of layers and norms.
        other_norms: modules that normalise something else than a stream.
        own_products: modules that multiply outputs of layers with each other themselves.
    """

    streams: list[Stream] = field(factory=list)
    raw: dict[tuple[str, int], Stream] = field(factory=dict)
    parts: dict[tuple[str, int, int], Part] = field(factory=dict)
    attentions: list[Attention] = field(factory=list)
    used: dict[tuple[int, int], str] = field(factory=dict)
    scaled: set[tuple[int, int]] = field(factory=set)
    parameters: set[str] = field(factory=set)
    other_norms: dict[str, None] = field(factory=dict)
    own_products: dict[str, None] = field(factory=dict)

    def roots(self) -> Iterator[Stream]:
        """Each stream once, in the order of the forward pass."""
        yield from {id(root): root for root in (stream.root for stream in self.streams)}.values()
