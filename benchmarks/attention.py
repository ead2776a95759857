"""Compare explicit attention products with the fused kernel, forward and backward, for several numbers of tokens.

The rule in `spdfq.attention.attend` (explicit products for few tokens on a CPU) follows from these numbers. The
two ways take turns, so that other work on the machine slows both. The ratio is that of their fastest repetitions.
"""

import argparse
import itertools
import json
import platform
import subprocess
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from spdfq.attention import explicit_attention

TOKENS, HEAD_DIMS, BATCH, WIDTH = (50, 65, 82, 101, 145, 197, 257), (32, 64), 32, 192
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def fused_attention(query, key, value, mask, scale):
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)


WAYS = {"explicit": explicit_attention, "fused": fused_attention}


def measure(dtype: str, tokens: int, head_dim: int, repetitions: int, device: str) -> dict:
    shape, kind = (BATCH, WIDTH // head_dim, tokens, head_dim), DTYPES[dtype]
    operands = [torch.randn(shape, device=device, dtype=kind, requires_grad=True) for _ in range(3)]
    gradient = torch.randn(shape, device=device, dtype=kind)
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    for _ in range(repetitions):
        for way, function in WAYS.items():
            seconds[way].append(timed(function, operands, gradient))
    fastest = {f"{way}_ms": round(1e3 * min(values), 3) for way, values in seconds.items()}
    ratio = round(fastest["fused_ms"] / fastest["explicit_ms"], 3)
    return {"dtype": dtype, "tokens": tokens, "head_dim": head_dim, **fastest, "fused_over_explicit": ratio}


def timed(function, operands, gradient) -> float:
    synchronise(gradient)
    start = time.perf_counter()
    output = function(*operands, None, operands[0].shape[-1] ** -0.5)
    torch.autograd.grad(output, operands, gradient)
    synchronise(gradient)
    return time.perf_counter() - start


def synchronise(tensor: torch.Tensor) -> None:
    if tensor.device.type != "cpu":
        torch.accelerator.synchronize(tensor.device)


def machine(device: str) -> dict:
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else processor(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": commit.stdout.strip() or None,
    }


def processor() -> str:
    listing = Path("/proc/cpuinfo")
    lines = listing.read_text().splitlines() if listing.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repetitions", type=int, default=30)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--dtypes", nargs="+", default=list(DTYPES), choices=DTYPES)
    parser.add_argument("--out", type=Path, help="write JSON here, for example benchmarks/results/attention.json")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    about = {**machine(arguments.device), "batch": BATCH, "width": WIDTH, "repetitions": arguments.repetitions}
    print(json.dumps(about))
    rows = []
    for case in itertools.product(arguments.dtypes, TOKENS, HEAD_DIMS):
        rows.append(measure(*case, arguments.repetitions, arguments.device))
        print(json.dumps(rows[-1]), flush=True)
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps({"machine": about, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
