"""The heat map of the page: which site is where, how it is coloured, and its histogram."""

import re

import pytest

from spdfq.report.site_noise import heat_map


def site(name, snr, **changes):
    given = {"site": name, "kind": "input", "bits": 4, "snr": snr, "low": -1.0, "high": 3.0, "relative": False}
    return given | {"counts": [0, 0, 9, 0], "levels": [0.0, 1.0, 2.0]} | changes


def found(*sites, blocks=("blocks.0", "blocks.1")):
    return {"images": 32, "blocks": list(blocks), "sites": list(sites)}


def test_a_row_for_each_place_in_a_block_and_a_column_for_each_block():
    shown = heat_map(found(site("head.input", 50), site("blocks.0.fc", 20), site("blocks.1.fc", 10)), None)
    assert shown.depths == ["0", "1"]
    assert [(name, [cell.site for cell in row]) for name, row in shown.rows] == [("fc", ["blocks.0.fc", "blocks.1.fc"])]
    assert [cell.site for cell in shown.others] == ["head.input"]
    assert [cell.noisy for cell in shown.cells] == [0.0, 1.0, 0.0]  # the scale is that of the blocks
    assert shown.ends == (20, 10)


def test_blocks_of_several_stages_are_columns_by_their_numbers():
    names = ("layers.0.blocks.0", "layers.1.blocks.0", "encoder_layer_3")
    shown = heat_map(
        found(*(site(f"{name}.fc", 10) for name in names), site("layers.1.blocks.0.extra", 8), blocks=names), None
    )
    assert shown.depths == ["0.0", "1.0", "3"]
    assert [None if cell is None else cell.site for cell in shown.rows[1][1]] == [None, "layers.1.blocks.0.extra", None]


def test_a_diagnosis_knows_the_ratio_of_a_rounded_weight():
    weight = site("blocks.0.fc.weight", None, kind="weight")
    unknown = heat_map(found(weight), None)
    assert (unknown.unknown, unknown.cells[0].shown, unknown.cells[0].noisy) == (True, "–", None)
    known = heat_map(found(weight), {"values": [{"site": "blocks.0.fc.weight", "snr": 12.34}]})
    assert (known.unknown, known.cells[0].about) == (False, "weight, 4 bits, 12.3 dB")


def test_a_histogram_has_a_bar_for_each_bin_with_values_and_a_line_for_each_level():
    cell = heat_map(found(site("blocks.0.fc", 10)), None).cells[0]
    bars, levels = (re.search(rf'class="{kind}" d="([^"]*)"', cell.histogram)[1] for kind in ("bars", "levels"))
    assert bars.startswith("M160.0 ")  # the third of four bins of 320
    assert bars.count("z") == 1
    assert re.findall(r"M([\d.]+) ", levels) == ["80.0", "160.0", "240.0"]  # 0, 1 and 2 of -1 to 3


@pytest.mark.parametrize(
    ("changes", "lines"),
    [
        ({"relative": True}, ["Each channel has its own range, shown from 0 to 1."]),
        ({"levels": None}, ["The levels are too many to be drawn."]),
        (
            {"counts": [1, 0, 2000, 3]},
            ["Bars: number of values, on a logarithmic scale; 4 of 2,004 values lie in or beyond the outermost bins."],
        ),
    ],
)
def test_notes_say_what_a_histogram_shows(changes, lines):
    assert set(lines) < set(heat_map(found(site("blocks.0.fc", 10, **changes)), None).cells[0].notes)


def test_sites_of_one_ratio_and_no_sites():
    assert heat_map(found(), None) is None
    shown = heat_map(found(site("a", 10), site("b", 10), blocks=()), None)
    assert ([cell.noisy for cell in shown.cells], shown.rows) == ([0.0, 0.0], [])
