"""Compare two processes of one thread each with a single one: synthesis in groups, evaluation, and learning.

    python benchmarks/ranks.py --out benchmarks/results/ranks.json

Both counts make the same images of `bundled:vit_fmnist` with `images/spdfq_plus`, evaluate its quantized copy on the
same images, and reconstruct two blocks of a ViT-S/16 at 224 pixels with 16 images. (The bundled ViT is too small to
share: half of an iteration there does not depend on the images.) torchrun starts the processes, and the counts take
turns. Times leave out the start of the processes.
Efficiency by the clock is T1 / (2 T2), for the median of each count; it needs two free cores. Efficiency by processor
time is the time of the single process divided by that of both together. It shows work that is done twice, but not the
time that a process waits for the other.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from machine import about

from spdfq.api import make_images
from spdfq.backends import Blockwise, Calibration, quantize
from spdfq.evaluation.accuracy import logits_over
from spdfq.recipe import load_recipe
from spdfq.runtime import Runtime
from spdfq.runtime.ranks import Ranks, join
from spdfq.teacher import Teacher, load_teacher

COUNTS = (1, 2)
PARTS = ["models/vit_fmnist", "images/spdfq_plus", "backends/minmax"]
TARGET = 0.9


def worker(out: Path, groups: int, iterations: int, limit: int) -> None:
    """Do the work of one process, and write what it took."""
    torch.set_num_threads(1)
    ranks = join()
    group = 16
    sizes = [f"synthesis.images={groups * group}", f"synthesis.group={group}", f"synthesis.iterations={iterations}"]
    recipe = load_recipe({"extends": PARTS}, [*sizes, f"evaluation.dataset.limit={limit}"])
    teacher, runtime = load_teacher(recipe.model), Runtime(ranks=ranks)
    model = quantize(teacher, noise_of(teacher, 4), recipe.quantization, Runtime())
    torch.manual_seed(0)
    blocks = timm.create_model("vit_small_patch16_224", depth=2)
    larger = Teacher(blocks, mean=(0.5,) * 3, std=(0.5,) * 3, num_classes=1000)
    student = quantize(larger, noise_of(larger, 4), recipe.quantization, Runtime())
    learning = Calibration(teacher=larger, images=noise_of(larger, 16), runtime=runtime)
    parts: dict[str, Callable[[], object]] = {
        "images": lambda: make_images(recipe, teacher, runtime, out / "images"),
        "evaluation": lambda: logits_over(model, teacher, recipe.evaluation, runtime, "quantized", out / "evaluation"),
        "learning": lambda: Blockwise(iterations=iterations).run(student, learning),
    }
    taken = {name: _seconds(work, ranks) for name, work in parts.items()}
    (out / f"rank-{ranks.rank}.json").write_text(json.dumps(taken))


def noise_of(teacher: Teacher, count: int) -> torch.Tensor:
    return torch.randn(count, *teacher.input_size, generator=torch.Generator().manual_seed(0))


def _seconds(work: Callable[[], object], ranks: Ranks) -> dict[str, float]:
    ranks.wait()
    clock, processor = time.perf_counter(), time.process_time()
    work()
    processor = time.process_time() - processor
    ranks.wait()
    return {"clock": time.perf_counter() - clock, "processor": processor}


def run(count: int, sizes: list[str]) -> dict[str, dict[str, float]]:
    """Seconds of each part with so many processes: by the clock, and of all processors together."""
    with tempfile.TemporaryDirectory() as folder:
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
        subprocess.run([*torchrun, __file__, "--worker", folder, *sizes], check=True)
        found = [json.loads(path.read_text()) for path in sorted(Path(folder).glob("rank-*.json"))]
    return {
        part: {
            "clock": max(each[part]["clock"] for each in found),
            "processor": sum(e[part]["processor"] for e in found),
        }
        for part in found[0]
    }


def summary(taken: dict[int, list[dict[str, dict[str, float]]]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for part in ("images", "evaluation", "learning"):
        median = {
            kind: {count: statistics.median(round_[part][kind] for round_ in taken[count]) for count in COUNTS}
            for kind in ("clock", "processor")
        }
        found[part] = {
            "seconds": {kind: {str(n): round(s, 2) for n, s in each.items()} for kind, each in median.items()},
            "efficiency": round(median["clock"][1] / median["clock"][2] / 2, 3),
            "efficiency_of_processor_time": round(median["processor"][1] / median["processor"][2], 3),
            "target": TARGET,
        }
    return found


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--groups", type=int, default=8)
    parser.add_argument("--iterations", type=int, default=20)
    parser.add_argument("--limit", type=int, default=2000, help="number of evaluated images")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help="write JSON here (benchmarks/results/...)")
    arguments = parser.parse_args(argv)
    sizes = {name: getattr(arguments, name) for name in ("groups", "iterations", "limit")}
    if arguments.worker:
        worker(arguments.worker, **sizes)
        return
    facts, given = about(), [f"--{name}={size}" for name, size in sizes.items()]
    taken: dict[int, list[dict[str, dict[str, float]]]] = {count: [] for count in COUNTS}
    for _ in range(arguments.rounds):
        for count in COUNTS:
            taken[count].append(run(count, given))
    result = {"machine": facts, **sizes, "rounds": arguments.rounds, **summary(taken)}
    print(json.dumps(result, indent=1))
    if arguments.out:
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
