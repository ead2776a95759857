"""Measure synthesis, reconstruction and quantized evaluation on one GPU, in at most ten minutes.

    python benchmarks/gpu.py                   # writes benchmarks/results/gpu_CARD.json
    python benchmarks/gpu.py --dry --out gpu.json   # everything at toy size, on any machine

The teacher is a DeiT-B of 224x224 pixels with random weights. Synthesis: the shipped recipes on their published
schedules, each also as a ratio to bare forward and backward passes of a group of 32 images in the same run. A part that
takes longer than its share of the ten minutes is stopped; its seconds are then extrapolated, and `complete` is false.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from attrs import evolve, field, frozen
from backends import blockwise, images_for, seconds
from machine import about
from torch.utils._python_dispatch import TorchDispatchMode

from spdfq.backends import Calibration
from spdfq.quantized import place
from spdfq.recipe import ModelSpec, Recipe, load_recipe
from spdfq.recipe.structure import unstructure
from spdfq.runtime import Advance, Runtime, pick_device, pick_precision
from spdfq.synth import loop
from spdfq.synth.group import Group
from spdfq.synth.group_state import BALANCE_ITERATIONS
from spdfq.teacher import Teacher, load_teacher

ROOT = Path(__file__).parents[1]
GROUP, ROUNDS, LIMIT = 32, 10, 45.0
NO_CROPS = "synthesis.sampler={type='whole_image'}"


@frozen
class Case:
    """A recipe for images: its name, the changes to it, and the seconds that it should take on a GPU."""

    recipe: str
    target: float
    changes: tuple[str, ...] = ()


CASES = {
    "spdfq without crops": Case("spdfq", 10, (NO_CROPS,)),
    "spdfq": Case("spdfq", 25),
    "psaq_vit": Case("psaq_vit", 12),
    "spdfq_plus": Case("spdfq_plus", 2),
    "spdfq_plus, 256 images": Case("spdfq_plus", 8, ("synthesis.images=256",)),
}


class Enough(Exception):
    """The time for a part is over."""


@frozen
class Limited:
    """A progress bar that stops the work after some seconds, and knows how much of it was done."""

    limit: float
    done: Counter[str] = field(factory=Counter)

    @contextmanager
    def __call__(self, _: str, total: int | None) -> Iterator[Advance]:
        start = time.perf_counter()
        self.done["total"] = total or 0

        def advance(steps: int = 1, **_: float) -> None:
            self.done["steps"] += steps
            if time.perf_counter() - start > self.limit and self.done["steps"] < self.done["total"]:
                raise Enough

        yield advance

    def timed(self, work: Callable[[], object]) -> dict[str, Any]:
        """The seconds of all steps, from those that were done."""

        def stopped() -> None:
            with suppress(Enough):
                work()

        taken, share = seconds(stopped), self.done["steps"] / self.done["total"]
        return {"seconds": round(taken / share, 3), "complete": share == 1}


class Operations(TorchDispatchMode):
    """Counts the operators that are no views."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        aliases = [result.alias_info for result in func._schema.returns]
        self.count += not any(alias is not None and not alias.is_write for alias in aliases)
        return func(*args, **(kwargs or {}))


def made(dry: bool, device: torch.device) -> Teacher:
    if dry:
        sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 10}
        network = timm.create_model("vit_tiny_patch16_224", **sizes)
        teacher = Teacher(network, mean=[0.5] * 3, std=[0.5] * 3, num_classes=10, input_size=(3, 32, 32))
    else:
        teacher = load_teacher(ModelSpec(name="deit_base_patch16_224", pretrained=False))
    teacher.module.to(device)
    return teacher


def recipe(images: str = "gaussian_noise", backend: str = "minmax", changes: tuple[str, ...] = ()) -> Recipe:
    return load_recipe({"extends": ["models/vit_fmnist", f"images/{images}", f"backends/{backend}"]}, changes)


def bare(teacher: Teacher, runtime: Runtime, count: int) -> float:
    """The median seconds of a forward and backward pass of some images."""
    views = torch.randn(count, *teacher.input_size, device=runtime.device).requires_grad_()
    labels = torch.arange(count, device=runtime.device) % teacher.num_classes

    def once() -> None:
        with runtime.autocast():
            logits = teacher.module(views)
        torch.autograd.grad(F.cross_entropy(logits.float(), labels), views)

    once()
    return statistics.median(seconds(once) for _ in range(ROUNDS))


def synthesis(teacher: Teacher, runtime: Runtime, dry: bool) -> dict[str, Any]:
    """Operations, kernels and seconds of the recipes for images."""
    toy = ("synthesis.iterations=12", "synthesis.images=2") if dry else ()
    specs = {name: recipe(case.recipe, changes=(*case.changes, *toy)).synthesis for name, case in CASES.items()}
    found: dict[str, Any] = {"bare_ms": {}, "recipes": {}}
    with teacher.frozen():
        pass_seconds = bare(teacher, runtime, GROUP)
        found["bare_ms"] = round(1e3 * pass_seconds, 3)
    for name, spec in specs.items():
        evolve(spec, iterations=2, images=min(spec.images, spec.group)).synthesize(teacher, runtime)  # warms up
        limited = Limited(LIMIT)
        with peak_memory(runtime.device) as memory:
            work = limited.timed(lambda spec=spec, to=limited: spec.synthesize(teacher, evolve(runtime, progress=to)))
        iterations = spec.iterations * -(-spec.images // spec.group)
        found["recipes"][name] = {
            "images": spec.images,
            "iterations": iterations,
            **work,
            "target_seconds": None if dry else CASES[name].target,
            "met": None if dry else work["seconds"] <= CASES[name].target,
            "ratio_to_bare": round(work["seconds"] / iterations / pass_seconds, 3),
            **memory,
            **launches(spec, teacher, runtime),
        }
    return found


def launches(spec: Any, teacher: Teacher, runtime: Runtime) -> dict[str, int | None]:
    """Operations of an iteration that are no views, and kernels on a GPU."""
    count = min(spec.images, spec.group)
    with teacher.frozen():
        group = Group(evolve(spec, iterations=BALANCE_ITERATIONS + 2), teacher, runtime, 0, count)
        for iteration in range(BALANCE_ITERATIONS):
            loop.step([group], iteration)
        with Operations() as operations:
            loop.step([group], BALANCE_ITERATIONS)
        kernels = None
        if runtime.device.type == "cuda":
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
                loop.step([group], BALANCE_ITERATIONS + 1)
                torch.cuda.synchronize()
            kernels = sum(event.device_type == torch.autograd.DeviceType.CUDA for event in profile.events())
    return {"operations": operations.count, "kernels": kernels}


def reconstruction(teacher: Teacher, runtime: Runtime) -> dict[str, Any]:
    """Seconds of the steps of `backends/ridge`, and an iteration of `backends/blockwise` beside bare passes."""
    spec = recipe(backend="ridge").quantization
    model, images, taken = place(teacher, spec), images_for(teacher), {}
    with peak_memory(runtime.device) as memory:
        for step in spec.steps:
            limited = Limited(LIMIT)
            calibration = Calibration(teacher=teacher, images=images, runtime=evolve(runtime, progress=limited))
            taken[unstructure(step, "step")["type"]] = limited.timed(
                lambda step=step, on=calibration: step.run(model, on)
            )
    learning = blockwise(teacher, 3, runtime.precision)
    return {"ridge": {**taken, **memory}, "blockwise": {key: learning[key] for key in ("median_ms", "ratio")}}


def evaluation(teacher: Teacher, runtime: Runtime) -> dict[str, Any]:
    """Images per second of the network and of its quantized copy."""
    spec = recipe().quantization
    model, images = place(teacher, spec), images_for(teacher)
    for step in spec.steps:
        step.run(model, Calibration(teacher=teacher, images=images, runtime=runtime))
    found: dict[str, Any] = {}
    with torch.no_grad(), peak_memory(runtime.device) as memory:
        for name, network in (("float", teacher.module), ("quantized", model)):
            network(images)
            taken = statistics.median(seconds(lambda network=network: network(images)) for _ in range(ROUNDS))
            found[f"{name}_images_per_second"] = round(len(images) / taken, 1)
    return {**found, **memory}


@contextmanager
def peak_memory(device: torch.device) -> Iterator[dict[str, float]]:
    """The largest memory inside the block: of the GPU, or of the process since its start."""
    found: dict[str, float] = {}
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    yield found
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else 0
    found["peak_gib"] = round(peak / 2**30 or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 3)


def gpu_tests() -> str:
    """The last line of the tests that need a GPU."""
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-n0", "-q"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=150)
    return (done.stdout.strip().splitlines() or [done.stderr.strip()])[-1]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry", action="store_true", help="toy sizes, on a CPU if there is no GPU; no tests")
    parser.add_argument("--precision", choices=("auto", "float32", "bfloat16"), default="auto")
    parser.add_argument("--out", type=Path, help="the JSON file; by default in benchmarks/results")
    arguments = parser.parse_args(argv)
    device = pick_device("auto" if arguments.dry else "cuda", "gpu.py")
    runtime = Runtime(device=device, precision=pick_precision(arguments.precision, device))
    facts, start = about(str(device)), time.perf_counter()
    teacher = made(arguments.dry, device)
    result: dict[str, Any] = {"machine": facts, "dry": arguments.dry, "model": teacher.name}
    result |= {"precision": runtime.precision, "tests": None if arguments.dry else gpu_tests()}
    result["synthesis"] = synthesis(teacher, runtime, arguments.dry)
    result["reconstruction"] = reconstruction(teacher, runtime)
    result["evaluation"] = evaluation(teacher, runtime)
    result["seconds"] = round(time.perf_counter() - start, 1)
    card = "_".join(str(facts["device"]).lower().split())
    path = arguments.out or ROOT / "benchmarks" / "results" / f"gpu_{card}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
