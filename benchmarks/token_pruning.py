"""Measure how much time token pruning saves (`synthesis.pruning`, from Sparse Model Inversion).

    python benchmarks/token_pruning.py --images 2 --set 'runtime.precision="float32"'
    python benchmarks/token_pruning.py --recipe images/patch_rebirth --set synthesis.pruning.share=0.5 \\
        --set 'runtime.precision="float32"'

The recipe is `images/smi`, or the part that --recipe names, on a ViT-S/16 at 224 pixels with random weights; the time
does not depend on the weights.
There is one group of images for each number of remaining patches. The groups take turns in one process, one iteration
each, so that other work on the machine slows all of them. Times are medians. The speed-up of a whole run weights each
median by the number of iterations that the recipe has with so many patches, and includes the passes that rank the
patches.
"""

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from machine import about

from spdfq.recipe import ModelSpec, load_recipe
from spdfq.runtime import Runtime, make_runtime
from spdfq.synth.group import Group
from spdfq.synth.loop import prune, step
from spdfq.teacher import load_teacher

MODEL = "vit_small_patch16_224"


def recipe(images: int, part: str, overrides: list[str]) -> Any:
    parts = ["models/vit_fmnist", part, "backends/blockwise"]
    changes = [f"synthesis.images={images}", f'model.name="{MODEL}"', "model.pretrained=false", *overrides]
    return load_recipe({"extends": parts}, changes)


def pruned_until(group: Group, iteration: int) -> None:
    """Bring the group into its state at an iteration, except for its images."""
    for start in group.spec.pruning.at:
        if start <= iteration:
            prune([group], start)


def seconds(group: Group, iteration: int) -> float:
    start = time.perf_counter()
    step([group], iteration)
    if group.state.images.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def measure(whole: Any, rounds: int, runtime: Runtime) -> dict[str, Any]:
    images = whole.synthesis.images
    spec, teacher = whole.synthesis, load_teacher(ModelSpec(name=MODEL, pretrained=False))
    teacher.module.to(runtime.device)
    starts = [1, *(start + 1 for start in spec.pruning.at)]  # past the ranking pass
    times: dict[int, list[float]] = {start: [] for start in starts}
    with teacher.frozen():
        groups = {start: Group(spec, teacher, runtime, 0, images) for start in starts}
        for start, group in groups.items():
            pruned_until(group, start)
            seconds(group, start)
        for _ in range(rounds):
            for start, group in groups.items():
                times[start].append(seconds(group, start))
    grid = groups[1].pruner.layout.grid
    medians = [statistics.median(times[start]) for start in starts]
    left = [spec.pruning.left(grid[0] * grid[1], start) for start in starts]
    ends = [*spec.pruning.at, spec.iterations]
    spent = [end - begin for begin, end in zip([0, *spec.pruning.at], ends, strict=True)]
    ranking = sum(medians[: len(spec.pruning.at)]) / 3  # a pass without its gradient costs about a third
    total = sum(count * median for count, median in zip(spent, medians, strict=True)) + ranking
    return {
        "images": images,
        "rounds": rounds,
        "patches_left": left,
        "iterations_spent": spent,
        "median_ms": [round(1000 * median, 2) for median in medians],
        "speed_up_of_an_iteration": [round(medians[0] / median, 2) for median in medians],
        "speed_up_of_a_run": round(spec.iterations * medians[0] / total, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--recipe", default="images/smi", help="recipe part of the images")
    parser.add_argument("--set", action="append", default=[], help="KEY=VALUE of the recipe")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, help="write JSON here (benchmarks/results/...)")
    arguments = parser.parse_args()
    whole = recipe(arguments.images, arguments.recipe, arguments.set)
    runtime = make_runtime(whole.runtime, 0, arguments.device)
    facts = {**about(arguments.device), "precision": runtime.precision}
    asked = [arguments.recipe, *arguments.set]
    result = {"machine": facts, "recipe": asked, **measure(whole, arguments.rounds, runtime)}
    print(json.dumps(result, indent=1))
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
