"""Names of the attention modules of the tiny models, and images of their size."""

import torch

from spdfq.attention import ATTENTION_OUTPUTS, CLASS_ATTENTION
from support.networks import ARCHITECTURES

BOTH = frozenset({CLASS_ATTENTION, ATTENTION_OUTPUTS})

BLOCKS = ["layers.0.blocks.0", "layers.0.blocks.1", "layers.1.blocks.0", "layers.1.blocks.1"]
NAMES = {name: ["blocks.0.attn", "blocks.1.attn"] for name in ARCHITECTURES} | {"swin": [f"{b}.attn" for b in BLOCKS]}


def images_for(model, count=3, seed=1):
    size = model.patch_embed.img_size
    return torch.randn(count, 3, *size, generator=torch.Generator().manual_seed(seed))


LARGE = {  # more tokens than explicit products are computed for
    "swin": {"img_size": 40, "patch_size": 2, "window_size": 10},
    "vit": {"img_size": 48, "patch_size": 4, "class_token": False, "global_pool": "avg"},
}
