"""A recipe from end to end: teacher, images, quantized model, evaluation, run folder; only here is their order."""

import json
import shutil
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from attrs import asdict, define, evolve, field, frozen
from torch import Tensor

from spdfq.api import make_images
from spdfq.backends import quantize
from spdfq.backends.learning.student import student_section
from spdfq.evaluation.accuracy import accuracy, left_out
from spdfq.evaluation.evaluator import Evaluator, evaluator_for
from spdfq.evaluation.published import check_full_precision, compare
from spdfq.quantized.checkpoint import load_checkpoint, save_quantized, verified
from spdfq.recipe import Evaluation, Recipe, digest, load_recipe, to_toml
from spdfq.recipe.structure import unstructure
from spdfq.report import write_pictures, write_report
from spdfq.report.image_quality import MEASURES_FILE
from spdfq.runs.checks import check_fit, checked_teacher, spare
from spdfq.runs.finished import check_teacher, finished_recipe, run_record
from spdfq.runs.provenance import data_fingerprints, device_name, git_commit, source_digest, versions
from spdfq.runs.store import STATE, StageRecord, Store, lock_folder, store_beside
from spdfq.runtime import Advance, Runtime, make_runtime, own_threads, silent
from spdfq.runtime.files import write_text
from spdfq.runtime.ranks import join
from spdfq.synth import SyntheticImages
from spdfq.teacher import Teacher, load_teacher

Announce = Callable[[str], None]
Progress = Callable[[str, int], AbstractContextManager[Advance]]


_NO_PART_IN_THE_MODEL = ("evaluation", "runtime", "published")


@frozen
class RunResult:
    """What a run left behind.

    Args:
        folder: the run folder.
        recipe: as it was run.
        metrics: ``fp`` and ``quantized`` top-1 and top-5 in percent, ``agreement`` with the teacher in percent, the
            number of ``images`` that could be read, and the names of the ``damaged`` ones that could not; for a model
            without a head k-NN top-1, and ``similarity``, the mean cosine of its features to the teacher's.
        stages: seconds, key, and whether it was reused, for each stage.
    """

    folder: Path
    recipe: Recipe
    metrics: dict[str, Any]
    stages: dict[str, dict[str, Any]]


@own_threads()
def run(
    source: Recipe | str | Path | dict[str, Any],
    *,
    overrides: Iterable[str] = (),
    seed: int | None = None,
    out: str | Path | None = None,
    device: str | None = None,
    fresh: bool = False,
    store: Path | None = None,
    progress: Progress = silent,
    announce: Announce = lambda line: None,
) -> RunResult:
    """Run a recipe; stages that are already in the store are reused.

    Args:
        source: a `Recipe`, the name of a shipped recipe, the path of a ``.toml`` file, or plain data.
        overrides: ``dotted.key=value`` pairs, the value as TOML.
        seed: replaces the recipe's own.
        out: the run folder; by default ``runs/`` and the recipe's name, or its folder's where it is a ``recipe.toml``.
        device: replaces ``runtime.device``.
        fresh: do finished stages anew.
        store: where finished stages are kept; by default ``.store`` beside the run folder, or ``SPDFQ_STORE``.
        progress: see `spdfq.runtime`.
        announce: is handed one line for each stage and warning.

    Raises:
        SpdfqError: anything the user can mend; the message says where and how.
    """
    overrides = tuple(overrides)
    recipe = load_recipe(source, overrides, seed)
    folder = Path(out) if out else _default_folder(source, recipe, bool(overrides or seed is not None))
    spare(source, folder)
    teacher, told = checked_teacher(recipe)
    ranks = join()
    runtime = make_runtime(recipe.runtime, recipe.seed, device, progress, ranks)
    kept = Store(store, fresh, ranks) if store else store_beside(folder, fresh, ranks)
    new = not folder.exists()
    lock = lock_folder(folder) if ranks.leads else None
    try:
        return _Run(recipe, folder, teacher, runtime, kept, announce if ranks.leads else _unheard).result(told)
    finally:
        if lock:
            with suppress(OSError):
                if new and [path.name for path in folder.iterdir()] == [Path(lock.lock_file).name]:
                    shutil.rmtree(folder)  # nothing came of it
            lock.release()


def check(
    source: Recipe | str | Path | dict[str, Any], *, overrides: Iterable[str] = (), seed: int | None = None
) -> list[str]:
    """Everything that can be checked without weights and data: warnings are returned, problems raised all at once."""
    recipe = load_recipe(source, overrides, seed)
    return check_fit(recipe, load_teacher(recipe.model, weights=False))


@own_threads()
def evaluate_run(
    folder: str | Path, *, overrides: Iterable[str] = (), device: str | None = None, progress: Progress = silent
) -> dict[str, Any]:
    """Measure the saved model of a run again, on the run's own evaluation section or an overridden one.

    What a killed call had finished is taken up again.

    Args:
        folder: of a finished run.
        overrides: ``evaluation.key=value`` (or ``runtime.``) pairs; the model itself is what it is.
        device: replaces ``runtime.device``.
        progress: see `spdfq.runtime`.

    Returns:
        The metrics, as in `RunResult`.

    Raises:
        SpdfqError: anything the user can mend; the message says where and how.
    """
    recipe = finished_recipe(folder, overrides)
    spec, ranks = recipe.evaluation, join()
    model, _, _ = load_checkpoint(Path(folder) / "quantized")
    runtime = make_runtime(recipe.runtime, recipe.seed, device, progress, ranks)
    teacher = load_teacher(recipe.model)
    fingerprint = teacher.fingerprint()
    check_teacher(folder, run_record(folder), fingerprint)
    saved = (Path(folder) / "quantized" / "config.json").read_text(encoding="utf-8")
    evaluator = evaluator_for(teacher)
    key = _key(fingerprint, saved, _evaluation_key(spec, evaluator), runtime.device.type)
    teacher.module.to(runtime.device)
    evaluator.check(spec, teacher)
    with store_beside(Path(folder), ranks=ranks).unfinished("again", key) as state:
        fp = evaluator.reference(teacher, spec, runtime, state / "fp")
        return evaluator.measure(model.to(runtime.device), teacher, spec, runtime, fp, state / "quantized")


def _unheard(_: str) -> None:
    """What ranks other than the first announce."""


def _default_folder(source: Any, recipe: Recipe, changed: bool) -> Path:
    path = Path(str(source)) if isinstance(source, (str, Path)) else Path("recipe")
    name = path.resolve().parent.name if path.name == "recipe.toml" else path.stem  # as a run folder has it
    suffix = "" if not changed and isinstance(source, (str, Path)) else f"-{digest(recipe.to_dict())[:6]}"
    return Path("runs") / f"{name}{suffix}"


def _evaluation_key(spec: Evaluation, evaluator: Evaluator) -> str:
    read = {name: getattr(spec, name) for name in ("dataset", "bank")}
    # more workers decode faster, and change nothing
    spec = evolve(spec, **{name: evolve(one, workers=0) for name, one in read.items() if hasattr(one, "workers")})
    return digest(unstructure(spec), data_fingerprints(spec), source_digest(spec, type(evaluator).__module__))


def _key(fingerprint: str, *parts: Any) -> str:
    return digest(fingerprint, versions()["torch"], versions()["timm"], *parts)


@define
class _Run:
    recipe: Recipe
    folder: Path
    teacher: Teacher
    runtime: Runtime
    store: Store
    announce: Announce
    started: str = field(factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"), init=False)
    fingerprint: str = field(default="", init=False)
    warnings: list[str] = field(factory=list, init=False)

    def result(self, told: list[str]) -> RunResult:
        if run_record(self.folder).get("recipe_digest") not in (None, digest(self.recipe.to_dict())):
            self.announce(f"{self.folder}: held the run of another recipe, which this one replaces")
        for line in told:
            self._warn(line)
        self.fingerprint = self.teacher.fingerprint()
        self.teacher.module.to(self.runtime.device)
        fp = self._stage("teacher", self._teacher_key(), self._make_reference, self._load_reference)
        by = "k-NN " if self.teacher.headless else ""
        self.announce(f"full precision: {by}top-1 {accuracy(fp.logits, fp.labels)['top1']:.2f} %")
        if fp.damaged:
            self._warn(f"evaluation.dataset: {left_out(fp.damaged)}")
        if checked := check_full_precision(self.recipe, self.teacher, fp.logits, fp.labels):
            self.announce(checked)
        images_key = self._images_key()
        images = self._stage("images", images_key, self._make_images, _load_images)
        if images.damaged:
            self._warn(f"synthesis.dataset: {left_out(images.damaged)}")
        quantized_key = self._quantized_key(images_key)
        stored = self._stage("quantize", quantized_key, self._make_quantized(images.images), _checkpoint_folder)
        metrics = self._stage(
            "evaluate", self._evaluate_key(quantized_key), self._make_metrics(stored, fp), _load_metrics
        )
        if self.runtime.ranks.leads:
            self._write(images, stored, metrics)
        self.runtime.ranks.wait()
        stages = {name: asdict(record) for name, record in self.store.records.items()}
        return RunResult(self.folder, self.recipe, metrics, stages)

    def _stage(self, name: str, key: str, make: Callable[[Path], object], load: Callable[[Path], Any]) -> Any:
        result = self.store.stage(name, key, make, load)
        record: StageRecord = self.store.records[name]
        how = f"reused from the store ({key[:8]})" if record.reused else f"{record.seconds:.1f} s"
        self.announce(f"{name}: {how}")
        return result

    def _warn(self, line: str) -> None:
        self.warnings.append(line)
        self.announce(f"warning: {line}")

    def _teacher_key(self) -> str:
        return self._key(_evaluation_key(self.recipe.evaluation, evaluator_for(self.teacher)))

    def _images_key(self) -> str:
        spec = self.recipe.synthesis
        data, precision = data_fingerprints(spec), self.runtime.precision
        parts = (unstructure(spec, "source"), data, self.recipe.seed, precision, source_digest(spec))
        return self._key(*parts, *self._student_parts())

    def _student_parts(self) -> tuple[Any, ...]:
        """What images depend on that a quantized student helped to make."""
        if not self.recipe.synthesis.needs_student:
            return ()
        spec = student_section(self.recipe.quantization)
        return unstructure(spec), source_digest(spec, "spdfq.backends.learning.student")

    def _quantized_key(self, images: str) -> str:
        spec, precision = self.recipe.quantization, self.runtime.precision
        source = source_digest(spec, "spdfq.backends.quantize", "spdfq.quantized.checkpoint")
        return self._key(unstructure(spec), images, self.recipe.seed, precision, source)

    def _evaluate_key(self, quantized: str) -> str:
        return self._key(quantized, self._teacher_key())

    def _key(self, *parts: Any) -> str:
        return _key(self.fingerprint, *parts)

    def _make_reference(self, folder: Path) -> None:
        evaluator, spec = evaluator_for(self.teacher), self.recipe.evaluation
        found = evaluator.reference(self.teacher, spec, self.runtime, folder / STATE)
        if self.runtime.ranks.leads:
            found.save(folder / "reference.safetensors")

    def _make_images(self, folder: Path) -> None:
        images = make_images(self.recipe, self.teacher, self.runtime, folder / STATE)
        if self.runtime.ranks.leads:
            images.save(folder / "synthetic.safetensors")

    def _make_quantized(self, images: Tensor) -> Callable[[Path], None]:
        def make(folder: Path) -> None:
            if not self.runtime.ranks.leads:
                return
            model = quantize(self.teacher, images, self.recipe.quantization, self.runtime, folder / STATE)
            save_quantized(model, folder / "quantized", self.teacher, self._parts())
            write_text(folder / "sites.json", json.dumps(model.site_table(), indent=1) + "\n")

        return make

    def _parts(self) -> dict[str, Any]:
        """What of the recipe made the model."""
        return {key: value for key, value in self.recipe.to_dict().items() if key not in _NO_PART_IN_THE_MODEL}

    def _load_reference(self, folder: Path) -> Any:
        return evaluator_for(self.teacher).load_reference(folder / "reference.safetensors")

    def _make_metrics(self, stored: Path, fp: Any) -> Callable[[Path], None]:
        def make(folder: Path) -> None:
            model = load_checkpoint(stored / "quantized", self._blank())[0].to(self.runtime.device)
            evaluator, spec = evaluator_for(self.teacher), self.recipe.evaluation
            metrics = evaluator.measure(model, self.teacher, spec, self.runtime, fp, folder / STATE)
            if self.runtime.ranks.leads:
                write_text(folder / "metrics.json", json.dumps(metrics, indent=1) + "\n")

        return make

    def _blank(self) -> torch.nn.Module:
        return load_teacher(self.recipe.model, weights=False).module

    def _write(self, images: SyntheticImages, stored: Path, metrics: dict[str, Any]) -> None:
        folder = self.folder
        write_text(folder / "recipe.toml", to_toml(self.recipe.to_dict()))
        images.save(folder / "synthetic.safetensors")
        write_pictures(folder, images, self.teacher)
        (folder / MEASURES_FILE).unlink(missing_ok=True)  # of the images that were here before
        shutil.copytree(stored / "quantized", folder / "quantized", dirs_exist_ok=True)
        shutil.copy(stored / "sites.json", folder / "sites.json")
        write_text(folder / "run.json", json.dumps(self._facts(images, metrics), indent=1) + "\n")
        write_report(folder)
        self.announce(f"report: {folder / 'report.html'}")

    def _facts(self, images: SyntheticImages, metrics: dict[str, Any]) -> dict[str, Any]:
        recipe, teacher, runtime = self.recipe, self.teacher, self.runtime
        return {
            "name": self.folder.resolve().name,
            "started": self.started,
            "versions": versions(),
            "device": runtime.device.type,
            "device_name": device_name(runtime.device),
            "precision": runtime.precision,
            "threads": torch.get_num_threads(),
            "git_commit": git_commit(),
            "seed": recipe.seed,
            "recipe_digest": digest(recipe.to_dict()),
            "model": {
                "name": teacher.name,
                "fingerprint": self.fingerprint,
                "parameters": teacher.parameters,
                "input_size": list(teacher.input_size),
                "num_classes": teacher.num_classes,
                "mean": list(teacher.mean),
                "std": list(teacher.std),
            },
            "images": {
                "type": unstructure(recipe.synthesis, "source")["type"],
                "count": len(images.images),
                "damaged": list(images.damaged),
            },
            "backend": _backend(recipe),
            "metrics": metrics,
            "published": compare(recipe, metrics),
            "stages": {name: asdict(record) for name, record in self.store.records.items()},
            "warnings": self.warnings,
        }


def _backend(recipe: Recipe) -> dict[str, Any]:
    spec = unstructure(recipe.quantization)
    return {
        "label": recipe.quantization.label,
        "placement": spec["placement"]["type"],
        "steps": [step["type"] for step in spec["steps"]],
    }


def _load_images(folder: Path) -> SyntheticImages:
    return SyntheticImages.load(folder / "synthetic.safetensors")


def _load_metrics(folder: Path) -> dict[str, Any]:
    metrics: dict[str, Any] = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    return metrics


def _checkpoint_folder(folder: Path) -> Path:
    verified(folder / "quantized")
    return folder
