"""A model whose logits are easy to compute by hand, and small images for it."""

import io

import torch
from PIL import Image
from torch import nn

from spdfq.teacher import Teacher

GREY, RED = ("L", 51), ("RGB", (255, 0, 0))  # 51 / 255 = 0.2


class Means(nn.Module):
    """Logits are the channel means, repeated for every class; in training mode they would be doubled."""

    def __init__(self, classes):
        super().__init__()
        self.classes = classes
        self.scale = nn.Parameter(torch.ones(()))
        self.seen = 0

    def forward(self, images):
        self.seen += len(images)
        means = images.mean((1, 2, 3), keepdim=False)[:, None] * (2 if self.training else 1)
        return self.scale * means * torch.arange(1.0, self.classes + 1, device=images.device)


def teacher(classes=2, size=(3, 8, 8), **options):
    channels = size[0]
    described = {"mean": (0.5,) * channels, "std": (0.25,) * channels, "num_classes": classes, "input_size": size}
    return Teacher(Means(classes), **(described | options))


def encoded(colour, kind="PNG"):
    """The bytes of a file with an 8x8 image of one colour; half of such a file if the colour is ``None``."""
    mode, value = RED if colour is None else colour
    buffer = io.BytesIO()
    Image.new(mode, (8, 8), value).save(buffer, kind)
    return buffer.getvalue()[: len(buffer.getvalue()) // 2] if colour is None else buffer.getvalue()


def shade(number):
    """A grey of its own for each of 256 numbers; its normalised value is ``(number / 255 - 0.5) / 0.25``."""
    return ("L", number)


def shades(images):
    """The numbers of grey images as a `teacher` sees them."""
    return ((images[:, 0, 0, 0] * 0.25 + 0.5) * 255).round().int().tolist()


def write(folder, classes):
    """``write(folder, {"cat": {"a.png": colour}})``: files in subfolders; ``None`` is a damaged one."""
    for name, images in classes.items():
        for file, colour in images.items():
            path = folder / name / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(encoded(colour, {".jpg": "JPEG"}.get(path.suffix.lower(), path.suffix[1:])))
        (folder / name).mkdir(exist_ok=True)


def names(damaged):
    """The names of damaged images without the reasons."""
    assert all(found.endswith(")") for found in damaged)
    return tuple(found.partition(" (")[0] for found in damaged)
