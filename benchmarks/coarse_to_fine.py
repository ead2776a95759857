"""Make images with a first part at a smaller size, and compare their accuracy and time with those at full size.

    python benchmarks/coarse_to_fine.py --out benchmarks/results/coarse_to_fine.json
    python benchmarks/coarse_to_fine.py --model real          # where runs/real_vit/real_vit_112.safetensors is

`images/spdfq_plus`, quantized by two back-ends. "75 + 25" means 75 iterations on a copy of the teacher for smaller
images, whose position embedding is interpolated, and 25 at full size, which start from the enlarged images. Priors have
the same shapes in both parts, because they are drawn in shares of the image. "0 + 50" shows what the same seconds give
without a smaller size. Seconds are processor time of one thread.
"""

import argparse
import copy
import json
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from attrs import asdict, evolve, frozen
from machine import about
from torch import Tensor

import spdfq
from spdfq.recipe import load_recipe
from spdfq.recipe.schema import ModelSpec
from spdfq.synth import SpectralAdam
from spdfq.teacher import Teacher, load_teacher

VARIANTS = ((0, 100), (75, 25), (50, 50), (0, 50), (0, 25))
BACKENDS = ("ridge", "strong")
REAL = ModelSpec(
    name="vit_small_patch14_dinov2",
    checkpoint="runs/real_vit/real_vit_112.safetensors",
    num_classes=10,
    img_size=112,
)
# teacher, side of the smaller images, bits, and the test images that took part in no choice
MODELS: dict[str, tuple[ModelSpec | str, int, int]] = {"bundled": ("bundled:vit_fmnist", 16, 3), "real": (REAL, 56, 4)}
TEST = {"type": "fashion_mnist", "split": "test", "limit": 1000, "skip": 500}


@frozen(kw_only=True)
class Started(SpectralAdam):
    """The optimizer, with images to start from instead of noise."""

    images: Any = None

    def start(self, noise: Tensor) -> Tensor:
        return super().start(noise) if self.images is None else self.images.clone()


def smaller(teacher: Teacher, side: int) -> Teacher:
    """The teacher for images of another size."""
    module = copy.deepcopy(teacher.module)
    module.set_input_size(img_size=side)
    return evolve(teacher, module=module, input_size=(teacher.input_size[0], side, side))


def images_of(teacher: Teacher, iterations: int, seed: int, start: Tensor | None) -> Tensor:
    """Images after so many iterations."""
    source = load_recipe(
        {"extends": ["models/vit_fmnist", "images/spdfq_plus", "backends/ridge"]},
        [f"synthesis.iterations={iterations}"],
    ).synthesis
    optimizer = Started(**asdict(source.optimizer, recurse=False), images=start)
    return spdfq.synthesize(teacher, evolve(source, optimizer=optimizer), seed=seed)


def enlarged(images: Tensor, teacher: Teacher) -> Tensor:
    """The images at the teacher's size, within its range of pixels."""
    whole = F.interpolate(images, size=teacher.input_size[1:], mode="bicubic", antialias=True)
    low, high = teacher.pixel_range(whole)
    return torch.maximum(torch.minimum(whole, high), low)


def measure(teacher: Teacher, side: int, bits: int, seed: int, variant: tuple[int, int]) -> list[dict[str, Any]]:
    """The rows of one variant and seed, one for each back-end."""
    coarse, fine = variant
    start, begin = None, time.process_time()
    if coarse:
        start = enlarged(images_of(smaller(teacher, side), coarse, seed, None), teacher)
    images = images_of(teacher, fine, seed, start)
    seconds = round(time.process_time() - begin, 1)
    rows = []
    for backend in BACKENDS:
        widths = [f"quantization.{kind}.bits={bits}" for kind in ("weights", "activations", "softmax")]
        model = spdfq.quantize(teacher, images, f"backends/{backend}", seed=seed, overrides=widths)
        top1 = spdfq.evaluate(model, teacher, TEST, batch=50)["quantized"]["top1"]
        rows.append(
            {"coarse": coarse, "fine": fine, "seed": seed, "backend": backend, "seconds": seconds, "top1": top1}
        )
    return rows


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="bundled")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, help="write JSON here (benchmarks/results/...)")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    facts = about()
    spec, side, bits = MODELS[arguments.model]
    teacher, rows = load_teacher(spec), []
    for seed in arguments.seeds:
        for variant in VARIANTS:
            rows += measure(teacher, side, bits, seed, variant)
            print(json.dumps(rows[-len(BACKENDS) :]), flush=True)
    result = {"machine": facts, "model": teacher.name, "side": side, "bits": bits, "rows": rows}
    if arguments.out:
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
