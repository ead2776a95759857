"""What a run hands to its tracker."""

from pathlib import Path
from typing import Any

from spdfq.recipe import Recipe
from spdfq.synth import SyntheticImages
from spdfq.trackers import Tracked

_PICTURES = {"images": "synthetic.png", "attention": "attention.png"}


def tracked(folder: Path, recipe: Recipe, images: SyntheticImages, record: dict[str, Any]) -> Tracked:
    """A finished run as a tracker gets it.

    Args:
        folder: of the run.
        recipe: as it was run.
        images: its calibration images.
        record: the contents of its ``run.json``.
    """
    metrics = record["metrics"]
    values = {f"{side}/{name}": value for side in ("fp", "quantized") for name, value in metrics[side].items()}
    values["agreement"] = metrics["agreement"]
    values |= {f"controls/{each['name']}/top1": each["metrics"]["quantized"]["top1"] for each in record["controls"]}
    values |= {f"seconds/{name}": stage["seconds"] for name, stage in record["stages"].items()}
    values |= {f"size/{name}": size for name, size in record["size"].items()}
    means = images.curves.float().mean(0) if images.curves.numel() else images.curves
    return Tracked(
        name=record["name"],
        folder=folder,
        recipe=recipe.to_dict(),
        values={name: float(value) for name, value in values.items()},
        curves={name: means[:, index].tolist() for index, name in enumerate(images.columns)} if means.numel() else {},
        pictures={name: path for name, file in _PICTURES.items() if (path := folder / file).is_file()},
    )
