"""Measure the images of finished runs, one by one and side by side."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from attrs import define, field
from torch import Tensor

from spdfq.errors import DataError, SpdfqError, reading
from spdfq.evaluation.measures import Centroids, dataset_centroids, measure_images, prior_overlap
from spdfq.recipe import Recipe, digest
from spdfq.recipe.files import listed
from spdfq.report import check_sheet, write_report, write_sheet
from spdfq.report.image_quality import MEASURES_FILE
from spdfq.runs.finished import check_teacher, finished_recipe, finished_record
from spdfq.runs.provenance import data_fingerprints
from spdfq.runs.store import lock_folder
from spdfq.runtime import Progress, Runtime, make_runtime, own_threads, pick_progress
from spdfq.runtime.files import write_text
from spdfq.runtime.ranks import join
from spdfq.synth import SyntheticImages
from spdfq.teacher import Teacher, load_teacher


@own_threads()
def measure_runs(
    folders: Sequence[str | Path],
    *,
    overrides: Iterable[str] = (),
    device: str | None = None,
    sheet: str | Path | None = None,
    progress: Progress | bool | None = None,
) -> list[dict[str, Any]]:
    """Measure the calibration images of finished runs.

    Write ``measures.json`` into each run folder, and its report again.

    Args:
        folders: of finished runs.
        overrides: ``evaluation.key=value`` or ``runtime.key=value`` pairs, for example for other real images.
        device: replaces ``runtime.device``.
        sheet: a PNG file that shows the first images of each run in a row.
        progress: as in `spdfq.synthesize`.

    Returns:
        One table for each run, as written; see `spdfq.evaluation.measures.measure_images`.

    Raises:
        SpdfqError: anything the user can fix; the message says where and how.
    """
    overrides, progress = listed(overrides), pick_progress(progress)
    if sheet:
        check_sheet(Path(sheet))
    if join().count > 1:
        raise SpdfqError("images are measured in one process; start it without torchrun")
    runs = [_Run.found(Path(folder), overrides, device, progress) for folder in folders]
    teachers: dict[str, Teacher] = {}
    for run in runs:
        if (model := run.digest_of("model")) not in teachers:
            teachers[model] = load_teacher(run.recipe.model)
        check_teacher(run.folder, run.record, teachers[model].fingerprint())
    known: dict[str, Centroids | None] = {}
    rows, pictures = [], []
    for run in runs:
        teacher, key = teachers[run.digest_of("model")], run.digest_of("model", "evaluation")
        if key not in known:
            teacher.module.to(run.runtime.device)
            known[key] = dataset_centroids(teacher, run.recipe.evaluation, run.runtime)
        rows.append(run.measure(teacher, known[key]))
        pictures.append((run.folder.resolve().name, teacher.denormalise(run.images.images.float())))
        run.write(rows[-1])
    if sheet:
        write_sheet(Path(sheet), pictures)
    return rows


@define
class _Run:
    folder: Path
    recipe: Recipe
    record: dict[str, Any]
    images: SyntheticImages = field(repr=False)
    runtime: Runtime

    @classmethod
    def found(cls, folder: Path, overrides: tuple[str, ...], device: str | None, progress: Progress) -> "_Run":
        recipe = finished_recipe(folder, overrides)
        record = finished_record(folder, "measure a finished run")
        with reading(folder / "run.json"):
            record["images"]["type"], record["metrics"]["quantized"]["top1"]
        images = SyntheticImages.load(folder / "synthetic.safetensors")
        return cls(folder, recipe, record, images, make_runtime(recipe.runtime, recipe.seed, device, progress))

    def digest_of(self, *sections: str) -> str:
        """A hash of sections of the recipe; with the evaluation section, of its data too."""
        data = data_fingerprints(self.recipe.evaluation) if "evaluation" in sections else []
        return digest(*(self.recipe.to_dict()[section] for section in sections), *data)

    def measure(self, teacher: Teacher, centroids: Centroids | None) -> dict[str, Any]:
        found = measure_images(self.images.images, teacher, self.runtime, centroids, self.recipe.evaluation.batch)
        prior: Tensor = self.images.prior
        return {
            "name": self.folder.resolve().name,
            "source": self.record["images"]["type"],
            "quantized_top1": self.record["metrics"]["quantized"]["top1"],
            **found,
            "prior_overlap": prior_overlap(prior, self.images.reached) if prior.numel() else None,
        }

    def write(self, row: dict[str, Any]) -> None:
        lock = lock_folder(self.folder)
        try:
            write_text(self.folder / MEASURES_FILE, json.dumps(row, indent=1) + "\n")
            write_report(self.folder)
        except DataError:  # without a report there are no measures either
            (self.folder / MEASURES_FILE).unlink(missing_ok=True)
            raise
        finally:
            lock.release()
