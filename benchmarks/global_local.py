"""Measure the cost of the step `global_local` on a ViT of patches of 14 pixels, and on the bundled one.

    python benchmarks/global_local.py --threads 1 --out benchmarks/results/global_local.json
    python benchmarks/global_local.py --threads 1 --precision bfloat16

Iterations of the reconstruction of some blocks, compared with bare forward and backward passes of the same float block
and of the float rest of the network, with the gradient of the block's weights and biases. The two take turns in one
process, so that other work on the machine slows both. The ratio is that of the medians; the last one is of their sums.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import torch
from machine import about

from spdfq.backends import Calibration, GlobalLocal
from spdfq.backends.blocks import BlockCall, block_calls, block_names
from spdfq.backends.learning.reconstruction import BlockData
from spdfq.backends.learning.training import trainable
from spdfq.backends.propagation import Propagation
from spdfq.quantized import QuantizedModel, place
from spdfq.quantizers import learned_scales
from spdfq.recipe import ModelSpec, load_recipe
from spdfq.runtime import Runtime
from spdfq.runtime.runtime import Precision
from spdfq.teacher import Teacher, load_teacher

IMAGES, TARGET = 32, 1.25
MODELS = {
    "vit_s_112": ModelSpec(name="vit_small_patch14_dinov2", img_size=112, pretrained=False),
    "vit_fmnist": ModelSpec(name="bundled:vit_fmnist"),
}
PARTS = ["models/vit_fmnist", "images/gaussian_noise", "backends/blockwise"]
UNIFORM = ["quantization.overrides=[]", "quantization.softmax={type='uniform', bits=8}"]


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def bare_rest(network: Any, block: int, hidden: torch.Tensor) -> torch.Tensor:
    for module in network.blocks[block + 1 :]:
        hidden = module(hidden)
    feature: torch.Tensor = network.forward_head(network.norm(hidden), pre_logits=True)
    return feature


def measure(teacher: Teacher, rounds: int, iterations: int, precision: Precision) -> dict[str, Any]:
    spec = load_recipe({"extends": PARTS}, UNIFORM).quantization
    model, runtime = place(teacher, spec), Runtime(precision=precision)
    images = torch.randn(IMAGES, *teacher.input_size, generator=torch.Generator().manual_seed(0))
    calibration = Calibration(teacher=teacher, images=images, runtime=runtime)
    spec.steps[0].run(model, calibration)
    step = GlobalLocal(iterations=iterations)
    with teacher.frozen() as network:
        calls = block_calls(network, block_names(model), images[:1])
        jobs = list(step.jobs(network, calls, model, calibration, lambda *_, **__: None))
        depth = len(calls)
        blocks = sorted({0, depth // 2, depth - 1})
        rows = {
            block: turns(jobs[block], calls[block], block, network, model, calibration, rounds, iterations)
            for block in blocks
        }
    ours, bare = (sum(row["median_ms"][key] for row in rows.values()) for key in ("iteration", "bare"))
    return {"precision": precision, "blocks": rows, "ratio": round(ours / bare, 3), "met": ours / bare <= TARGET}


def turns(
    job: Any,
    call: BlockCall,
    block: int,
    network: Any,
    model: QuantizedModel,
    calibration: Calibration,
    rounds: int,
    iterations: int,
) -> dict[str, Any]:
    stream = Propagation(network, calibration.images, IMAGES)
    hidden = stream.inputs_of(call)
    target = stream.through(call, hidden)
    weights = [network.get_parameter(name) for name in job.learner.changes]

    def learn() -> None:
        with learned_scales(job.scaled.values()), trainable(job.learner.parameters), model.visiting(job.visit):
            job.optimise(BlockData(hidden, hidden, target))

    @torch.enable_grad()
    def bare() -> None:
        with trainable(weights):
            for _ in range(iterations):
                with calibration.runtime.autocast():
                    output = call.run(network, hidden)[0]
                    feature = bare_rest(network, block, output)
                local = (output.float() - target[0]).square().mean()
                torch.autograd.grad((feature.float() - job.feature[0]).square().mean() + local, weights)

    ours, plain = [], []
    for _ in range(1 + rounds):
        ours.append(seconds(learn) / iterations)
        plain.append(seconds(bare) / iterations)
    pairs = [ours / plain for ours, plain in zip(ours[1:], plain[1:], strict=True)]  # the first round is a warm-up
    medians = statistics.median(ours[1:]), statistics.median(plain[1:])
    return {
        "median_ms": {"iteration": round(1e3 * medians[0], 1), "bare": round(1e3 * medians[1], 1)},
        "ratio": round(medians[0] / medians[1], 3),
        "ratio_range_per_round": [round(min(pairs), 3), round(max(pairs), 3)],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, help="one model; both by default")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--precision", choices=get_args(Precision), default="float32")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--out", type=Path, help="write JSON here (benchmarks/results/...)")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    facts = about()
    print(json.dumps(facts, indent=1))
    result: dict[str, Any] = {"images": IMAGES, "rounds": arguments.rounds, "target": TARGET}
    for name in [arguments.model] if arguments.model else MODELS:
        iterations = 10 if name == "vit_fmnist" else 2
        result[name] = measure(load_teacher(MODELS[name]), arguments.rounds, iterations, arguments.precision)
        print(json.dumps({name: result[name]}, indent=1), flush=True)
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps({"machine": facts, **result}, indent=1) + "\n")


if __name__ == "__main__":
    main()
