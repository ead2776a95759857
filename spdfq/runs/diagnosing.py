"""Diagnose the quantized model of a finished run."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from spdfq.doctor.diagnosis import BATCH, Diagnosis, diagnosed, heldout_images, planned_passes
from spdfq.errors import DataError, SpdfqError, shown
from spdfq.quantized.checkpoint import load_checkpoint
from spdfq.report import write_report
from spdfq.report.diagnosis import DIAGNOSIS_FILE, FRAGMENT_FILE
from spdfq.runs.checks import check_classes
from spdfq.runs.finished import check_teacher, finished_recipe, finished_record
from spdfq.runs.store import lock_folder
from spdfq.runtime import Progress, make_runtime, own_threads, pick_progress
from spdfq.runtime.files import write_text
from spdfq.runtime.ranks import join
from spdfq.synth import SyntheticImages
from spdfq.teacher import load_teacher


@own_threads()
def diagnose_run(
    folder: str | Path,
    *,
    images: int = 32,
    heldout: int = 256,
    overrides: Iterable[str] = (),
    device: str | None = None,
    progress: Progress | bool | None = None,
    announce: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Find what costs the quantized model of a finished run its accuracy, and suggest more bits for some sites.

    Write ``diagnosis.json`` and, with a suggestion, ``suggestion.toml`` into the run folder, and its report again.

    Args:
        folder: of the run.
        images: how many of the run's calibration images to use.
        heldout: how many of its evaluation images to use, evenly spaced.
        overrides: ``evaluation.key=value`` or ``runtime.key=value`` pairs, for example for other held-out images.
        device: replaces ``runtime.device``.
        progress: as in `spdfq.synthesize`.
        announce: called with one line about the cost before it is spent.

    Returns:
        The fields of `spdfq.doctor.Diagnosis` as plain data, and ``seconds``, ``folder`` and ``file``: the path of the
        fragment, ``None`` without a suggestion.

    Raises:
        SpdfqError: anything the user can fix; the message says where and how.
    """
    for key, count in (("images", images), ("heldout", heldout)):
        if not isinstance(count, int) or count < 1:
            raise SpdfqError(f"{key}: expected a number of images of at least 1, got {shown(count)}")
    if join().count > 1:
        raise SpdfqError("a run is diagnosed in one process; start it without torchrun")
    recipe, folder = finished_recipe(folder, overrides), Path(folder)
    record = finished_record(folder)
    model = load_checkpoint(folder / "quantized")[0]
    runtime = make_runtime(recipe.runtime, recipe.seed, device, pick_progress(progress))
    teacher = load_teacher(recipe.model)
    check_teacher(folder, record, teacher.fingerprint())
    check_classes(recipe, teacher)
    used = SyntheticImages.load(folder / "synthetic.safetensors").images[:images]
    others = heldout_images(recipe.evaluation.dataset, teacher, heldout, min(BATCH, recipe.evaluation.batch))
    teacher.module.to(runtime.device)
    sites, passes = len(model.quantizers), planned_passes(len(model.quantizers), len(used), len(others[0]))
    announce(f"{sites} sites, {len(used)} calibration and {len(others[0])} held-out images: {passes:,} forward passes")
    lock = lock_folder(folder)
    try:
        found = diagnosed(model.to(runtime.device), teacher, used.float(), recipe.quantization, runtime, others)
        return _written(folder, found)
    finally:
        lock.release()


def _written(folder: Path, found: Diagnosis) -> dict[str, Any]:
    """The diagnosis as plain data, after its files were written."""
    fragment = folder / FRAGMENT_FILE
    data = found.to_dict()
    data = json.loads(json.dumps(data))
    fragment.unlink(missing_ok=True)
    write_text(folder / DIAGNOSIS_FILE, json.dumps(data, indent=1) + "\n")
    try:
        write_report(folder)
    except DataError:  # without a report there is no diagnosis either
        (folder / DIAGNOSIS_FILE).unlink(missing_ok=True)
        raise
    if found.suggestion:
        extends = f'extends = ["{folder / "recipe.toml"}", "{fragment}"]'
        write_text(fragment, f"# Suggested by spdfq doctor. A recipe with it: {extends}\n{found.suggestion.fragment}")
    return {"folder": str(folder), "file": str(fragment) if found.suggestion else None, **data}
