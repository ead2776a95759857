"""Networks with one unusual part, for the tests of steps that find layers by how a network connects them."""

import torch
import torch.nn.functional as F
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


class Encoder(nn.Module):
    """torch's own encoder, which has a fast path that reads the weights of its norms."""

    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(32, 2, 64, batch_first=True, norm_first=True)
        self.patch, self.position = nn.Conv2d(3, 32, 8, 8), nn.Parameter(torch.zeros(1, 16, 32))
        self.body = nn.TransformerEncoder(layer, 2, nn.LayerNorm(32), enable_nested_tensor=False)
        self.head = nn.Linear(32, 10)

    def forward(self, pixels):
        return self.head(self.body(self.patch(pixels).flatten(2).mT + self.position).mean(1))
