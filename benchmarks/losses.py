"""Compare the memory and time of two losses over pairs with their direct formulas, forward and backward.

The size is that of a ViT-S with 256 patches, a group of 32 images and 12 blocks. The direct patch similarity entropy
builds the full tensors of cosines and kernel densities. The direct head similarity builds all pairs of maps. Time:
the two ways take turns, block by block, in one process, so that other work on the machine slows both. Memory (on
Linux): each way runs all blocks in its own process. The number is the peak above the level before, without the
gradients, which both ways must return. If the direct way does not fit into memory, its peak is extrapolated from
those of one and two blocks, because each block adds the same amount.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from attrs import evolve, frozen
from machine import about
from torch import Tensor

from spdfq.attention import AttentionRecord
from spdfq.losses.functional import patch_similarity_entropy
from spdfq.losses.head_similarity import recorded_head_similarity

IMAGES, BLOCKS = 32, 12
TOKENS, HEADS, DIM = 256, 6, 64
TARGETS = {
    "patch_similarity_entropy": {"memory": 1 / 10, "time": 1 / 3, "value": 1e-4},
    "head_similarity": {"memory": 1 / 10, "value": 1e-4},
}
Operands = list[Tensor]


@frozen
class Size:
    """The number of images and blocks, and the device."""

    images: int
    blocks: int
    device: str


def entropy(operands: Operands) -> Tensor:
    return patch_similarity_entropy(operands[0])


def direct_entropy(operands: Operands) -> Tensor:
    (features,) = operands
    similarity = F.cosine_similarity(features.unsqueeze(1), features.unsqueeze(2), dim=-1).flatten(1)
    low, high = (end.item() for end in similarity.detach().aminmax())
    points = torch.linspace(low, high, 10, device=features.device)
    distance = (points.view(1, -1, 1) - similarity.unsqueeze(1)) / 0.01
    density = (-0.5 * distance.square()).exp().mean(-1) / (0.01 * math.sqrt(2 * math.pi)) + 1e-4
    return torch.trapezoid(-density * density.log(), points, dim=-1).mean()


def similarity(operands: Operands) -> Tensor:
    query, key = operands
    return recorded_head_similarity(AttentionRecord(queries=[query], keys=[key])).mean()


def direct_similarity(operands: Operands) -> Tensor:
    query, key = operands
    scores = (query @ key.mT).transpose(1, 2)
    low, high = scores.amin(-1, keepdim=True), scores.amax(-1, keepdim=True)
    maps = (scores - low) / (high - low)
    mean, power = maps.mean(-1), maps.square().mean(-1)
    variance = power - mean.square()
    product = mean.unsqueeze(-1) * mean.unsqueeze(-2)
    covariance = (maps.unsqueeze(2) * maps.unsqueeze(3)).mean(-1) - product
    above = (2 * product + 1e-4) * (2 * covariance + 9e-4)
    squares, variances = (x.unsqueeze(-1) + x.unsqueeze(-2) for x in (mean.square(), variance))
    ssim = above / ((squares + 1e-4) * (variances + 9e-4))
    others = ~torch.eye(HEADS, dtype=torch.bool, device=query.device)
    return ssim[..., others].square().mean()


LOSSES: dict[str, dict[str, Callable[[Operands], Tensor]]] = {
    "patch_similarity_entropy": {"ours": entropy, "direct": direct_entropy},
    "head_similarity": {"ours": similarity, "direct": direct_similarity},
}


def operands(loss: str, block: int, size: Size) -> Operands:
    """The tensors that a block gives to a loss. The tokens share a common part, so that their similarities vary."""
    generator = torch.Generator().manual_seed(block)
    shapes = {
        "patch_similarity_entropy": [(size.images, TOKENS, DIM)],
        "head_similarity": 2 * [(size.images, HEADS, TOKENS, DIM)],
    }
    made = []
    for shape in shapes[loss]:
        common = torch.randn(*shape[:-2], 1, shape[-1], generator=generator)
        made.append((common + torch.randn(shape, generator=generator)).to(size.device).requires_grad_())
    return made


def work(function: Callable[[Operands], Tensor], blocks: list[Operands]) -> float:
    """Forward and backward through all blocks. As in a synthesis, all blocks are in memory until the gradient."""
    total = torch.stack([function(block) for block in blocks]).sum()
    torch.autograd.grad(total, [tensor for block in blocks for tensor in block])
    return total.item()


def peak_in_this_process(loss: str, way: str, size: Size) -> float:
    """Peak memory above the level before, in mebibytes."""
    work(LOSSES[loss][way], [[tensor[:1] for tensor in operands(loss, 0, size)]])
    ready = [operands(loss, block, size) for block in range(size.blocks)]
    if size.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work(LOSSES[loss][way], ready)
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    Path("/proc/self/clear_refs").write_text("5")  # reset the peak
    before = resident_mib("VmRSS")
    work(LOSSES[loss][way], ready)
    return resident_mib("VmHWM") - before


def resident_mib(which: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(which)) / 2**10


def peak(loss: str, way: str, size: Size) -> float:
    """`peak_in_this_process`, measured in a new process."""
    command = [sys.executable, __file__, "--peak-of", loss, way, "--threads", str(torch.get_num_threads())]
    command += ["--images", str(size.images), "--blocks", str(size.blocks), "--device", size.device]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def memory(loss: str, size: Size) -> dict[str, Any]:
    ours = peak(loss, "ours", size)
    direct = one = peak(loss, "direct", evolve(size, blocks=1))
    fits = one * size.blocks < 0.8 * available_mib(size.device)
    if size.blocks > 1 and fits:
        direct = peak(loss, "direct", size)
    elif size.blocks > 1:
        direct = one + (size.blocks - 1) * (peak(loss, "direct", evolve(size, blocks=2)) - one)
    gradients = size.blocks * sum(tensor.nbytes for tensor in operands(loss, 0, size)) / 2**20
    ours, direct = ours - gradients, direct - gradients
    return {
        "gradients_mib": round(gradients, 1),
        "ours_mib": round(ours, 1),
        "direct_mib": round(direct, 1),
        "direct_extrapolated_from_two_blocks": not fits,
        "ratio": round(ours / direct, 4),
    }


def available_mib(device: str) -> float:
    if device == "cuda":
        return torch.cuda.mem_get_info()[0] / 2**20
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**20


def duration(loss: str, size: Size, rounds: int) -> dict[str, Any]:
    """Seconds for all blocks in sequence, in the fastest round."""
    fastest = dict.fromkeys(LOSSES[loss], math.inf)
    for function in LOSSES[loss].values():
        work(function, [operands(loss, 0, evolve(size, images=1))])
    values: dict[str, float] = {}
    for _ in range(rounds):
        taken, values = dict.fromkeys(LOSSES[loss], 0.0), dict.fromkeys(LOSSES[loss], 0.0)
        for block in range(size.blocks):
            ready = [operands(loss, block, size)]
            for way, function in LOSSES[loss].items():
                start = time.perf_counter()
                values[way] += work(function, ready)
                taken[way] += time.perf_counter() - start
        fastest = {way: min(fastest[way], taken[way]) for way in fastest}
    return {
        **{f"{way}_s": round(seconds, 3) for way, seconds in fastest.items()},
        "ratio": round(fastest["ours"] / fastest["direct"], 4),
        "values": values,
        "relative_difference": abs(values["ours"] - values["direct"]) / abs(values["direct"]),
    }


def measure(loss: str, size: Size, rounds: int) -> dict[str, Any]:
    found = {"memory": memory(loss, size), "time": duration(loss, size, rounds)}
    reached = {
        "memory": found["memory"]["ratio"],
        "time": found["time"]["ratio"],
        "value": found["time"]["relative_difference"],
    }
    return {**found, "met": {what: reached[what] <= target for what, target in TARGETS[loss].items()}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=IMAGES)
    parser.add_argument("--blocks", type=int, default=BLOCKS)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--out", type=Path, help="write JSON here, for example benchmarks/results/losses.json")
    parser.add_argument("--peak-of", nargs=2, metavar=("LOSS", "WAY"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    size = Size(arguments.images, arguments.blocks, arguments.device)
    if arguments.peak_of:
        print(peak_in_this_process(*arguments.peak_of, size))
        return
    facts = about(arguments.device)
    shape = {"images": size.images, "tokens": TOKENS, "heads": HEADS, "head_dim": DIM, "blocks": size.blocks}
    print(json.dumps({**facts, **shape}, indent=1))
    result: dict[str, Any] = {"machine": facts, "size": shape, "targets": TARGETS}
    for loss in LOSSES:
        result[loss] = measure(loss, size, arguments.rounds)
        print(json.dumps({loss: result[loss]}, indent=1), flush=True)
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
