"""Running a bench: every cell of a plan is a run. Finished cells are kept; a failing cell does not stop the others."""

import json
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

from attrs import asdict, evolve, frozen

from spdfq.bench.log import EVERY, said_every
from spdfq.bench.page import write_page
from spdfq.bench.plan import Combination, Plan, read_plan
from spdfq.bench.priority import priority
from spdfq.bench.row_files import file_of, rows_in
from spdfq.bench.rows import Model, OldRowError, Row, row_of_run, write_rows
from spdfq.bench.table import markdown
from spdfq.bench.workers import Workers
from spdfq.errors import DataError, RecipeError, SpdfqError
from spdfq.recipe import ModelSpec, Recipe, digest, load_recipe
from spdfq.runs import pipeline
from spdfq.runs.finished import finished_record
from spdfq.runs.provenance import code_digests, data_fingerprints, versions
from spdfq.runs.store import lock_folder, store_beside
from spdfq.runtime import pick_device, pick_precision, silent
from spdfq.runtime.files import write_text
from spdfq.runtime.ranks import join
from spdfq.teacher.architectures import local_weights


@frozen
class Cell:
    """One run of a bench.

    Args:
        combination: one value of every axis.
        seed: of the run.
        recipe: with this seed.
        folder: of the run.
        key: hash of everything that the result depends on; see `result_key`.
    """

    combination: Combination
    seed: int
    recipe: Recipe
    folder: Path
    key: str


@frozen
class BenchResult:
    """The result of a bench.

    Args:
        folder: contains ``results.jsonl``, ``table.md``, ``report.html``, ``bench.json`` and the cells' run folders.
        plan: of the bench file.
        rows: one for each cell, as in ``results.jsonl``.
        reused: number of cells that were finished before.
        failed: number of cells that failed.
    """

    folder: Path
    plan: Plan
    rows: list[Row]
    reused: int
    failed: int


def run_bench(
    source: str,
    *,
    out: Path | None = None,
    device: str | None = None,
    jobs: int = 1,
    shard: tuple[int, int] | None = None,
    progress: Any = silent,
    announce: Callable[[str], None] = lambda line: None,
) -> BenchResult:
    """Run the cells of a bench that are not finished, and write its table.

    Args:
        source: path of a bench file.
        out: folder of the bench; by default ``runs/`` and the file's name.
        device: replaces the recipes' ``runtime.device``.
        jobs: number of processes, each with its share of the CPU threads. One that dies costs its own cell alone.
        shard: ``(i, n)`` runs every n-th cell, starting with the i-th one, and writes their rows to a file of their
            own; `spdfq.bench.merge.merge_bench` joins the files.
        progress: see `spdfq.runtime`; a `LogProgress` for a log without a terminal.
        announce: called with one line of text for the number of cells, each warning and each cell.

    Raises:
        RecipeError: the file or any cell's recipe has mistakes; all are reported before anything runs.
        SpdfqError: several processes were started, or another process is writing this bench.
        DataError: a model's checkpoint is missing, or the results.jsonl of an earlier call is damaged.
    """
    plan, folder, cells = planned(source, out=out, device=device, shard=shard, announce=announce)
    lock = lock_folder(folder if shard is None else folder / "shards" / f"{shard[0]}-of-{shard[1]}")
    try:
        kept = finished(cells, folder, announce)
        announce(f"{len(cells)} cells planned, {len(kept)} reused, {len(cells) - len(kept)} to run")
        rows: dict[str, Row] = dict(kept)
        number = 0
        for cell, row in _results(plan, cells, kept, folder, device, jobs, progress, announce):
            name, number = cell.folder.name, number + 1
            rows[name] = row
            announce(f"[{number}/{len(cells)}] {name}: {_outcome(row)}{' (reused)' if name in kept else ''}")
            done = [rows[other.folder.name] for other in cells if other.folder.name in rows]
            write_results(folder, plan, done, shard)
        announce(_stages([row for name, row in rows.items() if name not in kept]))
        if shard is None:
            write_page(folder, plan, [rows[cell.folder.name] for cell in cells])
    finally:
        lock.release()
    found = [rows[cell.folder.name] for cell in cells]
    return BenchResult(folder, plan, found, len(kept), sum(row.error is not None for row in found))


def planned(
    source: str,
    *,
    out: Path | None = None,
    device: str | None = None,
    shard: tuple[int, int] | None = None,
    announce: Callable[[str], None] = lambda line: None,
) -> tuple[Plan, Path, list[Cell]]:
    """The plan, the folder and the cells of a bench or of a shard, after all checks; see `run_bench`."""
    if join().count > 1:
        raise SpdfqError("a bench runs in one process; start it without torchrun, or use --jobs or --shard")
    plan = read_plan(source)
    for warning in check_plan(plan):
        announce(f"warning: {warning}")
    folder = out or Path("runs") / plan.name
    cells = [_cell(combination, seed, folder, device) for combination in plan.combinations for seed in plan.seeds]
    if any("controls" in combination.data for combination in plan.combinations):
        announce("warning: controls are not run in a bench; name their images under [parents] to get rows of their own")
    if shard is None:
        return plan, folder, cells
    # by priority, so that each shard has its part of the cells that come first
    return plan, folder, by_priority(plan, cells)[shard[0] - 1 :: shard[1]]


def by_priority(plan: Plan, cells: list[Cell]) -> list[Cell]:
    """The cells in the order in which they run."""
    return sorted(cells, key=lambda cell: priority(plan.first, cell.combination.values, cell.seed))


def _results(
    plan: Plan,
    cells: list[Cell],
    kept: dict[str, Row],
    folder: Path,
    device: str | None,
    jobs: int,
    progress: Any,
    announce: Callable[[str], None],
) -> Iterator[tuple[Cell, Row]]:
    """The cells with their rows: those that are kept, then the others in the order in which they finish."""
    for cell in cells:
        if cell.folder.name in kept:
            yield cell, kept[cell.folder.name]
    tasks = [Task(cell, folder, device) for cell in by_priority(plan, cells) if cell.folder.name not in kept]
    if jobs == 1:
        with said_every(EVERY, getattr(progress, "line", str), announce):
            for task in tasks:
                if begin := getattr(progress, "cell", None):
                    begin(task.cell.folder.name)
                yield task.cell, run_task(task, progress)
        return
    workers: Workers[Task, Row] = Workers(run_task, jobs, _lost)
    with said_every(EVERY, partial(_running, workers), announce):
        for task, row in workers.results(tasks):
            yield task.cell, row


def _running(workers: "Workers[Task, Row]") -> str:
    running = workers.stages().values()
    return "running: " + "; ".join(f"{task.cell.folder.name}, {stage or 'starting'}" for task, stage in running)


@frozen
class Task:
    """A cell to run, with what its process needs.

    Args:
        cell: the cell.
        folder: of the bench.
        device: as in `run_bench`.
    """

    cell: Cell
    folder: Path
    device: str | None


def run_task(task: Task, progress: Any) -> Row:
    """Run a cell; a function of the module, so that a process can import it."""
    return _run(task.cell, task.folder, task.device, progress)


def _lost(task: Task, why: str) -> Row:
    return _failed(task.cell, task.folder, why)


def check_plan(plan: Plan) -> list[str]:
    """Check every combination's recipe, and return the warnings, with those of the plan.

    Raises:
        RecipeError: with every problem once, and the cells that have it.
    """
    problems: dict[str, list[str]] = {}
    warnings: dict[str, None] = dict.fromkeys(plan.warnings)
    for combination in plan.combinations:
        try:
            recipe = evolve(load_recipe(combination.data, seed=plan.seeds[0]), controls={})
            warnings |= dict.fromkeys(pipeline.check(recipe))
        except SpdfqError as error:
            for problem in str(error).splitlines():
                problems.setdefault(problem, []).append(combination.slug)
    if problems:
        raise RecipeError([f"{_places(slugs, plan)}: {problem}" for problem, slugs in problems.items()])
    return list(warnings)


def _places(slugs: list[str], plan: Plan) -> str:
    if len(slugs) == len(plan.combinations):
        return "every cell"
    return slugs[0] if len(slugs) == 1 else f"{slugs[0]} and {len(slugs) - 1} more"


def _cell(combination: Combination, seed: int, folder: Path, device: str | None) -> Cell:
    recipe = evolve(load_recipe(combination.data, seed=seed), controls={})
    return Cell(combination, seed, recipe, folder / "cells" / f"{combination.slug}-s{seed}", result_key(recipe, device))


def result_key(recipe: Recipe, device: str | None = None) -> str:
    """A hash of everything that a result depends on: recipe, data, local weights, code, versions and precision.

    The device counts only as far as it decides the precision.
    """
    precision = pick_precision(recipe.runtime.precision, pick_device(device or recipe.runtime.device))
    data = {**recipe.to_dict(), "runtime": {"precision": precision}}
    data.pop("published", None)
    weights = [sha256(path.read_bytes()).hexdigest() for path in _files(recipe.model)]
    found = versions()
    return digest(data, data_fingerprints(recipe), weights, code_digests(recipe), found["torch"], found["timm"])


def _files(model: ModelSpec) -> list[Path]:
    """The files of local weights, and of the configuration beside them."""
    weights = local_weights(model)
    if weights is None:
        return []
    if not weights.is_file():
        raise DataError(f"model.{'checkpoint' if model.checkpoint else 'name'}: {weights}: no such file")
    return [weights, *weights.parent.glob("config.json")] if model.checkpoint is None else [weights]


def finished(cells: list[Cell], folder: Path, announce: Callable[[str], None]) -> dict[str, Row]:
    """Rows of an earlier call or of shards that are still valid, by the name of the cell's folder."""
    try:
        rows = {row.key: row for row in rows_in(folder) if row.error is None}
    except OldRowError:
        announce(f"warning: {folder}: has rows of an older version; their cells are measured again")
        return {}
    except DataError as error:
        raise DataError(f"{error}; or remove the file and run the bench again (finished stages are kept)") from None
    return {
        cell.folder.name: evolve(rows[cell.key], **_identity(cell, folder), seed=cell.seed)
        for cell in cells
        if cell.key in rows and (cell.folder / "run.json").exists()
    }


def _identity(cell: Cell, folder: Path) -> dict[str, Any]:
    return {
        "axes": cell.combination.values,
        "folder": cell.folder.relative_to(folder).as_posix(),
        "key": cell.key,
    }


def _run(cell: Cell, folder: Path, device: str | None, progress: Any) -> Row:
    identity = _identity(cell, folder)
    try:
        store = store_beside(folder).root
        pipeline.run(cell.recipe, out=cell.folder, store=store, device=device, progress=progress)
        return row_of_run(finished_record(cell.folder), **identity)
    except SpdfqError as error:
        said = "; ".join(str(error).splitlines())
    except Exception as error:
        cell.folder.mkdir(parents=True, exist_ok=True)
        write_text(cell.folder / "error.txt", traceback.format_exc())
        said = f"{type(error).__name__}: {error} (traceback in {identity['folder']}/error.txt)"
    return _failed(cell, folder, said)


def _failed(cell: Cell, folder: Path, why: str) -> Row:
    return Row(**_identity(cell, folder), seed=cell.seed, model=Model(name=cell.recipe.model.name), error=why)


def _outcome(row: Row) -> str:
    if row.error:
        return f"failed: {row.error}"
    metrics = row.measured
    return f"{metrics.measure} {metrics.fp.top1:.2f} -> {metrics.quantized.top1:.2f} in {row.seconds:.1f} s"


def _stages(rows: list[Row]) -> str:
    """A line on how many stages the cells of this call reused."""
    reused = [stage["reused"] for row in rows for stage in (row.stages or {}).values()]
    return f"{len(reused)} stages in the cells that ran: {sum(reused)} reused, {len(reused) - sum(reused)} run"


def write_results(folder: Path, plan: Plan, rows: list[Row], shard: tuple[int, int] | None = None) -> None:
    """Write the rows, and for a whole bench the table."""
    write_rows(folder / file_of(shard), rows)
    compared = {key: value and asdict(value) for key, value in (("gap", plan.gap), ("baseline", plan.baseline))}
    write_text(folder / "bench.json", json.dumps(compared, indent=1) + "\n")
    if shard is None:
        write_text(folder / "table.md", markdown(plan, rows))
