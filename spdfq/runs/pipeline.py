"""Run a recipe from end to end: teacher, images, quantized model, evaluation, controls, run folder."""

import html
import json
import shutil
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from attrs import asdict, define, field, frozen

from spdfq.errors import SpdfqError, first_line, shown, writing
from spdfq.evaluation.accuracy import accuracy, another_order, left_out
from spdfq.evaluation.evaluator import evaluator_for
from spdfq.evaluation.published import check_full_precision
from spdfq.quantized.checkpoint import CONFIG, TENSORS, load_checkpoint
from spdfq.quantized.place import place
from spdfq.recipe import Recipe, digest, load_recipe, to_toml
from spdfq.recipe.files import listed
from spdfq.report import write_pictures, write_report
from spdfq.report.diagnosis import DIAGNOSIS_FILE, FRAGMENT_FILE
from spdfq.report.explained import EXPLAINED_FILE
from spdfq.report.exports import EXPORTS_FILE
from spdfq.report.image_quality import MEASURES_FILE
from spdfq.report.images import CLASSES_FILE, REAL_FILE
from spdfq.report.page import PAGE
from spdfq.report.site_noise import NOISE_FILE
from spdfq.runs.checks import check_classes, check_fit, checked_teacher, placed, refuse_own_recipe
from spdfq.runs.explained import explained
from spdfq.runs.finished import check_teacher, finished_recipe, measured_on, run_record
from spdfq.runs.forecast import Forecast
from spdfq.runs.image_classes import show_real_images
from spdfq.runs.record import facts, now
from spdfq.runs.stages import (
    STAGES,
    EvaluateStage,
    ImagesStage,
    QuantizeStage,
    Stage,
    TeacherStage,
    Work,
    evaluation_key,
    stage_key,
)
from spdfq.runs.store import StageRecord, Store, lock_folder, store_beside
from spdfq.runs.tracking import tracked
from spdfq.runtime import Progress, make_runtime, own_threads, pick_progress
from spdfq.runtime.files import copy_file, write_text
from spdfq.runtime.peak_memory import peak_memory, restart_peak
from spdfq.runtime.ranks import join
from spdfq.synth import GaussianNoise, RealImages
from spdfq.teacher import load_teacher

Announce = Callable[[str], None]
_CONTROL_STAGES = tuple(stage for stage in STAGES if not isinstance(stage, TeacherStage))
# files of a run folder that are of the images and the model that were there before
_STALE = (MEASURES_FILE, EXPORTS_FILE, DIAGNOSIS_FILE, FRAGMENT_FILE, NOISE_FILE, CLASSES_FILE, REAL_FILE)


@frozen
class RunResult:
    """The result of a run. A notebook shows it as the run's report.

    Args:
        folder: the run folder.
        recipe: as it was run.
        metrics: ``fp`` and ``quantized`` top-1 and top-5 in percent, ``agreement`` with the teacher in percent, the
            number of ``images`` that could be read, and the ``damaged`` ones that could not, with reasons; for a model
            without a head k-NN top-1, and ``similarity``, the mean cosine of its features to the teacher's. ``correct``
            has one bit for each image and model, in Base64, and ``test_images`` is a hash of the images.
        controls: metrics of each control, by its name.
        stages: seconds, key, and whether it was reused, for each stage.
    """

    folder: Path
    recipe: Recipe
    metrics: dict[str, Any]
    controls: dict[str, dict[str, Any]]
    stages: dict[str, dict[str, Any]]

    def _repr_html_(self) -> str | None:
        """The report in a frame; ``None`` if it is gone, so that a notebook shows plain text."""
        try:
            page = (self.folder / PAGE).read_text(encoding="utf-8")
        except FileNotFoundError:
            return None
        title = html.escape(f"Report of {self.folder.name}")
        style = "width: 100%; height: 40rem; border: 0"
        return f'<iframe srcdoc="{html.escape(page)}" title="{title}" style="{style}"></iframe>'


@own_threads()
def run(
    source: Recipe | str | Path | dict[str, Any],
    *,
    overrides: Iterable[str] = (),
    seed: int | None = None,
    out: str | Path | None = None,
    device: str | None = None,
    fresh: bool = False,
    store: str | Path | None = None,
    progress: Progress | bool | None = None,
    announce: Announce = lambda line: None,
) -> RunResult:
    """Run a recipe; stages that are already in the store are reused.

    Args:
        source: a `Recipe`, the name of a shipped recipe, the path of a ``.toml`` file, or plain data.
        overrides: ``dotted.key=value`` pairs, the value as TOML.
        seed: replaces the recipe's own.
        out: the run folder; by default ``runs/`` and the recipe's name, or its folder's name for a ``recipe.toml``.
        device: replaces ``runtime.device``.
        fresh: do finished stages again.
        store: where finished stages are kept; by default ``.store`` beside the run folder, or ``SPDFQ_STORE``.
        progress: as in `spdfq.synthesize`. If it has a method ``stage``, as `spdfq.runtime.RichProgress` has, a run
            calls it at the start of each stage.
        announce: called with one line for each stage and each warning.

    Raises:
        SpdfqError: anything the user can fix; the message says where and how.
    """
    overrides, progress = listed(overrides), pick_progress(progress)
    _check_types(out, store, fresh, announce)
    recipe = load_recipe(source, overrides, seed)
    folder = Path(out) if out else _default_folder(source, recipe, bool(overrides or seed is not None))
    refuse_own_recipe(source, folder)
    teacher, warnings = checked_teacher(recipe)
    ranks = join()
    runtime = make_runtime(recipe.runtime, recipe.seed, device, progress, ranks, announce)
    kept = Store(Path(store), fresh, ranks) if store else store_beside(folder, fresh, ranks)
    new = not folder.exists()
    lock = lock_folder(folder) if ranks.leads else None
    try:
        teacher_print = teacher.fingerprint()
        teacher.module.to(runtime.device)
        work = Work(recipe, teacher, runtime, teacher_print)
        return _Run(work, folder, kept, announce if ranks.leads else _say_nothing).result(warnings)
    finally:
        if lock:
            with suppress(OSError):
                if new and [path.name for path in folder.iterdir()] == [Path(lock.lock_file).name]:
                    shutil.rmtree(folder)  # the run failed before it wrote anything
            lock.release()


def _check_types(out: Any, store: Any, fresh: Any, announce: Any) -> None:
    path = (str, Path, type(None))
    problems = [
        f"{key}: expected {wanted}, got {shown(value)}"
        for key, value, right, wanted in (
            ("out", out, isinstance(out, path), "the path of a folder"),
            ("store", store, isinstance(store, path), "the path of a folder"),
            ("fresh", fresh, isinstance(fresh, bool), "True or False"),
            ("announce", announce, callable(announce), "a function of one line"),
        )
        if not right
    ]
    if problems:
        raise SpdfqError("\n".join(problems))


def check(
    source: Recipe | str | Path | dict[str, Any], *, overrides: Iterable[str] = (), seed: int | None = None
) -> list[str]:
    """Check everything that can be checked without weights and data, and the classes if the data are there.

    Returns:
        The warnings.

    Raises:
        RecipeError: with all problems.
    """
    recipe = load_recipe(source, overrides, seed)
    return check_fit(recipe, load_teacher(recipe.model, weights=False))


def check_and_count(
    source: Recipe | str | Path | dict[str, Any], *, overrides: Iterable[str] = ()
) -> tuple[list[str], float]:
    """The warnings of `check`, and the share of the multiplications with an operand in float, in percent."""
    recipe = load_recipe(source, overrides)
    teacher = load_teacher(recipe.model, weights=False)
    return check_fit(recipe, teacher), place(teacher, recipe.quantization).float_share().percent


@own_threads()
def evaluate_run(
    folder: str | Path,
    on: str | Path | None = None,
    *,
    overrides: Iterable[str] = (),
    device: str | None = None,
    progress: Progress | bool | None = None,
    announce: Announce = lambda line: None,
) -> dict[str, Any]:
    """Measure the saved model of a run again, on the run's own evaluation section or a changed one.

    A call that was killed continues where it stopped.

    Args:
        folder: of a finished run.
        on: a folder with a subfolder of images for each class, instead of the run's own images.
        overrides: ``evaluation.key=value`` or ``runtime.key=value`` pairs; the model itself does not change.
        device: replaces ``runtime.device``.
        progress: as in `spdfq.synthesize`.
        announce: called with one line for each warning.

    Returns:
        The metrics, as in `RunResult`.

    Raises:
        SpdfqError: anything the user can fix; the message says where and how.
    """
    recipe = finished_recipe(folder, measured_on(on, overrides))
    spec, ranks = recipe.evaluation, join()
    model, _, _ = load_checkpoint(Path(folder) / "quantized")
    runtime = make_runtime(recipe.runtime, recipe.seed, device, pick_progress(progress), ranks)
    teacher = load_teacher(recipe.model)
    fingerprint = teacher.fingerprint()
    check_teacher(folder, run_record(folder), fingerprint)
    saved = (Path(folder) / "quantized" / "config.json").read_text(encoding="utf-8")
    evaluator = evaluator_for(teacher)
    key = stage_key(fingerprint, saved, evaluation_key(recipe), runtime.device.type)
    teacher.module.to(runtime.device)
    evaluator.check(spec, teacher)
    for line in check_classes(recipe, teacher) if ranks.leads else ():
        announce(f"warning: {line}")
    with store_beside(Path(folder), ranks=ranks).unfinished("again", key) as state:
        fp = evaluator.reference(teacher, spec, runtime, state / "fp")
        if ranks.leads and not teacher.headless and (doubt := another_order(fp.logits, fp.labels)):
            announce(f"warning: {doubt}")
        return evaluator.measure(model.to(runtime.device), teacher, spec, runtime, fp, state / "quantized")


def _say_nothing(_: str) -> None:
    """What processes other than the first announce."""


def _default_folder(source: Any, recipe: Recipe, changed: bool) -> Path:
    path = Path(str(source)) if isinstance(source, (str, Path)) else Path("recipe")
    name = path.resolve().parent.name if path.name == "recipe.toml" else path.stem  # as a run folder has it
    suffix = "" if not changed and isinstance(source, (str, Path)) else f"-{digest(recipe.to_dict())[:6]}"
    return Path("runs") / f"{name}{suffix}"


def _work_of(source: Any) -> int:
    """What a source has to do, in image iterations."""
    work: int = source.images * getattr(source, "iterations", 1)
    return work


@define
class _Run:
    """One run: its stages in order, then its controls, then its folder."""

    work: Work
    folder: Path
    store: Store
    announce: Announce
    started: str = field(factory=now, init=False)
    restarted: bool = field(init=False)  # whether the peak of memory is that of this run
    records: dict[str, StageRecord] = field(factory=dict, init=False)
    warnings: list[str] = field(factory=list, init=False)
    forecast: Forecast = field(init=False)

    def __attrs_post_init__(self) -> None:
        self.restarted = restart_peak(self.work.runtime.device)
        recipe = self.work.recipe
        controls = [f"{name}: {stage.name}" for name in recipe.controls for stage in _CONTROL_STAGES]
        quick = {name for name, source in recipe.controls.items() if isinstance(source, (GaussianNoise, RealImages))}
        alike = {
            name: _work_of(source) / _work_of(recipe.synthesis)
            for name, source in recipe.controls.items()
            if type(source) is type(recipe.synthesis)
        }
        self.forecast = Forecast([*(stage.name for stage in STAGES), *controls], frozenset(quick), alike)

    def result(self, warnings: list[str]) -> RunResult:
        work, recipe = self.work, self.work.recipe
        if run_record(self.folder).get("recipe_digest") not in (None, digest(recipe.to_dict())):
            self.announce(f"{self.folder}: the run of another recipe was here; this run replaces it")
        for line in warnings:
            self._warn(line)
        for stage in STAGES:
            self._finish(stage, work, stage.name)
            if isinstance(stage, TeacherStage):
                self._check_teacher()
            if isinstance(stage, ImagesStage) and work.results[stage.name].damaged:
                self._warn(f"synthesis.dataset: {left_out(work.results[stage.name].damaged)}")
        self._write_results()
        self._write_record({})  # before the controls, so that the run's own result is kept if one of them fails
        controls = {name: self._control(name, source) for name, source in recipe.controls.items()}
        if controls:
            self._write_record(controls)
        self._track()
        self.announce(f"report: {self.folder / PAGE}")
        measured = {name: control.results[EvaluateStage.name] for name, control in controls.items()}
        stages = {name: asdict(record) for name, record in self.records.items()}
        return RunResult(self.folder, recipe, work.results[EvaluateStage.name], measured, stages)

    def _finish(self, stage: Stage, work: Work, name: str) -> None:
        """Load the result of a stage from the store, or make it."""
        names = self.forecast.names
        if begin := getattr(work.runtime.progress, "stage", None):
            expected, later = self.forecast.expected(name), self.forecast.later(name)
            begin(names.index(name) + 1, len(names), name, expected, later)
        work.keys[stage.name] = key = stage.key(work)
        work.results[stage.name] = self.store.stage(
            stage.name, key, lambda folder: stage.make(work, folder), lambda folder: stage.load(work, folder)
        )
        self.records[name] = record = self.store.records[stage.name]
        if not record.reused:
            self.forecast.seconds[name] = record.seconds
        how = f"reused from the store ({key[:8]})" if record.reused else f"{record.seconds:.1f} s"
        self.announce(f"stage {names.index(name) + 1} of {len(names)}, {name}: {how}")

    def _control(self, name: str, source: Any) -> Work:
        """The same teacher, back-end and evaluation with other images.

        Raises:
            SpdfqError: what a stage raises, with the control's name.
        """
        work, key = self.work.control(source), f"controls.{name}"
        try:
            for stage in _CONTROL_STAGES:
                self._finish(stage, work, f"{name}: {stage.name}")
        except SpdfqError as error:
            raise SpdfqError("\n".join(placed(line, key) for line in str(error).splitlines())) from error
        if damaged := work.results[ImagesStage.name].damaged:
            self._warn(f"{key}.dataset: {left_out(damaged)}")
        return work

    def _track(self) -> None:
        """Hand the results to the recipe's tracker; if it fails, they are in the run folder all the same."""
        work, tracker = self.work, self.work.recipe.runtime.tracker
        if tracker is None or not work.runtime.ranks.leads:
            return
        try:
            images, record = work.results[ImagesStage.name], run_record(self.folder)
            tracker.track(tracked(self.folder, work.recipe, images, record))
        except Exception as error:  # whatever a service or its library raises
            self.announce(f"warning: runtime.tracker: {first_line(error)}; the results are in the run folder")

    def _check_teacher(self) -> None:
        """Announce the accuracy in full precision, and compare it with the published one."""
        work, fp = self.work, self.work.results[TeacherStage.name]
        by = "k-NN " if work.teacher.headless else ""
        self.announce(f"full precision: {by}top-1 {accuracy(fp.logits, fp.labels)['top1']:.2f} %")
        if fp.damaged:
            self._warn(f"evaluation.dataset: {left_out(fp.damaged)}")
        if work.teacher.headless and fp.bank_damaged:
            self._warn(f"evaluation.bank: {left_out(fp.bank_damaged)}")
        if line := check_full_precision(work.recipe, work.teacher, fp.logits, fp.labels):
            self.announce(line)
        if not work.teacher.headless and (line := another_order(fp.logits, fp.labels)):
            self._warn(line)

    def _warn(self, line: str) -> None:
        self.warnings.append(line)
        self.announce(f"warning: {line}")

    def _write_results(self) -> None:
        """Write the recipe, the images and the model into the run folder."""
        work, folder = self.work, self.folder
        if not work.runtime.ranks.leads:
            return
        images, stored = work.results[ImagesStage.name], work.results[QuantizeStage.name]
        write_text(folder / "recipe.toml", to_toml(work.recipe.to_dict()))
        images.save(folder / "synthetic.safetensors")
        with writing(folder, "make its files writable, or choose another --out"):
            write_pictures(folder, images, work.teacher)
            for stale in _STALE:
                (folder / stale).unlink(missing_ok=True)
            (folder / "quantized").mkdir(exist_ok=True)
            for name in (f"quantized/{TENSORS}", f"quantized/{CONFIG}", "sites.json", NOISE_FILE, CLASSES_FILE):
                if (stored / name).is_file():  # the last two are not in the store of an older version
                    copy_file(stored / name, folder / name)
            write_text(folder / EXPLAINED_FILE, json.dumps(explained(work.recipe), indent=1) + "\n")
            show_real_images(folder, work.teacher, work.recipe.evaluation, work.results[TeacherStage.name])

    def _write_record(self, controls: dict[str, Work]) -> None:
        """Write ``run.json`` and the report; other processes wait until they are there."""
        work, folder = self.work, self.folder
        if work.runtime.ranks.leads:
            peak = peak_memory(work.runtime.device) if self.restarted else None
            found = facts(work, folder, self.started, self.records, self.warnings, controls, peak)
            write_text(folder / "run.json", json.dumps(found, indent=1) + "\n")
            write_report(folder)
        work.runtime.ranks.wait()
