"""Which streams and heads can be rotated, and why the others cannot."""

from collections.abc import Iterable

from torch import nn

from spdfq.backends.transforms.streams import Attention, Norm, Part, Rows, Stream, Structure
from spdfq.backends.wiring import accepts_a_bias


def stream_obstacle(network: nn.Module, found: Structure, stream: Stream) -> str | None:
    """Why a stream cannot be rotated; ``None`` if it can."""
    if stream.reasons:
        return next(iter(stream.reasons))
    if len({norm.centres for norm in stream.norms.values()}) > 1:
        return "it has LayerNorms and RMSNorms"
    centred = next(iter(stream.norms.values())).centres
    for part, norm in stream.readers:
        if norm is None and centred:
            return f"{part.weight} takes it without a LayerNorm"
        if {id(_root(source)) for source in part.sources} != {id(norm or stream)}:
            return f"{part.weight} also takes other inputs"
        if norm is not None and _shifts(network, norm) and not _bias_changes(network, found, part):
            return f"the bias of {_module(part.weight)} is computed in the forward pass and cannot be changed"
    for part, scale in stream.writers:
        if obstacle := _writer_obstacle(found, stream, part, scale):
            return obstacle
    return None


def _writer_obstacle(found: Structure, stream: Stream, part: Part, scale: str | None) -> str | None:
    if not part.whole or part.groups != 1:
        return f"{part.weight} writes it, which is grouped or only a part of a weight"
    if part.bias == "":
        return f"the bias of {_module(part.weight)} is computed in the forward pass and cannot be changed"
    raw = found.raw[part.weight, 0]
    scaled = [other for other in found.roots() for writer, factor in other.writers if writer is part and factor]
    if scale is None:
        return f"{part.weight} writes it with and without a LayerScale" if scaled else None
    uses = sum(factor == scale for other in found.roots() for _, factor in other.writers)
    if scale in found.parameters:
        return f"{scale} scales something else too"
    alone = raw.root is raw and len(raw.writers) == 1 and not (raw.readers or raw.norms or raw.reasons)
    return None if len(scaled) == uses == 1 and alone else f"{scale} or {part.weight} is used twice"


def score_obstacle(found: Structure, attention: Attention) -> str | None:
    """Why the queries and keys of an attention cannot be rotated; ``None`` if they can."""
    if attention.query is None or attention.key is None:
        return "something (a rotary embedding, a norm) is between a layer and the product"
    heads = [*attention.query, *attention.key]
    if len({len(rows) for _, rows in heads}) > 1:
        return "their sizes differ"
    return _heads_obstacle(found, attention, heads, attention.value)


def value_obstacle(found: Structure, attention: Attention) -> str | None:
    """Why the values of an attention cannot be rotated; ``None`` if they can."""
    if attention.value is None:
        return "something is between a layer and the product"
    outputs = range(len(attention.outputs) * len(attention.value[0][1]))
    if not attention.takers or any((id(attention), index) in found.used for index in outputs):
        return "something is between the product and the layer that takes its output"
    if any({id(source) for source in part.sources} != {id(attention)} for part, _ in attention.takers):
        return "the layer that takes the output takes other inputs too"
    return _heads_obstacle(found, attention, attention.value, [*(attention.query or ()), *(attention.key or ())])


def _heads_obstacle(
    found: Structure, attention: Attention, heads: list[Rows], rest: Iterable[Rows] | None
) -> str | None:
    parts = {id(part): part for part, _ in heads}
    if any(part.bias == "" and not _is_own(found, part) for part in parts.values()):
        return "their bias is computed in the forward pass and cannot be changed"
    if any(len({part.made_of[row] is None for row in each}) > 1 for part, each in heads if part.made_of):
        return "their bias is computed in the forward pass and cannot be changed"
    if any(part.groups != 1 for part in parts.values()):
        return "a grouped convolution computes them"
    rows = places(heads)
    if len(rows) != sum(len(set(each)) for _, each in heads):
        return "heads share some of their rows"
    if rows & places(rest or ()):
        return "queries or keys and values share some of their rows"
    if any((id(part), row) in found.used for part, each in heads for row in each):
        return "they are used elsewhere too"
    others = (other for other in found.attentions if other is not attention)
    if any(rows & places([*(other.query or ()), *(other.key or ()), *(other.value or ())]) for other in others):
        return "another attention has the same layers"
    return None


def places(heads: Iterable[Rows]) -> set[tuple[str, int]]:
    """The rows of heads, by weight."""
    return {(part.weight, part.rows[0] + row) for part, rows in heads for row in rows}


def _root(source: object) -> object:
    return source.root if isinstance(source, Stream) else source


def _shifts(network: nn.Module, norm: Norm) -> bool:
    return norm.bias is not None and bool(network.get_parameter(norm.bias).any())


def _bias_changes(network: nn.Module, found: Structure, part: Part) -> bool:
    if part.bias is None:
        return part.whole and accepts_a_bias(network, part.weight)
    return bool(part.bias) or (_is_own(found, part) and _fixed_rows(part) <= _key_rows(found, part))


def _is_own(found: Structure, part: Part) -> bool:
    """Whether a bias is made of parameters that no other layer has."""
    names = {place[0] for place in part.made_of or () if place}
    others = (other for other in found.parts.values() if other is not part)
    return part.made_of is not None and not any(names & {p[0] for p in other.made_of or () if p} for other in others)


def _fixed_rows(part: Part) -> set[int]:
    """The rows whose bias is always zero."""
    return {row for row, place in enumerate(part.made_of or ()) if place is None}


def _key_rows(found: Structure, part: Part) -> set[int]:
    """The rows that are keys and nothing else: a bias adds the same to all scores of a query, which changes nothing."""
    heads = [rows for attention in found.attentions for rows in attention.key or ()]
    rows = {row for owner, each in heads if owner is part for row in each}
    others = [rows for attention in found.attentions for rows in [*(attention.query or ()), *(attention.value or ())]]
    rows -= {row for owner, each in others if owner is part for row in each}
    return {row for row in rows if (id(part), row) not in found.used}


def _module(weight: str) -> str:
    return weight.rpartition(".")[0]
