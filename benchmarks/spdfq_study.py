"""A screening study of the constants that SPDFQ (arXiv 2412.16553) leaves open, at reduced length.

    python benchmarks/spdfq_study.py write      # the cells and bench files in benchmarks/spdfq_study
    spdfq bench benchmarks/spdfq_study/screen_vit_fmnist.toml
    python benchmarks/spdfq_study.py effects runs/screen_vit_fmnist/results.jsonl --out FILE.json

All factors change at once: in 48 cells, each level of a factor comes up equally often. Of 2,000 such designs, drawn at
random, the one with the largest determinant of its information matrix is used. A main effect is the change of the
response from the present level of a factor to another one, estimated by least squares over all cells. Its 95 % interval
comes from a bootstrap of the residuals.
"""

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np
import numpy.typing as npt

from spdfq.bench.rows import Row, read_rows
from spdfq.recipe import merge, toml
from spdfq.runtime.files import write_text

FOLDER = Path(__file__).parent / "spdfq_study"
CELLS, DRAWS, SEED, BOOTSTRAP = 48, 2000, 0, 4000
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

# name of a bed -> what its bench file extends, its test images, and its real images
BEDS: dict[str, tuple[list[str], Data, str]] = {
    "vit_fmnist": (
        ["models/vit_fmnist", "backends/ridge", "bits/w3a3"],
        {"limit": 500, "skip": 1500},
        "images/real_fmnist",
    ),
    "real_vit": (
        ["../real_vit/model_112.toml", "../real_vit/backends/ridge.toml"],
        {"limit": 500, "skip": 1500},
        "images/real_fmnist",
    ),
}


def present() -> Levels:
    """The levels of the shipped recipe."""
    return {factor: next(iter(levels)) for factor, levels in FACTORS.items()}


def design() -> list[Levels]:
    """The levels of each cell."""
    source = random.Random(SEED)
    best, found = -np.inf, []
    for _ in range(DRAWS):
        drawn = [_balanced(list(levels), source) for levels in FACTORS.values()]
        cells = [dict(zip(FACTORS, levels, strict=True)) for levels in zip(*drawn, strict=True)]
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
    residuals = (y - fitted) / np.sqrt(1 - leverage)
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
    (FOLDER / "cells").mkdir(parents=True, exist_ok=True)
    for path, text in files().items():
        write_text(FOLDER / path, text)
    click.echo(f"{len(files())} files in {FOLDER.name}")


def files() -> dict[str, str]:
    """The content of every file of the study, by its path in the folder."""
    cells = {cell_name(index): levels for index, levels in enumerate(design())}
    texts = {f"cells/{name}.toml": _part(name, levels) for name, levels in {"present": present(), **cells}.items()}
    for bed, (parents, test, real) in BEDS.items():
        sources = ["images/gaussian_noise", real, "../real_vit/images/psaq_vit.toml", "cells/present.toml"]
        bench = {
            "schema": 1,
            "seeds": [0],
            "base": {"extends": parents, "evaluation": {"dataset": {"type": "fashion_mnist", "split": "test", **test}}},
            "parents": {"images": [*sources, *(f"cells/{name}.toml" for name in cells)]},
            "keys": {"synthesis.images": [IMAGES]},
        }
        head = (
            f"# The screening study of SPDFQ's open constants on this bed; written by spdfq_study.py write:\n# {bed}\n"
        )
        texts[f"screen_{bed}.toml"] = head + toml.dumps(bench)
    return texts


def _part(name: str, levels: Levels) -> str:
    changed = [f"{factor} = {level}" for factor, level in levels.items() if level != present()[factor]]
    head = "".join(f"# {line}\n" for line in [f"{name} of the study of SPDFQ's open constants.", *changed])
    return head + toml.dumps({"synthesis": synthesis(levels)})


@main.command("effects")
@click.argument("rows", type=click.Path(exists=True, path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), required=True)
def effects_command(rows: Path, out: Path) -> None:
    """Estimate the main effects from the rows of a bench, on top-1 and on agreement with the teacher."""
    found = rows_by_cell(read_rows(rows))
    if missing := [cell_name(index) for index in range(CELLS) if index not in found]:
        raise click.UsageError(f"{rows}: no finished rows of {', '.join(missing)}; run spdfq bench again")
    cells = design()
    responses = {
        "top1": [float(np.mean([row.top1 for row in found[index]])) for index in range(CELLS)],
        "agreement": [float(np.mean([row.measured.agreement for row in found[index]])) for index in range(CELLS)],
    }
    result = {
        "rows": rows.name,
        "cells": CELLS,
        "images": IMAGES,
        "iterations": ITERATIONS,
        "seeds": sorted({row.seed for each in found.values() for row in each}),
        **{name: effects(values, cells) for name, values in responses.items()},
    }
    write_text(out, json.dumps(result, indent=1) + "\n")
    for effect in sorted(result["top1"], key=lambda each: -each["effect"]):
        interval = f"{effect['effect']:+6.2f} [{effect['low']:.2f}, {effect['high']:.2f}]"
        click.echo(f"{interval}  {effect['factor']}: {effect['level']}")


if __name__ == "__main__":
    main()
