"""A backbone without a head, and the bundled images that its features are compared on."""

import torch
from torch import nn

from spdfq.data import FashionMnist
from spdfq.recipe import Evaluation
from spdfq.teacher import Teacher

TEST, TRAIN = FashionMnist(limit=40), FashionMnist(split="train", limit=60)
EVALUATION = Evaluation(dataset=TEST, bank=TRAIN)


class Pooled(nn.Module):
    """Four features of an image: the means of its quarters of rows."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, images):
        return self.scale * images.mean(1).unflatten(1, (4, -1)).mean((2, 3))


def own(module=None, classes=0):
    size = {"mean": (0.286,), "std": (0.353,), "input_size": (1, 28, 28)}
    return Teacher(module or Pooled(), num_classes=classes, name="own", **size)
