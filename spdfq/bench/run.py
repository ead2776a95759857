"""Running a bench: every cell of a plan is a run. Finished cells are kept; a failing cell does not stop the others."""

import json
import traceback
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

from attrs import asdict, evolve, frozen

from spdfq.bench.plan import Combination, Plan, read_plan
from spdfq.bench.rows import Model, OldRowError, Row, read_rows, row_of_run, write_rows
from spdfq.bench.table import markdown
from spdfq.errors import DataError, RecipeError, SpdfqError
from spdfq.recipe import ModelSpec, Recipe, digest, load_recipe
from spdfq.runs import pipeline
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
        folder: contains ``results.jsonl``, ``table.md``, ``bench.json`` and the cells' run folders.
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
    progress: Any = silent,
    announce: Callable[[str], None] = lambda line: None,
) -> BenchResult:
    """Run the cells of a bench that are not finished, and write its table.

    Args:
        source: path of a bench file.
        out: folder of the bench; by default ``runs/`` and the file's name.
        device: replaces the recipes' ``runtime.device``.
        progress: see `spdfq.runtime`.
        announce: called with one line of text for the number of cells, each warning and each cell.

    Raises:
        RecipeError: the file or any cell's recipe has mistakes; all are reported before anything runs.
        SpdfqError: several processes were started, or another process is writing this bench.
        DataError: a model's checkpoint is missing, or the results.jsonl of an earlier call is damaged.
    """
    if join().count > 1:
        raise SpdfqError("a bench runs in one process; start it without torchrun")
    plan = read_plan(source)
    for warning in check_plan(plan):
        announce(f"warning: {warning}")
    folder = out or Path("runs") / plan.name
    cells = [_cell(combination, seed, folder, device) for combination in plan.combinations for seed in plan.seeds]
    if any("controls" in combination.data for combination in plan.combinations):
        announce("warning: controls are not run in a bench; name their images under [parents] to get rows of their own")
    lock = lock_folder(folder)
    try:
        kept = _finished(cells, folder, announce)
        announce(f"{len(cells)} cells planned, {len(kept)} reused, {len(cells) - len(kept)} to run")
        rows: dict[str, Row] = dict(kept)
        for number, cell in enumerate(cells, 1):
            name, reused = cell.folder.name, cell.folder.name in kept
            if not reused:
                rows[name] = _run(cell, folder, device, progress)
            announce(f"[{number}/{len(cells)}] {name}: {_outcome(rows[name])}{' (reused)' if reused else ''}")
            _write(folder, plan, [rows[other.folder.name] for other in cells if other.folder.name in rows])
        announce(_stages([row for name, row in rows.items() if name not in kept]))
    finally:
        lock.release()
    found = [rows[cell.folder.name] for cell in cells]
    return BenchResult(folder, plan, found, len(kept), sum(row.error is not None for row in found))


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


def _finished(cells: list[Cell], folder: Path, announce: Callable[[str], None]) -> dict[str, Row]:
    """Rows of an earlier call that are still valid, by the name of the cell's folder."""
    path = folder / "results.jsonl"
    try:
        rows = {row.key: row for row in (read_rows(path) if path.exists() else ()) if row.error is None}
    except OldRowError:
        announce(f"warning: {path}: has rows of an older version; their cells are measured again")
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
        return row_of_run(json.loads((cell.folder / "run.json").read_text(encoding="utf-8")), **identity)
    except SpdfqError as error:
        said = "; ".join(str(error).splitlines())
    except Exception as error:
        cell.folder.mkdir(parents=True, exist_ok=True)
        write_text(cell.folder / "error.txt", traceback.format_exc())
        said = f"{type(error).__name__}: {error} (traceback in {identity['folder']}/error.txt)"
    return Row(**identity, seed=cell.seed, model=Model(name=cell.recipe.model.name), error=said)


def _outcome(row: Row) -> str:
    if row.error:
        return f"failed: {row.error}"
    metrics = row.measured
    return f"{metrics.measure} {metrics.fp.top1:.2f} -> {metrics.quantized.top1:.2f} in {row.seconds:.1f} s"


def _stages(rows: list[Row]) -> str:
    """A line on how many stages the cells of this call reused."""
    reused = [stage["reused"] for row in rows for stage in (row.stages or {}).values()]
    return f"{len(reused)} stages in the cells that ran: {sum(reused)} reused, {len(reused) - sum(reused)} run"


def _write(folder: Path, plan: Plan, rows: list[Row]) -> None:
    write_rows(folder / "results.jsonl", rows)
    compared = {key: value and asdict(value) for key, value in (("gap", plan.gap), ("baseline", plan.baseline))}
    write_text(folder / "bench.json", json.dumps(compared, indent=1) + "\n")
    write_text(folder / "table.md", markdown(plan, rows))
