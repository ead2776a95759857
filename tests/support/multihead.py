"""Tiny networks whose attention is `nn.MultiheadAttention`, in the layouts that are found in the wild."""

import torch
from torch import nn
from torchvision.models import VisionTransformer

SIZE, CLASSES = (3, 32, 32), 10
_WIDTH, _PATCHES = 32, 16


class ClipBlock(nn.Module):
    """A block of CLIP, which takes ``[tokens, images, d]``."""

    def __init__(self):
        super().__init__()
        self.attn = nn.MultiheadAttention(_WIDTH, 2)
        self.ln_1, self.ln_2 = nn.LayerNorm(_WIDTH), nn.LayerNorm(_WIDTH)
        self.mlp = nn.Sequential(nn.Linear(_WIDTH, 64), nn.GELU(), nn.Linear(64, _WIDTH))

    def forward(self, x):
        normed = self.ln_1(x)
        x = x + self.attn(normed, normed, normed, need_weights=False)[0]
        return x + self.mlp(self.ln_2(x))


class ClipTower(nn.Module):
    """CLIP's image encoder, as its first code has it: tokens first, the class token is called ``class_embedding``."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, _WIDTH, 8, 8, bias=False)
        self.class_embedding = nn.Parameter(torch.randn(_WIDTH))
        self.positional_embedding = nn.Parameter(torch.randn(1 + _PATCHES, _WIDTH))
        self.resblocks = nn.Sequential(ClipBlock(), ClipBlock())
        self.head = nn.Linear(_WIDTH, CLASSES)

    def forward(self, images):
        patches = self.conv1(images).flatten(2).mT
        tokens = torch.cat([self.class_embedding.expand(len(images), 1, -1), patches], 1) + self.positional_embedding
        return self.head(self.resblocks(tokens.transpose(0, 1))[0])


class Encoder(nn.Module):
    """`nn.TransformerEncoder` over patches, which has a fast path of its own in evaluation mode."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Conv2d(3, _WIDTH, 8, 8)
        layer = nn.TransformerEncoderLayer(_WIDTH, 2, 64, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.head = nn.Linear(_WIDTH, CLASSES)

    def forward(self, images):
        return self.head(self.encoder(self.embed(images).flatten(2).mT).mean(1))


class CrossAttention(nn.Module):
    """As in DETR: queries and keys with positions, values without, then a query that attends to the tokens."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Conv2d(3, _WIDTH, 8, 8)
        self.positions = nn.Parameter(torch.randn(_PATCHES, _WIDTH))
        self.layers = nn.ModuleList([nn.MultiheadAttention(_WIDTH, 2, batch_first=True) for _ in range(2)])
        self.query = nn.Parameter(torch.randn(1, 1, _WIDTH))
        self.decoder = nn.MultiheadAttention(_WIDTH, 2, batch_first=True)
        self.head = nn.Linear(_WIDTH, CLASSES)

    def forward(self, images):
        tokens = self.embed(images).flatten(2).mT
        for layer in self.layers:
            placed = tokens + self.positions
            tokens = tokens + layer(placed, placed, tokens)[0]
        return self.head(self.decoder(self.query.expand(len(images), -1, -1), tokens, tokens)[0][:, 0])


def _torchvision():
    options = {"num_layers": 2, "num_heads": 2, "hidden_dim": _WIDTH, "mlp_dim": 64, "num_classes": CLASSES}
    module = VisionTransformer(image_size=32, patch_size=8, **options)
    nn.init.normal_(module.heads.head.weight)  # zeros in a new model
    return module


_MAKERS = {"torchvision": _torchvision, "clip": ClipTower, "encoder": Encoder, "cross": CrossAttention}
BLOCKS = {
    "torchvision": ["encoder.layers.encoder_layer_0", "encoder.layers.encoder_layer_1"],
    "clip": ["resblocks.0", "resblocks.1"],
    "encoder": ["encoder.layers.0", "encoder.layers.1"],
    "cross": ["layers.0", "layers.1"],
}


def multihead_network(name):
    """One of the networks, in evaluation mode, always with the same weights."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return _MAKERS[name]().eval()
