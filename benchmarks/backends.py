"""Measure the cost of back-end steps on a ViT-S with random weights and 32 random images.

    python benchmarks/backends.py --threads 2 --out benchmarks/results/backends.json
    python benchmarks/backends.py --threads 1 --no-closed-form --precision bfloat16
    python benchmarks/backends.py --model vit_base_patch16_224 --rounds 0    # the memory of ridge on a ViT-B

Closed form: the seconds of each step of `backends/ridge` (calibrate, repq, ridge), and the peak memory of the
process. Block-wise: ten iterations of the reconstruction of one block (the recipe has a hundred), compared with ten
bare forward and backward passes of the same float block on the same tokens. The two take turns in one process, so
that other work on the machine slows both. The ratio is that of the medians.
"""

import argparse
import json
import resource
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import torch
from machine import about

from spdfq.backends import Blockwise, Calibration
from spdfq.backends.blocks import block_calls, block_names
from spdfq.backends.learning.reconstruction import BlockData, BlockReconstruction
from spdfq.backends.learning.training import trainable
from spdfq.backends.propagation import Propagation
from spdfq.quantized import place
from spdfq.recipe import ModelSpec, load_recipe
from spdfq.recipe.structure import unstructure
from spdfq.runtime import Runtime
from spdfq.runtime.runtime import Precision
from spdfq.teacher import Teacher, load_teacher

ITERATIONS = 10  # per turn
IMAGES, CLOSED_FORM_TARGET, BLOCKWISE_TARGET = 32, 180.0, 1.3
SMALL = "vit_small_patch16_224"
PARTS = ["models/vit_fmnist", "images/gaussian_noise"]


def images_for(teacher: Teacher) -> torch.Tensor:
    return torch.randn(IMAGES, *teacher.input_size, generator=torch.Generator().manual_seed(0)).to(teacher.device)


def seconds(work: Callable[[], object]) -> float:
    wait = torch.accelerator.synchronize if torch.accelerator.is_available() else lambda: None
    wait()
    start = time.perf_counter()
    work()
    wait()
    return time.perf_counter() - start


def closed_form(teacher: Teacher) -> dict[str, Any]:
    spec = load_recipe({"extends": [*PARTS, "backends/ridge"]}).quantization
    model = place(teacher, spec)
    calibration = Calibration(teacher=teacher, images=images_for(teacher), runtime=Runtime())
    taken = {
        unstructure(step, "step")["type"]: round(seconds(lambda step=step: step.run(model, calibration)), 2)
        for step in spec.steps
    }
    total = round(sum(taken.values()), 2)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    facts = {"seconds": taken, "total_seconds": total, "peak_gib": round(peak, 2)}
    if teacher.name != SMALL:  # the target is for this model only
        return facts
    return {**facts, "target_seconds": CLOSED_FORM_TARGET, "met": total <= CLOSED_FORM_TARGET}


def blockwise(teacher: Teacher, rounds: int, precision: Precision) -> dict[str, Any]:
    spec = load_recipe({"extends": [*PARTS, "backends/blockwise"]}).quantization
    model, images = place(teacher, spec), images_for(teacher)
    runtime = Runtime(device=teacher.device, precision=precision)
    calibration = Calibration(teacher=teacher, images=images, runtime=runtime)
    spec.steps[0].run(model, calibration)
    with teacher.frozen() as network:
        call = block_calls(network, block_names(model), images[:1])[0]
        stream = Propagation(network, images, IMAGES)
        hidden = stream.inputs_of(call)
        target = stream.through(call, hidden)
        job = BlockReconstruction(Blockwise(iterations=ITERATIONS), call, model, calibration, lambda *_, **__: None)
        weights = [network.get_parameter(name) for name in job.learner.changes]

        def learn() -> None:
            with model.visiting(job.visit):
                job.optimise(BlockData(hidden, hidden, target))

        def bare() -> None:
            for _ in range(ITERATIONS):
                with runtime.autocast():
                    output = call.run(network, hidden)[0]
                torch.autograd.grad((output.float() - target[0]).norm(), weights)

        with trainable([*job.learner.parameters, *weights]), torch.enable_grad():
            quantized, plain = [], []
            for _ in range(1 + rounds):
                quantized.append(seconds(learn) / ITERATIONS)
                plain.append(seconds(bare) / ITERATIONS)
    return {"precision": precision, **ratio(quantized[1:], plain[1:])}  # the first round is a warm-up


def ratio(quantized: list[float], plain: list[float]) -> dict[str, Any]:
    medians = statistics.median(quantized), statistics.median(plain)
    pairs = [q / p for q, p in zip(quantized, plain, strict=True)]
    return {
        "rounds": len(pairs),
        "median_ms": {"iteration": round(1e3 * medians[0], 1), "bare": round(1e3 * medians[1], 1)},
        "ratio": round(medians[0] / medians[1], 3),
        "ratio_quartiles_per_round": [round(q, 3) for q in statistics.quantiles(pairs, n=4)],
        "target": BLOCKWISE_TARGET,
        "met": medians[0] / medians[1] <= BLOCKWISE_TARGET,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=SMALL, help="a timm name; the weights are random")
    parser.add_argument("--rounds", type=int, default=10, help="rounds of the block-wise part; 0 skips it")
    parser.add_argument("--no-closed-form", action="store_true", help="measure the block-wise part alone")
    parser.add_argument(
        "--precision", choices=get_args(Precision), default="float32", help="precision of the block-wise part"
    )
    parser.add_argument("--threads", type=int)
    parser.add_argument("--out", type=Path, help="write JSON here (benchmarks/results/...)")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    facts = about()
    print(json.dumps(facts, indent=1))
    teacher = load_teacher(ModelSpec(name=arguments.model, pretrained=False))
    result: dict[str, Any] = {"model": arguments.model, "images": IMAGES}
    if arguments.rounds:
        result["blockwise"] = blockwise(teacher, arguments.rounds, arguments.precision)
        print(json.dumps(result["blockwise"], indent=1))
    if not arguments.no_closed_form:
        result["closed_form"] = closed_form(teacher)
        print(json.dumps(result["closed_form"], indent=1))
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps({"machine": facts, **result}, indent=1) + "\n")


if __name__ == "__main__":
    main()
