"""Networks with one unusual part: `rotate` rotates them or leaves them alone, and says why."""

import pytest
import torch
import torch.nn.functional as F
from support.backends import teacher_of
from support.rotation import change, changed, notes, perturbed, rotated
from torch import nn

# networks with one unusual part


class Odd(nn.Module):
    """One block of pre-norm layers; a child changes one thing."""

    def __init__(self):
        super().__init__()
        self.patch, self.norm, self.last = nn.Conv2d(3, 8, 8, 8), nn.LayerNorm(8), nn.LayerNorm(8)
        self.up, self.down, self.head = nn.Linear(8, 16), nn.Linear(16, 8), nn.Linear(8, 10)

    def embed(self, pixels):
        return self.patch(pixels).flatten(2).mT

    def branch(self, x):
        return self.down(F.gelu(self.up(self.norm(x))))

    def forward(self, pixels):
        x = self.embed(pixels)
        return self.head(self.last(x + self.branch(x)).mean(1))


class Maximum(Odd):
    def forward(self, pixels):
        x = self.embed(pixels)
        return self.head(self.last((x + self.branch(x)).amax(1)))


class TwoNorms(Odd):
    def branch(self, x):
        return self.down(F.gelu(self.up(self.norm(x)) + self.up(self.last(x))))


class Rms(Odd):
    def __init__(self):
        super().__init__()
        self.norm, self.last = nn.RMSNorm(8, 1e-6), nn.RMSNorm(8, 1e-6)


class Mixed(Odd):
    def __init__(self):
        super().__init__()
        self.norm = nn.RMSNorm(8, 1e-6)


class Padded(Odd):
    def branch(self, x):
        return self.down(F.gelu(self.up(F.pad(self.norm(x), (0, 0, 0, 2)))))[:, :-2]


class Buffer(Odd):
    def __init__(self):
        super().__init__()
        self.register_buffer("position", torch.randn(16, 8, generator=torch.Generator().manual_seed(0)))

    def embed(self, pixels):
        return super().embed(pixels) + self.position


class InPlace(Odd):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.full((8,), 0.3))

    def forward(self, pixels):
        x = self.embed(pixels)
        x += self.branch(x).mul_(self.scale) * 0.5
        return self.head(self.last(x).mean(1))


class Twice(Odd):
    def forward(self, pixels):
        x = self.embed(pixels)
        for _ in range(2):
            x = x + self.branch(x)
        return self.head(self.last(x).mean(1))


class ScaledTwice(Odd):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.full((8,), 0.3))

    def forward(self, pixels):
        x = self.embed(pixels)
        branch = self.branch(x)
        return self.head(self.last(x + branch * self.scale + branch).mean(1))


class Assigned(Odd):
    def forward(self, pixels):
        x = self.embed(pixels)
        x[:, 0] = x[:, 0] ** 2
        return self.head(self.last(x + self.branch(x)).mean(1))


class PostNorm(Odd):
    def forward(self, pixels):
        x = self.embed(pixels)
        return self.head(self.last(x + self.norm(self.down(self.up(x)))).mean(1))


class ScaledNorm(Odd):
    def branch(self, x):
        return self.down(F.gelu(self.up(self.norm(x) * 0.3)))


class SummedNorm(Odd):
    def forward(self, pixels):
        x = self.embed(pixels)
        return self.head(self.last(x + self.branch(x)).sum(1))


class SummedStream(Odd):
    def forward(self, pixels):
        x = self.embed(pixels)
        return self.head(self.last((x + self.branch(x)).sum(1)))


class ByName(Odd):
    def branch(self, x):
        x = F.layer_norm(input=x, normalized_shape=(8,), weight=self.norm.weight, bias=self.norm.bias)
        return F.linear(input=x, weight=self.down.weight[:, :8] * 1, bias=self.down.bias)

    def embed(self, pixels):
        return F.conv2d(input=pixels, weight=self.patch.weight, bias=self.patch.bias, stride=8).flatten(2).mT


class ReadWithoutNorm(Odd):
    def forward(self, pixels):
        x = self.embed(pixels)
        return self.head((x + self.branch(x)).mean(1))


class RmsReadWithoutNorm(Rms, ReadWithoutNorm):
    pass


class Grouped(Odd):
    def __init__(self):
        super().__init__()
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)

    def embed(self, pixels):
        return self.depthwise(self.patch(pixels)).flatten(2).mT


class NormWithoutWeight(Odd):
    def __init__(self):
        super().__init__()
        self.norm, self.last = nn.LayerNorm(8, elementwise_affine=False), nn.LayerNorm(8, bias=False)


class NormOfChannelsFirst(Odd):
    class Norm(nn.LayerNorm):
        def forward(self, x):
            return super().forward(x.mT).mT

    def __init__(self):
        super().__init__()
        self.norm = self.Norm(8)

    def branch(self, x):
        return self.down(F.gelu(self.up(self.norm(x.mT).mT)))


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
    with torch.random.fork_rng():
        torch.manual_seed(0)
        chosen = teacher_of(perturbed(build()))
    model = rotated(chosen, heads=False)
    assert change(model, chosen) < 1e-5
    assert bool(model.norms) == (not reason)
    assert not reason or any(note.endswith(f"not rotated, {reason}") for note in notes(model))


# attention with one unusual part


class Attending(nn.Module):
    """Attention of two heads over the tokens; a child changes one thing."""

    keys = 2

    def __init__(self):
        super().__init__()
        self.patch, self.head = nn.Conv2d(3, 8, 8, 8), nn.Linear(8, 10)
        self.q, self.k, self.v, self.proj = (
            nn.Linear(8, 8),
            *(nn.Linear(8, 4 * self.keys) for _ in "kv"),
            nn.Linear(8, 8),
        )

    def heads(self, x):
        return x.unflatten(-1, (-1, 4)).transpose(1, 2)

    def product(self, query, key, value):
        return F.scaled_dot_product_attention(query, key, value)

    def forward(self, pixels):
        x = self.patch(pixels).flatten(2).mT
        query, key, value = (self.heads(layer(x)) for layer in (self.q, self.k, self.v))
        return self.head(self.proj(self.product(query, key, value).transpose(1, 2).flatten(2)).mean(1))


class Scaled(Attending):
    def product(self, query, key, value):
        return F.scaled_dot_product_attention(query * 0.3, key / 2, value, scale=1.0)


class OneKey(Attending):
    keys = 1

    def product(self, query, key, value):
        return F.scaled_dot_product_attention(query, key, value, enable_gqa=True)


class Shifted(Attending):
    def product(self, query, key, value):
        return F.scaled_dot_product_attention(query, key + 1.0, value)


class ValueAdded(Attending):
    def product(self, query, key, value):
        return F.scaled_dot_product_attention(query, key, value) + value


class ScoresAdded(Attending):
    def product(self, query, key, value):
        return F.scaled_dot_product_attention(query, key, value, attn_mask=query.mean(-1, keepdim=True))


class AttendsTwice(Attending):
    def product(self, query, key, value):
        return F.scaled_dot_product_attention(query, key, value) + F.scaled_dot_product_attention(key, query, value)


class GroupedHeads(Attending):
    def heads(self, x):
        return x.unflatten(-1, (4, -1)).mT.transpose(1, 2)  # channels of a head are not next to each other


class Computed(Attending):
    def product(self, query, key, value):
        return (query @ key.mT).softmax(-1) @ value


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
    with torch.random.fork_rng():
        torch.manual_seed(0)
        chosen = teacher_of(perturbed(build()))
    model = rotated(chosen, stream=False)
    assert change(model, chosen) < 1e-5
    assert {name.partition(".")[0] for name in changed(model, chosen)} == wanted
    assert bool(notes(model)) == (wanted != BOTH)
