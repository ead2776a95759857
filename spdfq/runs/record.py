"""What a run writes about itself: ``run.json``."""

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from attrs import asdict

from spdfq.data.classes import class_names
from spdfq.evaluation.published import compare
from spdfq.quantized.checkpoint import TENSORS
from spdfq.recipe import digest
from spdfq.recipe.structure import unstructure
from spdfq.runs.provenance import device_name, git_commit, versions
from spdfq.runs.stages import EvaluateStage, ImagesStage, QuantizeStage, Work, percent_in_float
from spdfq.runs.store import StageRecord
from spdfq.teacher.state import persistent_tensors


def now() -> str:
    """The time in UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def facts(
    work: Work,
    folder: Path,
    started: str,
    stages: dict[str, StageRecord],
    warnings: list[str],
    controls: dict[str, Work],
    peak_memory: int | None,
) -> dict[str, Any]:
    """The contents of ``run.json``.

    Args:
        work: finished.
        folder: the run folder.
        started: when the run started.
        stages: how each stage came about, by name.
        warnings: that were shown.
        controls: that have finished, by name.
        peak_memory: bytes; see `spdfq.runtime.peak_memory`.
    """
    recipe, teacher, runtime = work.recipe, work.teacher, work.runtime
    metrics = work.results[EvaluateStage.name]
    return {
        "name": folder.resolve().name,
        "started": started,
        "versions": versions(),
        "device": runtime.device.type,
        "device_name": device_name(runtime.device),
        "precision": runtime.precision,
        "threads": torch.get_num_threads(),
        "peak_memory": peak_memory,
        "git_commit": git_commit(),
        "seed": recipe.seed,
        "recipe_digest": digest(recipe.to_dict()),
        "model": {
            "name": teacher.name,
            "fingerprint": work.fingerprint,
            "parameters": teacher.parameters,
            "input_size": list(teacher.input_size),
            "num_classes": teacher.num_classes,
            "mean": list(teacher.mean),
            "std": list(teacher.std),
            "class_names": class_names(teacher, recipe.evaluation.dataset),
        },
        "size": {
            "float": sum(tensor.nbytes for tensor in persistent_tensors(teacher.module).values()),
            "quantized": (work.results[QuantizeStage.name] / "quantized" / TENSORS).stat().st_size,
        },
        "images": _images(work),
        "backend": _backend(work),
        "metrics": metrics,
        "controls": [
            {"name": name, **_images(control), "metrics": control.results[EvaluateStage.name]}
            for name, control in controls.items()
        ],
        "published": compare(recipe, metrics),
        "stages": {name: asdict(record) for name, record in stages.items()},
        "warnings": warnings,
    }


def _images(work: Work) -> dict[str, Any]:
    source, images = unstructure(work.recipe.synthesis, "source")["type"], work.results[ImagesStage.name]
    return {
        "type": source,
        "count": len(images.images),
        "damaged": list(images.damaged),
        "digest": digest(unstructure(work.recipe.synthesis, "source")),
    }


def _backend(work: Work) -> dict[str, Any]:
    spec = unstructure(work.recipe.quantization)
    return {
        "label": work.recipe.quantization.label,
        "digest": digest(spec),
        "percent_in_float": percent_in_float(work.results[QuantizeStage.name] / "sites.json"),
        "placement": spec["placement"]["type"],
        "steps": [step["type"] for step in spec["steps"]],
    }
