"""A teacher small enough for many iterations in a test, and a recipe for it."""

import torch
import torch.nn.functional as F
from attrs import define, evolve, field
from torch import nn

from spdfq.losses import AttentionPriorLoss, Loss, SoftCrossEntropyLoss, TotalVariationLoss
from spdfq.runtime import Runtime
from spdfq.synth import Flip, Jitter, MultiSemanticSampler, OptimizedImages, SoftLabelTarget
from spdfq.teacher import Teacher

CLASSES, SIDE, GRID, BLOCKS, HEADS = 5, 16, (4, 4), 2, 2
ITERATIONS = 15
RUNTIME = Runtime(seed=7)


class Attention(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x):
        query, key, value = self.qkv(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.norm1, self.attn, self.norm2 = nn.LayerNorm(dim), Attention(dim), nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class TinyViT(nn.Module):
    """Class token, 16x16 images in patches of 4, dimension 32, 2 blocks of 2 heads."""

    def __init__(self, dim=32):
        super().__init__()
        self.patch = nn.Conv2d(3, dim, 4, 4)
        self.cls_token = nn.Parameter(torch.randn(1, 1, dim))
        self.position = nn.Parameter(0.3 * torch.randn(1, 17, dim))
        self.blocks = nn.Sequential(*(Block(dim) for _ in range(BLOCKS)))
        self.head = nn.Linear(dim, CLASSES)

    def forward(self, images):
        tokens = self.patch(images).flatten(2).mT
        x = torch.cat([self.cls_token.expand(len(images), -1, -1), tokens], 1) + self.position
        return self.head(self.blocks(x)[:, 0])


def tiny_teacher(mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.25)):
    """The same weights each time."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = TinyViT().eval()
        for block in module.blocks:
            block.attn.qkv.weight.data *= 3  # attention that depends on the pixels
    return Teacher(module, mean=mean, std=std, num_classes=CLASSES, input_size=(3, SIDE, SIDE))


@define(kw_only=True)
class Acting(Loss):
    """Calls a function in a given iteration, and adds nothing to the sum."""

    # not part of the key of a state file, so that another run can go on without them
    act: object = field(eq=False)
    at: int = field(eq=False)
    calls: int = field(default=0, eq=False)

    def __call__(self, inputs):
        self.calls += 1
        value = self.act(inputs) if self.calls == self.at + 1 else None
        return inputs.images.sum() * 0 if value is None else value


def recipe(**changes):
    """A recipe with crops, soft labels, a prior with automatic weight, shifts and flips."""
    losses = {
        "attention_prior": AttentionPriorLoss(weight="auto"),
        "soft_cross_entropy": SoftCrossEntropyLoss(),
        "total_variation": TotalVariationLoss(weight=0.05),
    }
    spec = OptimizedImages(
        images=3,
        group=2,
        iterations=ITERATIONS,
        losses=losses,
        sampler=MultiSemanticSampler(),
        target=SoftLabelTarget(),
        augmentations=(Jitter(pixels=3), Flip()),
    )
    return evolve(spec, **changes)


def acting(act, at, **changes):
    """The same recipe with one more loss; it has a column even in runs in which it does nothing."""
    return recipe(losses={**recipe().losses, "acting": Acting(act=act, at=at)}, **changes)


def idle(**changes):
    return acting(None, -1, **changes)


def not_a_number(inputs):
    return inputs.images.sum() * float("nan")


def same(first, second):
    return torch.equal(first.images, second.images) and torch.equal(first.curves, second.curves)
