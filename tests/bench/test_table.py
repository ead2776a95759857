"""The table of a bench: shares of a gap, and images that could not be read."""

import re

import numpy as np
import pytest
from attrs import evolve
from click.testing import CliRunner
from spdfq_cli.main import main
from support.benches import bench_row

from spdfq.bench.plan import read_plan
from spdfq.bench.table import caption, markdown, table
from spdfq.errors import RecipeError

BENCH = """
seeds = [0, 1]
[base]
extends = ["models/vit_fmnist"]
[parents]
images = ["images/gaussian_noise", "images/psaq_vit", "images/real_fmnist"]
backend = ["backends/minmax", "backends/repq"]
[gap]
axis = "images"
floor = "gaussian_noise"
ceiling = "real_fmnist"
"""
TOP1 = {
    ("gaussian_noise", "minmax"): [20.0, 30.0],
    ("psaq_vit", "minmax"): [40.0, 50.0],
    ("real_fmnist", "minmax"): [60.0, 70.0],
    ("gaussian_noise", "repq"): [10.0, 10.0],
    ("psaq_vit", "repq"): [5.0, 5.0],
    ("real_fmnist", "repq"): [60.0, 60.0],
}


def plan(folder, text=BENCH):
    (folder / "gap.toml").write_text(text)
    return read_plan(str(folder / "gap.toml"))


def row(images, backend, seed, top1, **metrics):
    return bench_row({"images": images, "backend": backend}, seed, top1, **metrics)


def rows():
    return [row(*cell, seed, top1) for cell, values in TOP1.items() for seed, top1 in enumerate(values)]


def column(plan, rows, heading):
    shown = table(plan, rows)
    at = shown.headings.index(heading)
    return {tuple(line[:2]): line[at] for line in shown.rows}


def shares(plan, rows):
    return column(plan, rows, "gap closed")


def test_a_row_closes_its_share_of_the_gap_in_its_own_back_end(tmp_path):
    found = shares(plan(tmp_path), rows())
    assert found["psaq_vit", "minmax"] == "50%"
    assert found["psaq_vit", "repq"] == "-10%"


def test_the_ends_of_the_gap_have_no_share(tmp_path):
    found = shares(plan(tmp_path), rows())
    assert {found[images, "minmax"] for images in ("gaussian_noise", "real_fmnist")} == {""}


def test_only_seeds_that_all_three_have_count(tmp_path):
    kept = [one for one in rows() if one.folder != "cells/gaussian_noise-minmax-s0"]
    kept = [row("psaq_vit", "minmax", 1, 60.0) if one.folder.endswith("psaq_vit-minmax-s1") else one for one in kept]
    assert shares(plan(tmp_path), kept)["psaq_vit", "minmax"] == "75%"  # (60 - 30) / (70 - 30)


def test_without_an_end_or_above_no_gap_there_is_no_share(tmp_path):
    kept = [one for one in rows() if one.axes["images"] != "real_fmnist"]
    assert set(shares(plan(tmp_path), kept).values()) == {""}
    level = [*kept, row("real_fmnist", "minmax", 0, 20.0)]
    assert shares(plan(tmp_path), level)["psaq_vit", "minmax"] == ""


def test_the_caption_says_what_the_gap_lies_between(tmp_path):
    assert "Gap closed: 0 % is the top-1 of gaussian_noise, 100 % that of real_fmnist." in caption(
        plan(tmp_path), rows()
    )


def test_a_file_without_a_gap_has_no_such_column(tmp_path):
    without = plan(tmp_path, BENCH.partition("[gap]")[0])
    assert "gap closed" not in table(without, rows()).headings
    assert "ap closed" not in markdown(without, rows())


def test_a_gap_over_a_key_takes_its_values(tmp_path):
    text = BENCH.partition("[gap]")[0] + (
        '[keys]\n"quantization.weights.bits" = [2, 4, 8]\n'
        '[gap]\naxis = "quantization.weights.bits"\nfloor = 2\nceiling = 8\n'
    )
    assert plan(tmp_path, text).gap.ceiling == 8


def test_a_gap_may_lie_between_no_and_yes(tmp_path):
    text = BENCH.partition("[gap]")[0] + (
        '[keys]\n"quantization.weights.symmetric" = [false, true]\n'
        '[gap]\naxis = "quantization.weights.symmetric"\nfloor = false\nceiling = true\n'
    )
    assert "the top-1 of False, 100 % that of True" in caption(plan(tmp_path, text), rows())


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ('axis = "images"', 'axis = "pictures"', "gap.axis: this file has no axis 'pictures' (axes: images"),
        ('floor = "gaussian_noise"', 'floor = "noise"', "gap.floor: 'noise' is not a value of images (values: gauss"),
        ('ceiling = "real_fmnist"', 'ceiling = "gaussian_noise"', "gap: floor and ceiling are the same value"),
        ('ceiling = "real_fmnist"', "", "gap.ceiling: is required"),
        ("[gap]", "[gap]\nshare = 1", "gap.share: unknown key"),
    ],
)  # fmt: skip
def test_a_wrong_gap_is_one_line(tmp_path, old, new, said):
    with pytest.raises(RecipeError) as raised:
        plan(tmp_path, BENCH.replace(old, new))
    assert len(raised.value.problems) == 1
    assert said in raised.value.problems[0]


def test_the_command_ends_with_two(tmp_path):
    (tmp_path / "gap.toml").write_text(BENCH.replace('axis = "images"', 'axis = "x"'))
    result = CliRunner().invoke(main, ["bench", str(tmp_path / "gap.toml")])
    assert (result.exit_code, "gap.axis" in result.output) == (2, True)


def test_images_that_could_not_be_read_are_named(tmp_path):
    damaged = [row("gaussian_noise", "minmax", 0, 20.0, damaged=["val/b.jpg", "val/a.jpg"])]
    assert "In the evaluation 2 images cannot be read and are left out: val/b.jpg, val/a.jpg." in caption(
        plan(tmp_path), damaged
    )


# differences to a baseline

BASELINE = BENCH + '[baseline]\naxis = "images"\nvalue = "psaq_vit"\n'


def with_hits(shift, backends=("minmax", "repq")):
    """Rows whose per-image results differ between sources by about ``shift`` points."""
    levels = {"gaussian_noise": 0.5, "psaq_vit": 0.6, "real_fmnist": 0.6 + shift}
    return [
        row(images, backend, seed, None, hits=hits(level, seed))
        for images, level in levels.items()
        for backend in backends
        for seed in (0, 1)
    ]


def hits(share, seed, images=2000):
    rng = np.random.default_rng(7)
    return rng.random(images) + 0.002 * seed < share


def test_rows_differ_from_the_baseline_by_an_interval(tmp_path):
    found = column(plan(tmp_path, BASELINE), with_hits(0.2), "over psaq_vit")
    assert found["psaq_vit", "repq"] == ""
    assert re.fullmatch(r"\+\d+\.\d \[\d+\.\d, \d+\.\d\]", found["real_fmnist", "repq"])
    assert found["gaussian_noise", "minmax"].startswith("-")


def test_the_caption_says_what_the_interval_covers(tmp_path):
    assert "95 % interval over seeds and test images" in caption(plan(tmp_path, BASELINE), with_hits(0.2))


def test_rows_without_per_image_results_have_an_interval_over_the_seeds_and_say_so(tmp_path):
    shown = table(plan(tmp_path, BASELINE), rows())
    cells = {tuple(line[:2]): line for line in shown.rows}
    assert cells["gaussian_noise", "repq"][-2].endswith("(seeds only)")
    assert shown.notes[-1].startswith("No per-image results in gaussian_noise / minmax, ")
    assert shown.best == [False] * 6


def test_the_best_row_is_marked_only_where_the_interval_supports_it(tmp_path):
    text = BASELINE.replace('floor = "gaussian_noise"', 'floor = "psaq_vit"')  # two candidates are left
    text = text.replace("[gap]\n", "").replace('axis = "images"\nfloor = "psaq_vit"\nceiling = "real_fmnist"\n', "")
    clear, close = (table(plan(tmp_path, text), with_hits(shift)) for shift in (0.2, 0.001))
    assert [line[:2] for line, wins in zip(clear.rows, clear.best, strict=True) if wins] == [
        ["real_fmnist", "minmax"],
        ["real_fmnist", "repq"],
    ]
    assert not any(close.best)
    assert "| **" in markdown(plan(tmp_path, text), with_hits(0.2))
    assert "Bold: better than every other row" in markdown(plan(tmp_path, text), with_hits(0.2))


def test_the_ends_of_the_gap_are_no_candidates(tmp_path):
    shown = table(plan(tmp_path, BASELINE), with_hits(0.2))
    assert shown.best == [False] * 6  # only psaq_vit is left, with nothing to be better than


def test_test_images_that_differ_are_a_note_and_no_number(tmp_path):
    mixed = [evolve(one, metrics=evolve(one.metrics, test_images="x" * (one.axes["images"] == "psaq_vit") + "y"))
             for one in with_hits(0.2)]  # fmt: skip
    shown = table(plan(tmp_path, BASELINE), mixed)
    assert {line[-2] for line in shown.rows} == {""}
    assert any("were measured on different test images" in note for note in shown.notes)


def test_a_wrong_baseline_is_one_line(tmp_path):
    with pytest.raises(RecipeError, match=r"^baseline.value: 'x' is not a value of images \(values: gaussian_noise"):
        plan(tmp_path, BASELINE.replace('value = "psaq_vit"', 'value = "x"'))
