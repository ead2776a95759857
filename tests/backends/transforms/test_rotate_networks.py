"""Networks with one unusual part: `rotate` rotates them or leaves them alone, and says why."""

import pytest
from support.odd_networks import (
    Assigned,
    Attending,
    AttendsTwice,
    Buffer,
    ByName,
    Computed,
    Grouped,
    GroupedHeads,
    InPlace,
    Maximum,
    Mixed,
    NormOfChannelsFirst,
    NormWithoutWeight,
    Odd,
    OneKey,
    Padded,
    PostNorm,
    ReadWithoutNorm,
    Rms,
    RmsReadWithoutNorm,
    Scaled,
    ScaledNorm,
    ScaledTwice,
    ScoresAdded,
    Shifted,
    SummedNorm,
    SummedStream,
    Twice,
    TwoNorms,
    ValueAdded,
)
from support.rotation import built, change, changed, notes, rotated

ODD = dict.fromkeys((Odd, Rms, InPlace, Twice, SummedStream, RmsReadWithoutNorm, NormWithoutWeight), "") | {
    ScaledNorm: "its features go through mul",
    ByName: "a module with layers of its own normalises it",
    SummedNorm: "its features go through sum",
    ReadWithoutNorm: "head.weight takes it without a LayerNorm",
    Grouped: "depthwise.weight writes it, which is grouped or only a part of a weight",
    NormOfChannelsFirst: "its norms are not over the last axis of a module's input",
    Maximum: "its features go through amax",
    TwoNorms: "up.weight also takes other inputs",
    Mixed: "it has LayerNorms and RMSNorms",
    Padded: "its features go through pad",
    Buffer: "a tensor that no layer computes is added",
    ScaledTwice: "scale or down.weight is used twice",
    Assigned: "its features go through pow",
    PostNorm: "the output of a norm is added",
}


@pytest.mark.parametrize(("build", "reason"), ODD.items(), ids=lambda value: getattr(value, "__name__", ""))
def test_an_unusual_network_is_rotated_or_left_alone_but_never_changed(build, reason):
    chosen = built(build)
    model = rotated(chosen, heads=False)
    assert change(model, chosen) < 1e-5
    assert bool(model.norms) == (not reason)
    assert not reason or any(note.endswith(f"not rotated, {reason}") for note in notes(model))


BOTH, SCORES, VALUES = {"q", "k", "v", "proj"}, {"q", "k"}, {"v", "proj"}
HEADS = {
    Attending: BOTH,
    Scaled: BOTH,
    OneKey: BOTH,
    Shifted: VALUES,
    ValueAdded: SCORES,
    ScoresAdded: VALUES,
    AttendsTwice: set(),
    GroupedHeads: BOTH,
    Computed: set(),
}


@pytest.mark.parametrize(("build", "wanted"), HEADS.items(), ids=lambda value: getattr(value, "__name__", ""))
def test_unusual_attention_is_rotated_where_it_can_be(build, wanted):
    chosen = built(build)
    model = rotated(chosen, stream=False)
    assert change(model, chosen) < 1e-5
    assert {name.partition(".")[0] for name in changed(model, chosen)} == wanted
    assert bool(notes(model)) == (wanted != BOTH)
