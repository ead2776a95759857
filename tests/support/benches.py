"""A bench file and its parents, and result rows."""

import torch

from spdfq.bench.rows import checked_row
from spdfq.evaluation.correctness import packed
from support.recipes import NO_IMAGES

NOISE = '[synthesis]\ntype = "gaussian_noise"\nimages = 4\n'
OPTIMIZED = """
[synthesis]
type = "optimize"
images = 4
iterations = 2
[synthesis.losses.cross_entropy]
"""
BENCH = """
schema = 1
seeds = [0, 1, 2]
[base]
extends = ["base.toml"]
[parents]
images = ["images/noise.toml", "images/optimized.toml"]
[keys]
"quantization.weights.bits" = [3, 4]
"""


def bench_files(folder):
    """Write a bench's parents into a folder, and give what writes a bench file beside them and gives its path."""
    (folder / "images").mkdir()
    (folder / "base.toml").write_text(NO_IMAGES)
    (folder / "images/noise.toml").write_text(NOISE)
    (folder / "images/optimized.toml").write_text(OPTIMIZED)

    def write(text=BENCH, name="bits.toml"):
        (folder / name).write_text(text)
        return str(folder / name)

    return write


def run_record(recipe, top1, seconds=(1.5, 2.5), machine="a processor"):
    """The ``run.json`` of a run, with the seconds of its images and of its quantization."""
    accuracies = {"fp": {"top1": 99.0}, "quantized": {"top1": top1}, "agreement": 75.0}
    stages = zip(("images", "quantize"), seconds, ("a", "b"), strict=True)
    return {
        "metrics": {"images": 50, **accuracies, "simulated": True},
        "stages": {name: {"seconds": each, "reused": False, "key": key} for name, each, key in stages},
        "seed": recipe.seed,
        "recipe_digest": "r",
        "model": {"name": recipe.model.name, "fingerprint": "f"},
        "images": {"type": "optimize", "count": 4, "damaged": [], "digest": "i"},
        "backend": {"label": "W4A4", "placement": "matmul_inputs", "steps": ["calibrate"], "digest": "b"},
        "peak_memory": 1000,
        "threads": 1,
        "device": "cpu",
        "device_name": machine,
        "precision": "float32",
        "versions": {"torch": "2"},
        "git_commit": None,
    }


def bench_row(axes, seed, top1, hits=None, **metrics):
    """A result row; with ``hits``, bool ``[n]``, its accuracy is theirs."""
    slug = "-".join(map(str, axes.values()))
    if hits is not None:
        logits = torch.zeros(len(hits), 2, device="cpu")
        logits[:, 1] = torch.from_numpy(hits).float()
        bits = packed(logits, torch.ones(len(hits), dtype=torch.int64, device="cpu"))
        top1 = 100 * float(hits.mean())
        metrics = {"images": len(hits), "test_images": "t", "correct": {"quantized": bits}, **metrics}
    accuracies = {"fp": {"top1": 90.0}, "quantized": {"top1": top1}, "agreement": 70.0}
    data = {
        "axes": axes,
        "seed": seed,
        "folder": f"cells/{slug}-s{seed}",
        "metrics": {"images": 50, **accuracies, "simulated": True, **metrics},
        "seconds": 1.0,
        "model": {"name": "bundled:vit_fmnist", "fingerprint": "m"},
        "backend": {"placement": "matmul_inputs"},
        **{"device": "cpu", "device_name": "a processor", "precision": "float32"},
    }
    return checked_row(data, "row")
