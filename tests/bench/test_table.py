"""The table of a bench: shares of a gap, and images that could not be read."""

import pytest
from click.testing import CliRunner
from spdfq_cli.main import main

from spdfq.bench.plan import read_plan
from spdfq.bench.table import caption, headings, markdown, table_rows
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
    return {
        "axes": {"images": images, "backend": backend},
        "seed": seed,
        "error": None,
        "folder": f"cells/{images}-{backend}-s{seed}",
        "metrics": {"images": 50, "fp": {"top1": 90.0}, "quantized": {"top1": top1}, "agreement": 70.0, **metrics},
        "seconds": 1.0,
        "model": "bundled:vit_fmnist",
        "backend": {"placement": "matmul_inputs"},
        **{"device": "cpu", "device_name": "a processor", "precision": "float32"},
    }


def rows():
    return [row(*cell, seed, top1) for cell, values in TOP1.items() for seed, top1 in enumerate(values)]


def shares(plan, rows):
    at = headings(plan).index("gap closed")
    return {tuple(line[:2]): line[at] for line in table_rows(plan, rows)}


def test_a_row_closes_its_share_of_the_gap_in_its_own_back_end(tmp_path):
    found = shares(plan(tmp_path), rows())
    assert found["psaq_vit", "minmax"] == "50%"
    assert found["psaq_vit", "repq"] == "-10%"


def test_the_ends_of_the_gap_have_no_share(tmp_path):
    found = shares(plan(tmp_path), rows())
    assert {found[images, "minmax"] for images in ("gaussian_noise", "real_fmnist")} == {""}


def test_only_seeds_that_all_three_have_count(tmp_path):
    kept = [one for one in rows() if one["folder"] != "cells/gaussian_noise-minmax-s0"]
    kept = [row("psaq_vit", "minmax", 1, 60.0) if one["folder"].endswith("psaq_vit-minmax-s1") else one for one in kept]
    assert shares(plan(tmp_path), kept)["psaq_vit", "minmax"] == "75%"  # (60 - 30) / (70 - 30)


def test_without_an_end_or_above_no_gap_there_is_no_share(tmp_path):
    kept = [one for one in rows() if one["axes"]["images"] != "real_fmnist"]
    assert set(shares(plan(tmp_path), kept).values()) == {""}
    level = [*kept, row("real_fmnist", "minmax", 0, 20.0)]
    assert shares(plan(tmp_path), level)["psaq_vit", "minmax"] == ""


def test_the_caption_says_what_the_gap_lies_between(tmp_path):
    assert "Gap closed: 0 % is the top-1 of gaussian_noise, 100 % that of real_fmnist." in caption(
        plan(tmp_path), rows()
    )


def test_a_file_without_a_gap_has_no_such_column(tmp_path):
    without = plan(tmp_path, BENCH.partition("[gap]")[0])
    assert "gap closed" not in headings(without)
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
