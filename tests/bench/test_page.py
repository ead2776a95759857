"""The page of a bench: what it shows of rows, intervals, bits and the folders of its cells."""

import json
import os
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from attrs import evolve
from support.benches import bench_row

from spdfq.bench.groups import Group, deciding
from spdfq.bench.over_bits import over_bits
from spdfq.bench.page import write_page
from spdfq.bench.plan import read_plan
from spdfq.bench.rows import Backend, Images
from spdfq.errors import DataError
from spdfq.report.explained import EXPLAINED_FILE, Explained
from spdfq.report.pictures import _contact_sheet

BENCH = """
seeds = [0, 1, 2]
[base]
extends = ["models/vit_fmnist"]
[parents]
images = ["images/gaussian_noise", "images/psaq_vit", "images/real_fmnist"]
[keys]
"quantization.weights.bits" = [3, 4]
[gap]
axis = "images"
floor = "gaussian_noise"
ceiling = "real_fmnist"
[baseline]
axis = "images"
value = "gaussian_noise"
"""
SHARE = {("gaussian_noise", 3): 0.2, ("psaq_vit", 3): 0.5, ("real_fmnist", 3): 0.8}
SHARE |= {(images, 4): share + 0.1 for (images, _), share in SHARE.items()}
KEY = "quantization.weights.bits"


class Words(HTMLParser):
    def __init__(self, html):
        super().__init__()
        self.tags, self.words, self.hidden = [], [], False
        self.feed(html)
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self.hidden = tag == "style"

    def handle_endtag(self, tag):
        self.hidden = False

    def handle_data(self, data):
        self.words += [] if self.hidden else [data]


def plan(folder, text=BENCH):
    (folder / "bench.toml").write_text(text)
    return read_plan(str(folder / "bench.toml"))


def row(images, bits, seed, share):
    hits = np.random.default_rng([seed, bits]).random(400) < share
    made = bench_row({"images": images, KEY: bits}, seed, None, hits, fp={"top1": 95.0})
    backend = Backend(label=f"W{bits}A4", placement="matmul_inputs", digest=str(bits))
    return evolve(made, images=Images(type=images, count=2, digest=images), backend=backend)


def rows():
    return [row(*cell, seed, share) for cell, share in SHARE.items() for seed in (0, 1, 2)]


def page(folder, found=None, text=BENCH):
    return write_page(folder, plan(folder, text), rows() if found is None else found).read_text(encoding="utf-8")


def test_the_page_has_every_part_and_fetches_nothing(tmp_path):
    html = page(tmp_path)
    assert re.findall("<h2>(.*?)</h2>", html) == [
        *("Accuracy", "Difference", "Heat map", "Over bits", "Table", "Environment")
    ]
    assert not {"script", "link", "iframe", "img"} & {tag for tag, _ in Words(html).tags}
    assert not re.search(r"https?:|url\(|@import|\son\w+=", html)


def test_differences_are_shown_with_their_intervals_on_one_scale(tmp_path):
    html = page(tmp_path)
    assert Words(html).text.count("[") >= 8  # in the plot and in the table
    section = html.partition("<h2>Difference</h2>")[2].partition("</section>")[0]
    assert section.count('class="strip own"') == 4
    zero = {float(at) for at in re.findall(r'<u style="left:([\d.]+)%', section)}
    lows = [float(at) for at in re.findall(r'<i style="left:([\d.]+)%', section)]
    assert len(zero) == 1
    assert all(low > next(iter(zero)) for low in lows)  # every interval lies above zero
    assert all(0 <= low <= 100 for low in lows)


def test_the_best_row_is_named_only_if_its_interval_supports_it(tmp_path):
    without_ends = BENCH.partition("[gap]")[0] + "[baseline]" + BENCH.partition("[baseline]")[2]
    assert "best of their groups: real_fmnist / 3 (" in Words(page(tmp_path, text=without_ends)).text
    one_seed = [each for each in rows() if each.seed == 0]
    text = Words(page(tmp_path, one_seed)).text
    assert "6 of 18 cells finished; no row is better than every other one by its interval" in text


def test_a_failed_cell_is_named_and_left_out(tmp_path):
    failed = evolve(rows()[0], metrics=None, error="no <memory>")
    text = Words(page(tmp_path, [failed, *rows()[1:]])).text
    assert f"Failed {failed.folder}: no <memory>" in text
    assert "17 of 18 cells finished" in text


def test_a_bench_without_a_finished_cell_has_a_page(tmp_path):
    failed = [evolve(each, metrics=None, error="no memory") for each in rows()]
    assert re.findall("<h2>(.*?)</h2>", page(tmp_path, failed)) == ["Failed", "Table"]


def test_runs_are_linked_and_their_images_and_explanations_shown(tmp_path):
    cell = tmp_path / rows()[0].folder
    cell.mkdir(parents=True)
    (cell / "report.html").write_text("")
    (cell / EXPLAINED_FILE).write_text(json.dumps({"names": {"psaq_vit": "Source: mine."}, "keys": {}}))
    _contact_sheet(np.zeros((2, 4, 4, 1), np.uint8)).save(cell / "synthetic.png")
    html = page(tmp_path)
    tags = Words(html).tags
    assert [found["href"] for tag, found in tags if tag == "a"] == [f"{rows()[0].folder}/report.html"]
    assert [tag for tag, _ in tags].count("img") == 2
    assert 'title="Recipe part images/gaussian_noise: ' in html


def test_a_kill_in_the_middle_of_the_page_leaves_the_old_one(tmp_path, monkeypatch):
    before = page(tmp_path)

    def replace(source, target):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(KeyboardInterrupt):
        page(tmp_path, rows()[1:])
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == before


def test_a_damaged_file_of_a_cell_is_one_line_with_its_name(tmp_path):
    cell = tmp_path / rows()[0].folder
    cell.mkdir(parents=True)
    (cell / EXPLAINED_FILE).write_bytes(b"\xff")
    with pytest.raises(DataError, match=rf"{EXPLAINED_FILE}: damaged \(UnicodeDecodeError: .*; run the recipe again"):
        page(tmp_path)
    (cell / EXPLAINED_FILE).unlink()
    (cell / "synthetic.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"synthetic.png: damaged \(.*; run the recipe again"):
        page(tmp_path)


def groups(*cells):
    """Groups with axes a and b, a label of the bits and a top-1 each."""
    found = []
    for a, b, label, top1 in cells:
        made = evolve(bench_row({"a": a, "b": b}, 0, top1), backend=Backend(label=label))
        found.append(Group(f"{a} {b}", {"a": a, "b": b}, {0: made}))
    return found


def test_the_axes_that_decide_a_property_are_found():
    found = groups(("x", 3, "W3A3", 1), ("y", 3, "W3A3", 2), ("x", 4, "W4A4", 3), ("y", 4, "W4A4", 4))
    assert deciding(found, lambda group: group.rows[0].backend.label) == ["b"]
    assert deciding(found, lambda group: group.axes["a"]) == ["a"]


def test_accuracy_over_bits_has_a_line_for_each_other_setting():
    found = groups(("x", 8, "W8A8", 80), ("x", 3, "W3A3", 40), ("y", 8, "W8A8", 60), ("y", 3, "W3A3", 50))
    svg = over_bits(found, Explained().name)
    assert 'aria-label="x: W3A3 40.0 %, W8A8 80.0 %; y: W3A3 50.0 %, W8A8 60.0 %"' in svg
    lines = [
        [tuple(map(float, point.split(","))) for point in line.split()]
        for line in re.findall('polyline points="(.*?)"', svg)
    ]
    # 40 to 90 (full precision) in steps of ten over 12 to 266: 5.08 a point; two labels at a quarter of 44 to 620
    assert lines[0] == [(188.0, 266.0), (476.0, pytest.approx(62.8))]
    assert lines[1] == [(188.0, pytest.approx(215.2)), (476.0, pytest.approx(164.4))]


def test_without_two_widths_there_is_no_plot():
    assert over_bits(groups(("x", 3, "W3A3", 1), ("y", 3, "W3A3", 2)), Explained().name) == ""
    assert over_bits(groups(("x", 3, "W3A3", 1), ("y", 4, "W4A4", 2)), Explained().name) == ""
