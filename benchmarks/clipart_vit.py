"""A second real test-bed: the encoder of real_vit.py with a linear head for the pictures of Debian's openclipart-png.

    apt-get install openclipart-png
    python benchmarks/clipart_vit.py     # writes runs/clipart_vit: a timm checkpoint, and the folders train and test
    spdfq run benchmarks/clipart_vit/spdfq_112.toml     # from the same folder

The pictures are in the public domain. **Classes** are the folders at the second level, such as ``animals/birds``, that
have at least 40 different pictures, counted with their subfolders. Of pictures that look alike at 16x16 pixels, in
whatever folder, only the first stays, so that none is on both sides of the split. At most 90 of a class are used. Every
third one is a test image. Pictures are laid on white, and white is added to make them square. The head is a logistic
regression on the class-token features of the training images. It is part of this repository; ``--fit`` fits it again.
"""

import json
import random
import shutil
import struct
from collections.abc import Iterable
from pathlib import Path

import click
import torch
from PIL import Image
from real_vit import (
    encoder,
    fit_head,
    onnx_file,
    onnx_tensors,
    refuse_without,
    timm_state,
    write_checkpoint,
    write_head,
)
from safetensors.torch import load_file
from torch import Tensor, nn

from spdfq.data import ImageFolder
from spdfq.teacher import Teacher

PICTURES = Path("/usr/share/openclipart/png")
HEAD = Path(__file__).parent / "clipart_vit" / "head_112.safetensors"
SIZE, SIDE, SEED = 112, 224, 0
FEWEST, MOST = 40, 90
# of the head; of 3e-4 to 1e-1, this and 3e-2 are best in five-fold cross-validation of the training images (62 %)
PENALTY = 1e-2
# root mean square of the difference of two pictures at 16x16 pixels, in 0..1, below which they look alike
ALIKE = 0.06
# 20 of 8,121 pictures have more pixels, up to 169 million; they are left out because decoding them takes minutes
LARGEST = 16_000_000


def pixels_of(path: Path) -> int:
    """Number of pixels of a PNG file, by its header; Pillow refuses to open the largest ones."""
    with open(path, "rb") as file:
        width, height = struct.unpack(">II", file.read(24)[16:])
    return int(width * height)


def on_white(path: Path) -> Image.Image:
    """The picture on a white square of 224 pixels."""
    with Image.open(path) as picture:
        drawn = picture.convert("RGBA")
    side = max(drawn.size)
    square = Image.new("RGBA", (side, side), "white")
    square.alpha_composite(drawn, ((side - drawn.width) // 2, (side - drawn.height) // 2))
    return square.convert("RGB").resize((SIDE, SIDE), Image.Resampling.LANCZOS)


def different(pictures: dict[Path, Image.Image]) -> list[Path]:
    """The pictures that look like none of those before them that stay."""
    small = [picture.resize((16, 16), Image.Resampling.BOX).tobytes() for picture in pictures.values()]
    pixels = torch.stack([torch.tensor(list(each)) for each in small]).float() / 255
    alike = torch.cdist(pixels, pixels) < ALIKE * pixels.shape[1] ** 0.5
    kept: list[int] = []
    for index in range(len(small)):
        if not alike[index, kept].any():
            kept.append(index)
    paths = list(pictures)
    return [paths[index] for index in kept]


def classes(paths: Iterable[Path], root: Path) -> dict[str, list[Path]]:
    """The pictures of each class, by its name: those below the folders at the second level that have enough."""
    found: dict[str, list[Path]] = {}
    for path in paths:
        found.setdefault("-".join(path.relative_to(root).parts[:2]), []).append(path)
    enough = {name: own for name, own in sorted(found.items()) if len(own) >= FEWEST}
    return {name: random.Random(SEED).sample(own, min(MOST, len(own))) for name, own in enough.items()}


def write_images(root: Path, target: Path) -> dict[str, int]:
    """Write ``train`` and ``test`` below a folder, with a subfolder for each class; return how many there are."""
    paths = sorted(path for path in root.rglob("*.png") if len(path.relative_to(root).parts) > 2)
    pictures = {path: on_white(path) for path in paths if pixels_of(path) <= LARGEST}
    chosen = classes(different(pictures), root)
    counts = {"train": 0, "test": 0, "too_large": len(paths) - len(pictures)}
    for split in ("train", "test"):
        shutil.rmtree(target / split, ignore_errors=True)
    for name, paths in chosen.items():
        for index, path in enumerate(paths):
            split = "test" if index % 3 == 2 else "train"
            folder = target / split / name
            folder.mkdir(parents=True, exist_ok=True)
            pictures[path].save(folder / f"{index:03d}-{path.name}")
            counts[split] += 1
    return {"classes": len(chosen), **counts}


@torch.no_grad()
def labelled_features(model: nn.Module, folder: Path) -> tuple[Tensor, Tensor]:
    """Class-token features ``[n, 384]`` and labels of the images of a folder, prepared as in every run."""
    configured = model.pretrained_cfg
    teacher = Teacher(
        model,
        **{key: configured[key] for key in ("mean", "std", "crop_pct", "interpolation")},
        num_classes=0,
        input_size=(3, SIZE, SIZE),
    )
    batches = list(ImageFolder(root=str(folder)).batches(teacher, 50))
    return torch.cat([model(batch.images) for batch in batches]), torch.cat([batch.labels for batch in batches])


@click.command(help=__doc__)
@click.option("--pictures", type=click.Path(exists=True, path_type=Path), default=PICTURES, show_default=True)
@click.option("--cache", type=click.Path(path_type=Path), default=Path("runs/real_vit"), show_default=True)
@click.option("--out", type=click.Path(path_type=Path), default=Path("runs/clipart_vit"), show_default=True)
@click.option("--fit", "fitting", is_flag=True, help="Fit the head again.")
def main(pictures: Path, cache: Path, out: Path, fitting: bool) -> None:
    refuse_without("onnx")
    facts: dict[str, object] = {**write_images(pictures, out)}
    model = encoder(timm_state(onnx_tensors(onnx_file(cache)), SIZE), SIZE)
    if fitting:
        write_head(fit_head(*labelled_features(model, out / "train"), PENALTY), HEAD)
    head = load_file(HEAD)
    if len(head["head.bias"]) != facts["classes"]:
        raise click.UsageError(
            f"{pictures}: gives {facts['classes']} classes, the head has {len(head['head.bias'])}; install "
            "openclipart-png 1:0.18+dfsg-19, or give --fit"
        )
    target = out / f"clipart_vit_{SIZE}.safetensors"
    write_checkpoint(model, HEAD, target)
    print(json.dumps({**facts, "checkpoint": target.name}))


if __name__ == "__main__":
    main()
