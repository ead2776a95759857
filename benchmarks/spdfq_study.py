"""A screening study of the constants that SPDFQ (arXiv 2412.16553) leaves open, at reduced length.

    python benchmarks/spdfq_study.py write      # the cells and bench files in benchmarks/spdfq_study
    spdfq bench benchmarks/spdfq_study/screen_vit_fmnist.toml
    python benchmarks/spdfq_study.py effects runs/screen_vit_fmnist/results.jsonl     # of every level
    python benchmarks/spdfq_study.py readings runs/screen_vit_fmnist/results.jsonl    # the best ones, as recipe parts
    spdfq bench benchmarks/spdfq_study/confirm_vit_fmnist.toml     # the best ones with new seeds and test images

All factors change at once: in 48 cells, each level of a factor comes up equally often. Of 2,000 such designs, drawn at
random, the one with the largest determinant of its information matrix is used. A main effect is the change of the
response from the present level of a factor to another one, estimated by least squares over all cells. Its 95 % interval
comes from a bootstrap of the residuals.
"""

import random
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import click
import numpy as np
import numpy.typing as npt
from attrs import frozen

from spdfq.bench.rows import Row, read_rows
from spdfq.recipe import merge, toml
from spdfq.runtime.files import write_text

FOLDER = Path(__file__).parent / "spdfq_study"
CELLS, DRAWS, SEED, BOOTSTRAP = 48, 2000, 0, 4000
# cells from which effects are estimated at least; there are 22 of them
FEWEST = 32
IMAGES, ITERATIONS = 16, 100
Data = dict[str, Any]
Matrix = npt.NDArray[np.float64]
Levels = dict[str, str]


def _prior(**options: Any) -> Data:
    return {"losses": {"attention_prior": {"prior": options}}}


def _variation(**options: Any) -> Data:
    return {"losses": {"total_variation": options}}


_NORM = {"for_group": [32, 3, 224, 224]}
_JITTER = {"type": "jitter", "pixels": [15, 30], "shared_axes": True, "for_side": 224}

# factor -> level -> the keys of [synthesis] that it sets; the first level is the present one
FACTORS: dict[str, dict[str, Data]] = {
    "total variation": {
        "norm, 0.05": _variation(weight=0.05, **_NORM),
        "norm, 0.005": _variation(weight=0.005, **_NORM),
        "mean square, 0.05": _variation(weight=0.05, form="mean_square"),
        "mean square, 0.5": _variation(weight=0.5, form="mean_square"),
    },
    "crops: layout": {
        "cells": {},
        "split": {"sampler": {"layout": "split"}},
        "boxes of 0.4 to 0.7": {"sampler": {"layout": "boxes", "area": [0.4, 0.7]}},
    },
    "crops: at most": {"4": {}, "2": {"sampler": {"max_patches": 2}}},
    "crops: drawn": {"once": {}, "each time": {"sampler": {"redraw": 2}}},
    "crops: loss": {"mean": {}, "sum": {"sampler": {"crop_loss": "sum"}}},
    "prior: spread": {
        "0.05 to 0.25": {},
        "0.05 to 0.1": _prior(sigma=[0.05, 0.1]),
        "0.15 to 0.4": _prior(sigma=[0.15, 0.4]),
    },
    "prior: sums to": {"attention": {}, "1": {"losses": {"attention_prior": {"scale": "sum"}}}},
    "prior: bumps at most": {"5": {}, "1": _prior(max_components=1)},
    "prior: blocks": {"deep half": {}, "all": {"losses": {"attention_prior": {"blocks": "all"}}}},
    "other logits": {
        "normal": {},
        "uniform": {"target": {"elsewhere": "uniform"}},
        "zero": {"target": {"elsewhere": "zero"}},
    },
    "schedule": {
        "one round": {},
        "two rounds": {"schedule": {"rounds": 2}},
        "constant": {"schedule": {"type": "constant"}},
    },
    "learning rate": {"0.2": {}, "0.25": {"optimizer": {"lr": 0.25}}},
    "betas of Adam": {"0.5, 0.9": {}, "0.9, 0.999": {"optimizer": {"betas": [0.9, 0.999]}}},
    "augmentation": {
        "none": {},
        "jitter": {"augmentations": [_JITTER]},
        "flip": {"augmentations": ["flip"]},
        "jitter, flip": {"augmentations": [_JITTER, "flip"]},
    },
}

# levels that contradict what the paper states
OUTSIDE = {
    ("total variation", "norm, 0.005"),
    ("total variation", "mean square, 0.5"),
    ("crops: layout", "boxes of 0.4 to 0.7"),
    ("crops: at most", "2"),
    ("prior: bumps at most", "1"),
    ("prior: blocks", "all"),
}

_BASE: Data = {
    "type": "optimize",
    "images": IMAGES,
    "iterations": ITERATIONS,
    "optimizer": {"type": "adam", "lr": 0.2, "betas": [0.5, 0.9]},
    "schedule": {"type": "warmup_cosine"},
    "sampler": {"type": "multi_semantic", "max_patches": 4, "every": 2},
    "target": {"type": "soft_label", "low": 5.0, "high": 10.0},
    "losses": {
        "attention_prior": {"weight": "auto", "prior": {"type": "gaussian_mixture", "max_components": 5}},
        "soft_cross_entropy": {},
    },
}

FMNIST = {"type": "fashion_mnist", "split": "test"}
CLIPART = {"type": "image_folder", "root": "runs/clipart_vit/test"}


@frozen
class Bed:
    """A model, its back-end and its images.

    Args:
        parents: what a bench file extends.
        screen: test images of the screening.
        report: other test images.
        real: the recipe part of real images.
        iterations: of the readings; a real ViT gets fewer, because each takes seconds.
    """

    parents: list[str]
    screen: Data
    report: Data
    real: str
    iterations: int


BEDS = {
    "vit_fmnist": Bed(
        ["models/vit_fmnist", "backends/ridge", "bits/w3a3"],
        {**FMNIST, "limit": 500, "skip": 1500},
        {**FMNIST, "limit": 1000, "skip": 500},
        "images/real_fmnist",
        ITERATIONS,
    ),
    "real_vit_112": Bed(
        ["../real_vit/model_112.toml", "../real_vit/backends/ridge.toml"],
        {**FMNIST, "limit": 500, "skip": 1500},
        {**FMNIST, "limit": 500, "skip": 500},
        "images/real_fmnist",
        50,
    ),
    "clipart_vit_112": Bed(
        ["../clipart_vit/model_112.toml", "../real_vit/backends/ridge.toml"],
        {**CLIPART, "limit": 200},
        {**CLIPART, "limit": 200, "skip": 200},
        "../clipart_vit/images/real_clipart.toml",
        50,
    ),
}
NEW_SEEDS = [1, 2, 3]


def present() -> Levels:
    """The levels of the shipped recipe."""
    return {factor: next(iter(levels)) for factor, levels in FACTORS.items()}


@cache
def design() -> tuple[Levels, ...]:
    """The levels of each cell."""
    source = random.Random(SEED)
    best, found = -np.inf, ()
    for _ in range(DRAWS):
        drawn = [_balanced(list(levels), source) for levels in FACTORS.values()]
        cells = tuple(dict(zip(FACTORS, levels, strict=True)) for levels in zip(*drawn, strict=True))
        determinant = float(np.linalg.slogdet(_information(matrix(cells)))[1])
        if determinant > best:
            best, found = determinant, cells
    return found


def _balanced(levels: list[str], source: random.Random) -> list[str]:
    column = levels * (CELLS // len(levels))
    source.shuffle(column)
    return column


def _information(x: Matrix) -> Matrix:
    return x.T @ x


def columns() -> list[tuple[str, str]]:
    """Factor and level of each column of the design matrix but the first, which is the present recipe."""
    return [(factor, level) for factor, levels in FACTORS.items() for level in list(levels)[1:]]


def matrix(cells: Sequence[Levels]) -> Matrix:
    """``[cells, 1 + columns]``: 1, and whether a cell has the level of a column."""
    return np.array([[1.0, *(float(cell[factor] == level) for factor, level in columns())] for cell in cells])


def synthesis(levels: Levels) -> Data:
    """The section ``[synthesis]`` of a cell."""
    data = _BASE
    for factor, level in levels.items():
        data = merge(data, FACTORS[factor][level])
    return dict(data)


def effects(response: Sequence[float], cells: Sequence[Levels]) -> list[Data]:
    """Every main effect, with its interval.

    Args:
        response: of each cell.
        cells: their levels.

    Returns:
        For each level but the present ones: factor, level, effect, low and high.
    """
    x, y = matrix(cells), np.asarray(response)
    solve = np.linalg.pinv(x)
    fitted = x @ (solve @ y)
    leverage = np.einsum("cf,fc->c", x, solve)
    residuals = (y - fitted) / np.sqrt((1 - leverage).clip(min=1e-6))
    residuals -= residuals.mean()
    draws = np.random.default_rng(SEED).choice(residuals, (BOOTSTRAP, len(y)))
    low, high = np.percentile((fitted + draws) @ solve.T, [2.5, 97.5], axis=0)
    return [
        {"factor": factor, "level": level, "effect": effect, "low": bottom, "high": top}
        for (factor, level), effect, bottom, top in zip(
            columns(), (solve @ y)[1:].tolist(), low[1:].tolist(), high[1:].tolist(), strict=True
        )
    ]


def cell_name(index: int) -> str:
    """The name of a cell's file, and its value of the axis ``images``."""
    return f"cell_{index:02d}"


def rows_by_cell(rows: Sequence[Row]) -> dict[int, list[Row]]:
    """The finished rows of each cell of the design."""
    names = {cell_name(index): index for index in range(CELLS)}
    found: dict[int, list[Row]] = {}
    for row in rows:
        if not row.error and (index := names.get(str(row.axes["images"]))) is not None:
            found.setdefault(index, []).append(row)
    return found


@click.group(help=__doc__)
def main() -> None:
    pass


@main.command()
def write() -> None:
    """Write the recipe parts of the cells, and a bench file for each bed."""
    for path, text in files().items():
        _write(path, text)
    click.echo(f"{len(files())} files in {FOLDER.name}")


def _write(path: str, text: str) -> None:
    target = FOLDER / path
    target.parent.mkdir(parents=True, exist_ok=True)
    write_text(target, text)


def files() -> dict[str, str]:
    """The content of every file of the screening, by its path in the folder."""
    cells = {cell_name(index): levels for index, levels in enumerate(design())}
    texts = {f"cells/{name}.toml": _part(name, levels) for name, levels in {"present": present(), **cells}.items()}
    for name, bed in BEDS.items():
        sources = ["images/gaussian_noise", bed.real, "../real_vit/images/psaq_vit.toml", "cells/present.toml"]
        axis = [*sources, *(f"cells/{cell}.toml" for cell in cells)]
        texts[f"screen_{name}.toml"] = _bench("The screening of SPDFQ's open constants", bed, bed.screen, [0], axis)
    return texts


def _bench(title: str, bed: Bed, dataset: Data, seeds: list[int], images: list[Any]) -> str:
    bench = {
        "schema": 1,
        "seeds": seeds,
        "base": {"extends": bed.parents, "evaluation": {"dataset": dataset}},
        "parents": {"images": images},
        "keys": {"synthesis.images": [IMAGES]},
    }
    return f"# {title} on this bed, at reduced length; written by spdfq_study.py.\n{toml.dumps(bench)}"


def _part(name: str, levels: Levels) -> str:
    changed = [f"{factor} = {level}" for factor, level in levels.items() if level != present()[factor]]
    head = "".join(f"# {line}\n" for line in [f"{name} of the study of SPDFQ's open constants.", *changed])
    return head + toml.dumps({"synthesis": synthesis(levels)})


def best(found: Sequence[Data]) -> dict[str, Levels]:
    """The best readings by the main effects on top-1.

    ``clear`` changes the levels whose interval lies above zero, ``predicted`` all whose effect is above zero; both stay
    inside the paper. ``outside`` also takes levels that contradict it.
    """
    inside = [each for each in found if (each["factor"], each["level"]) not in OUTSIDE]
    clear = [each for each in inside if each["low"] > 0]
    return {name: _largest(each) for name, each in {"clear": clear, "predicted": inside, "outside": found}.items()}


def _largest(found: Sequence[Data]) -> Levels:
    levels = present()
    for each in sorted(found, key=lambda each: float(each["effect"])):
        if each["effect"] > 0:
            levels[each["factor"]] = each["level"]
    return levels


def main_effects(rows: Sequence[Row]) -> dict[str, list[Data]]:
    """The main effects on top-1 and on the agreement with the teacher, in percentage points, from the finished cells.

    Raises:
        ValueError: too few cells are finished.
    """
    found = rows_by_cell(rows)
    cells, own = [design()[index] for index in sorted(found)], [found[index] for index in sorted(found)]
    if len(cells) < FEWEST or np.linalg.matrix_rank(matrix(cells)) <= len(columns()):
        missing = [cell_name(index) for index in range(CELLS) if index not in found]
        raise ValueError(f"no finished rows of {', '.join(missing)}; run spdfq bench again")
    return {
        "top1": effects([_mean(row.top1 for row in each) for each in own], cells),
        "agreement": effects([_mean(row.measured.agreement for row in each) for each in own], cells),
    }


def _mean(values: Iterable[float | None]) -> float:
    return float(np.mean([value for value in values if value is not None]))


def _read(path: Path) -> dict[str, list[Data]]:
    try:
        return main_effects(read_rows(path))
    except ValueError as error:
        raise click.UsageError(f"{path}: {error}") from None


@main.command("effects")
@click.argument("rows", type=click.Path(exists=True, path_type=Path))
def effects_command(rows: Path) -> None:
    """Estimate the main effects from the rows of a screening."""
    for response, found in _read(rows).items():
        for each in sorted(found, key=lambda each: -float(each["effect"])):
            interval = f"{each['effect']:+6.2f} [{each['low']:.2f}, {each['high']:.2f}]"
            click.echo(f"{response} {interval}  {each['factor']}: {each['level']}")


@main.command()
@click.argument("rows", type=click.Path(exists=True, path_type=Path))
def readings(rows: Path) -> None:
    """Write the best readings by the rows of a screening, and a bench file for each bed."""
    found = best(_read(rows)["top1"])
    for name, levels in found.items():
        _write(f"readings/{name}.toml", _part(name, levels))
    for name, bed in BEDS.items():
        part = f"readings/at_{bed.iterations}.toml"
        _write(part, f"# Reduced length.\n{toml.dumps({'synthesis': {'iterations': bed.iterations}})}")
        made = ["cells/present.toml", *(f"readings/{reading}.toml" for reading in found), "images/psaq_vit"]
        axis = ["images/gaussian_noise", bed.real, *([each, part] for each in made)]
        text = _bench("The best readings with new seeds and test images", bed, bed.report, NEW_SEEDS, axis)
        _write(f"confirm_{name}.toml", text)
    click.echo("\n".join(f"{name}: {levels}" for name, levels in found.items()))


if __name__ == "__main__":
    main()
