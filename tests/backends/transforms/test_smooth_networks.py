"""`smooth` on networks of many kinds: the output stays the same, and what does not change is noted."""

import pytest
import torch
import torch.nn.functional as F
from support import odd_networks
from support.backends import EXPLICIT, FUSED, teacher
from support.odd_networks import Attending, Encoder, Odd
from support.rotation import built, change, of_timm
from support.smoothing import notes, smoothed
from torch import nn

OF_TIMM = {
    "norm after pooling": ("vit_tiny_patch16_224", {"global_pool": "avg", "fc_norm": True}),
    "LayerScale": ("vit_tiny_patch16_224", {"init_values": 0.1}),
    "no bias": ("vit_tiny_patch16_224", {"qkv_bias": False}),
    "no head": ("vit_tiny_patch16_224", {"num_classes": 0}),
    "norm of queries and keys": ("vit_tiny_patch16_224", {"qk_norm": True}),
    "bias made of parameters": ("beit_base_patch16_224", {"init_values": 0.1}),
    "rotary embedding": ("vit_small_patch16_dinov3", {}),
    "SwiGLU": ("vit_giant_patch14_dinov2", {}),
    "SwiGLU with a norm": ("eva02_tiny_patch14_224", {}),
    "attention pooling": ("vit_base_patch16_siglip_224", {}),
    "norm before the blocks": ("vit_base_patch32_clip_224", {}),
}


@pytest.mark.parametrize("rotate", [False, True])
@pytest.mark.parametrize(("name", "options"), OF_TIMM.values(), ids=OF_TIMM)
def test_models_of_timm_compute_the_same(name, options, rotate):
    chosen = of_timm(name, **options)
    model = smoothed(chosen, rotate=rotate)
    assert change(model, chosen) < 1e-5
    assert model.shifted


@pytest.mark.parametrize("rotate", [False, True])
@pytest.mark.parametrize("name", [*FUSED, *EXPLICIT])
def test_every_kind_of_model_computes_the_same(name, rotate):
    chosen = teacher(name)
    model = smoothed(chosen, rotate=rotate, strength=1.0)
    assert change(model, chosen) < 1e-5
    assert model.shifted


ODD = [value for value in vars(odd_networks).values() if getattr(value, "__module__", "") == odd_networks.__name__]


@pytest.mark.parametrize("rotate", [False, True])
@pytest.mark.parametrize("network", ODD)
def test_unusual_networks_compute_the_same(network, rotate):
    chosen = built(network)
    assert change(smoothed(chosen, rotate=rotate), chosen) < 1e-5


def test_only_the_head_of_a_plain_vit_stays():
    model = smoothed(teacher("vit"))
    assert notes(model) == [
        "the input of head: not smoothed, it is one token of an image, too little for a range of each channel"
    ]
    # behind a LayerNorm and an attention, nothing is computed in addition
    assert model.shifted == ["blocks.0.mlp.fc2.weight", "blocks.1.mlp.fc2.weight"]


def test_behind_norms_without_parameters_layers_shift_their_inputs_themselves():
    model = smoothed(teacher("vit"), rotate=True)
    assert model.shifted == [
        f"blocks.{block}.{layer}.weight" for block in (0, 1) for layer in ("attn.qkv", "mlp.fc1", "mlp.fc2")
    ]


# attention


class ValueScaled(Attending):
    def product(self, query, key, value):
        return F.scaled_dot_product_attention(query, key, value * 0.3)


class OutputScaled(Attending):
    def product(self, query, key, value):
        return F.scaled_dot_product_attention(query, key, value) / 2


class KeysAreValues(Attending):
    def __init__(self):
        super().__init__()
        self.v = self.k


class KeysAreQueries(Attending):
    def __init__(self):
        super().__init__()
        self.q = self.k


class OneBias(Attending):
    def __init__(self):
        super().__init__()
        self.k.bias = self.v.bias


class NoBias(Attending):
    def __init__(self):
        super().__init__()
        for layer in (self.q, self.k, self.v, self.proj):
            layer.bias = None


class Causal(Attending):
    def product(self, query, key, value):
        return F.scaled_dot_product_attention(query, key, value, is_causal=True)


class Masked(Attending):
    def product(self, query, key, value):
        far = torch.arange(16)[:, None] - torch.arange(16) > 3
        return F.scaled_dot_product_attention(query, key, value, attn_mask=torch.zeros(16, 16).masked_fill(far, -1e9))


class ZeroKey(Attending):
    def product(self, query, key, value):
        key, value = (torch.cat([x, torch.zeros_like(x[..., :1, :])], -2) for x in (key, value))
        return F.scaled_dot_product_attention(query, key, value)


class KeysByConvolution(Attending):
    def __init__(self):
        super().__init__()
        self.k, self.v = nn.Conv1d(8, 8, 1), nn.Conv1d(8, 8, 1)

    def forward(self, pixels):
        x = self.patch(pixels).flatten(2).mT
        query, key, value = (self.heads(y) for y in (self.q(x), self.k(x.mT).mT, self.v(x.mT).mT))
        return self.head(self.proj(self.product(query, key, value).transpose(1, 2).flatten(2)).mean(1))


CENTRED, FOLDED = "keys", "values"
ATTENTION = {
    Attending: {CENTRED, FOLDED},
    Causal: {CENTRED, FOLDED},
    Masked: {CENTRED, FOLDED},
    NoBias: {CENTRED, FOLDED},
    ValueScaled: {CENTRED},
    OutputScaled: {CENTRED},
    OneBias: set(),
    KeysAreValues: set(),
    KeysAreQueries: {FOLDED},
    ZeroKey: set(),
    KeysByConvolution: {FOLDED},
}


@pytest.mark.parametrize("rotate", [False, True])
@pytest.mark.parametrize(("network", "wanted"), ATTENTION.items())
def test_keys_are_centred_and_values_shifted_where_the_output_stays_the_same(network, wanted, rotate):
    chosen = built(network)
    model = smoothed(chosen, rotate=rotate)
    assert change(model, chosen) < 1e-5
    assert (not any(note.startswith("the keys of the network: not centred") for note in notes(model))) == (
        CENTRED in wanted
    )
    assert ("proj.weight" not in model.shifted) == (FOLDED in wanted)


class Torchs(Odd):
    """torch's own attention over the tokens."""

    def __init__(self, **options):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True, **options)

    def branch(self, x):
        x = self.norm(x)
        return self.attention(x, x, x, need_weights=False)[0]


class ZeroKeyOfTorch(Torchs):
    def __init__(self):
        super().__init__(add_zero_attn=True)


class KeyBiasOfTorch(Torchs):
    def __init__(self):
        super().__init__(add_bias_kv=True)


class NoBiasOfTorch(Torchs):
    def __init__(self):
        super().__init__(bias=False)


class CrossAttention(Torchs):
    def branch(self, x):
        x = self.norm(x)
        return self.attention(x, 2 * x, 2 * x, need_weights=False)[0]


PRODUCTS = "not every product with its weight is a call of one plain nn.Linear"
KEYS = "the keys of attention: not centred, something (a rotary embedding, a norm) is between a layer and the product"
HEAD = "the input of head: not smoothed, it is one token of an image, too little for a range of each channel"
OF_TORCH = {
    Torchs: [HEAD],
    ZeroKeyOfTorch: [KEYS, HEAD, f"the input of attention.out_proj: not smoothed, {PRODUCTS}"],
    KeyBiasOfTorch: [KEYS, HEAD, f"the input of attention.out_proj: not smoothed, {PRODUCTS}"],
    NoBiasOfTorch: [
        "the keys of attention: not centred, their bias is computed in the forward pass and cannot be changed",
        HEAD,
        f"the input of attention, attention.out_proj: not smoothed, {PRODUCTS}",
    ],
    CrossAttention: ["the input of attention: not smoothed, only some rows of its weight are multiplied at once", HEAD],
}


@pytest.mark.parametrize(("network", "lines"), OF_TORCH.items())
def test_torchs_own_attention_is_smoothed_where_the_output_stays_the_same(network, lines):
    chosen = built(network)
    model = smoothed(chosen)
    assert change(model, chosen) < 1e-5
    assert notes(model) == lines


def test_the_fast_path_of_torchs_own_layers_is_off_where_a_layer_shifts_its_input():
    model = smoothed(built(Encoder))
    assert model.shifted == ["body.layers.0.linear2.weight", "body.layers.1.linear2.weight"]


# layers


class Child(nn.Linear):
    def forward(self, x):
        return super().forward(x) * 2


class OfAChild(Odd):
    def __init__(self):
        super().__init__()
        self.down = Child(16, 8)


class OneWeight(Odd):
    def __init__(self):
        super().__init__()
        self.other = nn.Linear(16, 8)
        self.other.weight = self.down.weight

    def branch(self, x):
        x = F.gelu(self.up(self.norm(x)))
        return self.down(x) + self.other(x + 1)


class OneWeightBehindANorm(Odd):
    def __init__(self):
        super().__init__()
        self.up, self.other = nn.Linear(8, 16, bias=False), nn.Linear(8, 16, bias=False)
        self.other.weight = self.up.weight

    def branch(self, x):
        x = self.norm(x)
        return self.down(F.gelu(self.up(x)) * self.other(x))


class TwoNames(Odd):
    def __init__(self):
        super().__init__()
        self.other = self.down

    def branch(self, x):
        x = F.gelu(self.up(self.norm(x)))
        return self.down(x) + self.other(x + 1)


class AlsoByFunction(Odd):
    def branch(self, x):
        x = F.gelu(self.up(self.norm(x)))
        return self.down(x) + F.linear(x, self.down.weight)


class OwnForward(Odd):
    def __init__(self):
        super().__init__()
        self.down.forward = lambda x: F.linear(x * 2, self.down.weight, self.down.bias)

    def __deepcopy__(self, _):
        other = OwnForward()
        other.load_state_dict(self.state_dict())
        return other


class CalledTwice(Odd):
    def branch(self, x):
        x = F.gelu(self.up(self.norm(x)))
        return self.down(x) + self.down(x[:, :4]).mean(1, keepdim=True)


class Constant(Odd):
    """Behind the ReLU, some channels are always zero and others nearly always."""

    def branch(self, x):
        shift = torch.tensor([0.0] * 12 + [-1000.0, -1000.0, -3.0, -3.0])
        return self.down(F.relu(self.up(self.norm(x)) + shift))


LAYERS = {
    OfAChild: [f"the input of down: not smoothed, {PRODUCTS}"],
    OneWeight: [f"the input of down: not smoothed, {PRODUCTS}"],
    TwoNames: [f"the input of down: not smoothed, {PRODUCTS}"],
    AlsoByFunction: [f"the input of down: not smoothed, {PRODUCTS}"],
    OwnForward: [f"the input of down: not smoothed, {PRODUCTS}"],
    OneWeightBehindANorm: [f"the input of up: not smoothed, {PRODUCTS}"],
    CalledTwice: [],
    Constant: [],
}


@pytest.mark.parametrize(("network", "lines"), LAYERS.items())
def test_layers_that_cannot_shift_their_input_stay_and_are_noted(network, lines):
    chosen = built(network)
    model = smoothed(chosen)
    assert change(model, chosen) < 1e-5
    assert notes(model) == [HEAD, *lines]
    assert ("down.weight" in model.shifted) == (not any("of down" in line for line in lines))
