"""Compare one iteration of the full synthesis with a bare forward and backward pass of the same number of views.

Full: 32 images of `bundled:vit_fmnist`, crops in every iteration, the attention prior with its automatic weight
(after the iterations that measure it), soft labels, total variation, jitter, flip, and the step of the optimiser.
Bare: the same number of views of the same size through the same teacher, a cross-entropy, and the gradient to the
views. The bare pass runs once with timm's fused attention and once with its explicit attention, which is faster here
and therefore the stricter reference. The three take turns in one process, so that other work on the machine slows all
of them. The ratios are those of the medians.

With --together, it compares numbers of groups in each pass (`synthesis.groups_per_pass`) instead: iterations of MimiQ,
whose groups have 16 images, after those that draw what is kept. The numbers take turns, too.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import quantiles
from typing import Any

import torch
import torch.nn.functional as F
from machine import about
from torch import Tensor, nn

from spdfq.losses import AttentionPriorLoss, SoftCrossEntropyLoss, TotalVariationLoss
from spdfq.recipe import ModelSpec, load_recipe
from spdfq.runtime import Runtime
from spdfq.synth import Flip, Jitter, MultiSemanticSampler, OptimizedImages, SoftLabelTarget
from spdfq.synth.group import Group
from spdfq.synth.group_state import BALANCE_ITERATIONS
from spdfq.synth.loop import step
from spdfq.teacher import Teacher, load_teacher

IMAGES, TARGET = 32, 1.35


def full_synthesis(iterations: int) -> OptimizedImages:
    losses = {
        "attention_prior": AttentionPriorLoss(weight="auto"),
        "soft_cross_entropy": SoftCrossEntropyLoss(),
        "total_variation": TotalVariationLoss(weight=0.05),
    }
    return OptimizedImages(
        images=IMAGES,
        group=IMAGES,
        iterations=iterations,
        losses=losses,
        sampler=MultiSemanticSampler(),
        target=SoftLabelTarget(),
        augmentations=(Jitter(), Flip()),
    )


def bare_pass(module: nn.Module, views: Tensor, labels: Tensor, fused: bool) -> None:
    for part in module.modules():
        if hasattr(part, "fused_attn"):
            part.fused_attn = fused
    torch.autograd.grad(F.cross_entropy(module(views), labels), views)


def seconds(work: Callable[[], None]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def measure(rounds: int) -> dict[str, Any]:
    teacher = load_teacher(ModelSpec(name="bundled:vit_fmnist"))
    with teacher.frozen() as module:
        group = Group(full_synthesis(BALANCE_ITERATIONS + rounds), teacher, Runtime(), 0, IMAGES)
        count = IMAGES + len(group.plan.boxes)
        views = torch.randn(count, *teacher.input_size).requires_grad_()
        labels = torch.arange(count) % teacher.num_classes
        for iteration in range(BALANCE_ITERATIONS):
            step([group], iteration)
        iterations = iter(range(BALANCE_ITERATIONS, BALANCE_ITERATIONS + rounds))
        ways: dict[str, Callable[[], None]] = {
            "full": lambda: step([group], next(iterations)),
            "bare_fused": lambda: bare_pass(module, views, labels, fused=True),
            "bare_explicit": lambda: bare_pass(module, views, labels, fused=False),
        }
        for fused in (True, False):
            bare_pass(module, views, labels, fused)
        taken = [{way: seconds(work) for way, work in ways.items()} for _ in range(rounds)]
    return {"images": IMAGES, "crops": count - IMAGES, "rounds": rounds, **summary(taken)}


def measure_together(name: str, sizes: list[int], together: list[int], rounds: int) -> dict[str, Any]:
    teacher = load_teacher(ModelSpec(name=name), weights=name.startswith("bundled:"))
    rows = [compare_together(teacher, images, together, rounds) for images in sizes]
    return {"model": name, "rounds": rounds, "groups": rows}


def compare_together(teacher: Teacher, images: int, together: list[int], rounds: int) -> dict[str, Any]:
    """Image iterations per second with each number of groups in a pass, beside those with the first number."""
    parts = {"extends": ["models/vit_fmnist", "images/mimiq", "backends/blockwise"]}
    spec: Any = load_recipe(parts, [f"synthesis.group={images}", f"synthesis.iterations={rounds + 2}"]).synthesis
    with teacher.frozen():
        passes = {n: [Group(spec, teacher, Runtime(), index, images) for index in range(n)] for n in together}
        for groups in passes.values():
            step(groups, 0)
            step(groups, 1)
        taken = [
            {n: seconds(partial(step, groups, iteration)) for n, groups in passes.items()}
            for iteration in range(2, rounds + 2)
        ]
    speed = {n: images * n / statistics.median(each[n] for each in taken) for n in together}
    first, *others = together
    ratios = {n: [n / first * each[first] / each[n] for each in taken] for n in others}
    return {
        "images": images,
        "image_iterations_per_second": {n: round(value, 2) for n, value in speed.items()},
        "speed_up": {n: round(speed[n] / speed[first], 2) for n in others},
        "speed_up_quartiles_per_round": {n: [round(q, 2) for q in quantiles(each, n=4)] for n, each in ratios.items()},
    }


def summary(taken: list[dict[str, float]]) -> dict[str, Any]:
    median = {way: statistics.median(round_[way] for round_ in taken) for way in taken[0]}
    ratios = {way: median["full"] / median[way] for way in ("bare_fused", "bare_explicit")}
    quartiles = {
        way: [round(q, 3) for q in statistics.quantiles([r["full"] / r[way] for r in taken], n=4)] for way in ratios
    }
    return {
        "median_ms": {way: round(1e3 * value, 2) for way, value in median.items()},
        "ratio": {way: round(value, 3) for way, value in ratios.items()},
        "ratio_quartiles_per_round": quartiles,
        "target": TARGET,
        "met": max(ratios.values()) <= TARGET,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--together", type=int, nargs="+", help="numbers of groups in a pass; the first is 1")
    parser.add_argument("--model", default="bundled:vit_fmnist", help="with --together; random weights unless bundled")
    parser.add_argument("--images", type=int, nargs="+", default=[16], help="with --together: images in a group")
    parser.add_argument("--out", type=Path, help="write JSON here (benchmarks/results/...)")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    facts = about()
    print(json.dumps(facts, indent=1))
    if arguments.together:
        result = measure_together(arguments.model, arguments.images, arguments.together, arguments.rounds)
    else:
        result = measure(arguments.rounds)
    print(json.dumps(result, indent=1))
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps({"machine": facts, **result}, indent=1) + "\n")


if __name__ == "__main__":
    main()
