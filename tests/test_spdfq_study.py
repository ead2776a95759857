"""The screening study of SPDFQ's open constants: its design, its files, and its estimates."""

import sys

import numpy as np
import pytest
from support.docs import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))

import spdfq_study as study

from spdfq.bench.plan import read_plan
from spdfq.recipe.parts import load_part


def test_every_level_of_a_factor_comes_up_equally_often():
    cells = study.design()
    assert len(cells) == 48
    for factor, levels in study.FACTORS.items():
        found = [cell[factor] for cell in cells]
        assert {level: found.count(level) for level in levels} == dict.fromkeys(levels, 48 // len(levels))
    assert cells == study.design.__wrapped__()


def test_no_two_columns_of_the_design_are_close_to_each_other():
    # columns of one factor exclude each other, which alone gives up to -1/2
    correlation = np.corrcoef(study.matrix(study.design())[:, 1:].T)
    assert abs(correlation - np.eye(len(correlation))).max() <= 0.51


def test_the_committed_files_are_those_of_the_design():
    for path, text in study.files().items():
        assert (study.FOLDER / path).read_text(encoding="utf-8") == text, "run: python benchmarks/spdfq_study.py write"


def test_the_present_cell_is_the_shipped_recipe_at_reduced_length():
    cell = load_part(str(study.FOLDER / "cells" / "present.toml"), "synthesis").synthesis
    shipped = load_part("images/spdfq", "synthesis", ["synthesis.images=16", "synthesis.iterations=100"]).synthesis
    assert cell.sampler.every == 2
    assert (cell.losses, cell.target, cell.schedule, cell.optimizer, cell.augmentations) == (
        shipped.losses,
        shipped.target,
        shipped.schedule,
        shipped.optimizer,
        shipped.augmentations,
    )


@pytest.mark.parametrize("path", sorted(study.FOLDER.glob("*.toml")), ids=lambda path: path.stem)
def test_every_bench_of_the_study_can_be_read(path):
    assert len(read_plan(str(path)).combinations) in (52, 7)


def test_effects_find_what_was_planted_and_their_intervals_cover_it():
    cells, columns = study.design(), study.columns()
    truth = np.zeros(len(columns))
    truth[columns.index(("total variation", "mean square, 0.05"))] = 5
    truth[columns.index(("schedule", "constant"))] = -3
    exact = 50 + study.matrix(cells)[:, 1:] @ truth
    assert np.allclose([each["effect"] for each in study.effects(exact, cells)], truth)
    noisy = study.effects(exact + np.random.default_rng(1).normal(size=48), cells)
    covered = [each["low"] <= real <= each["high"] for each, real in zip(noisy, truth, strict=True)]
    assert np.mean(covered) > 0.85
    found = study.best(noisy)
    assert found["clear"]["total variation"] == "mean square, 0.05"
    assert found["clear"]["schedule"] == "one round"
    assert not {(factor, level) for factor, level in found["predicted"].items()} & study.OUTSIDE


def test_effects_need_every_cell():
    with pytest.raises(ValueError, match=r"no finished rows of cell_00, .*; run spdfq bench again"):
        study.main_effects([])
