"""Damaged files of a run folder, and files that a kill leaves unfinished."""

import json
import os

import pytest
import torch
from support.reports import page, run_json, whole_folder

from spdfq.errors import DataError
from spdfq.report import write_report, write_sheet
from spdfq.report.pictures import write_real_images


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"no run\.json"):
        write_report(tmp_path)


def test_damaged_files_are_refused_by_name(tmp_path):
    (tmp_path / "run.json").write_text('{"name": ')
    with pytest.raises(DataError, match=r"run\.json: damaged \(JSONDecodeError: "):
        write_report(tmp_path)
    (tmp_path / "run.json").write_text('{"name": "trial"}')
    with pytest.raises(DataError, match="lacks 'metrics'"):
        write_report(tmp_path)
    (tmp_path / "sites.json").write_text("[]")
    with pytest.raises(DataError, match=r"sites\.json: damaged \(.*\); run the recipe again with --fresh"):
        page(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("run.json", b'{"name": "trial"}', "lacks 'metrics'"),
        ("run.json", b'{"name": "trial", "metrics": []}', "damaged (TypeError: "),
        ("run.json", b"\xff", "damaged (UnicodeDecodeError: "),
        ("run.json", json.dumps(run_json() | {"stages": []}).encode(), "damaged (AttributeError: "),
        ("run.json", json.dumps(run_json() | {"warnings": 3}).encode(), "damaged (TypeError: "),
        ("measures.json", b"{", "damaged (JSONDecodeError: "),
        ("measures.json", b'{"semantic_alignment": "high"}', "damaged (ValueError: "),
        ("sites.json", b"[" * 100_000, "damaged (RecursionError: "),
        ("sites.json", b'{"quantized": 3}', "damaged (TypeError: "),
        ("diagnosis.json", b"[]", "damaged (expected an object, got [])"),
        ("site_noise.json", b'{"sites": [{}], "blocks": []}', "lacks 'site'"),
        ("exports.json", b'{"model.onnx": 3}', "damaged (model.onnx: expected an object)"),
        ("exports.json", b'{"model.onnx": {}}', "lacks 'size'; remove it and export again"),
        ("explained.json", b'{"names": [], "keys": {}}', "damaged (AttributeError: "),
        ("image_classes.json", b"3", "damaged (TypeError: "),
        ("recipe.toml", b"\xff", "damaged (UnicodeDecodeError: "),
    ],
)
def test_a_damaged_file_is_one_line_with_its_name(tmp_path, name, content, said):
    page(whole_folder(tmp_path))
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as raised:
        write_report(tmp_path)
    assert str(raised.value).startswith(f"{tmp_path / name}: {said}")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "rows",
    [
        *("0,0,1\n0,1,x", "0,0,1\n0,1,nan", "0,0,1\n0,1", "0,0,1\n0,1,2\n1,0,3"),
        *("0,0,1\n\n0,1,2", "0,0,\udcff", f"0,0,{'1' * 200_000}", "0,0,1e308\n0,1,-1e308"),
    ],
    ids=["text", "nan", "short line", "short group", "empty line", "no UTF-8", "long field", "too wide"],
)
def test_a_damaged_loss_table_is_refused_by_name(tmp_path, rows):
    text = f"group,iteration,total\n{rows}\n"
    (tmp_path / "losses.csv").write_text(text, encoding="utf-8", errors="surrogateescape")
    with pytest.raises(DataError, match=r"losses\.csv: damaged") as raised:
        page(tmp_path)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("name", ["report.html", "synthetic.png", "attention.png", "losses.csv", "real.png", "all.png"])
def test_a_kill_in_the_middle_of_a_file_leaves_no_part_of_it(tmp_path, monkeypatch, name):
    pixels = torch.rand(2, 1, 4, 4, generator=torch.Generator().manual_seed(3))

    def write():
        page(whole_folder(tmp_path))
        write_real_images(tmp_path / "real.png", list(pixels))
        write_sheet(tmp_path / "all.png", [("a run", pixels)])

    def replace(source, target):
        if target.name == name:
            raise KeyboardInterrupt  # the file is complete beside its place, and not yet there
        os.rename(source, target)

    write()
    before = (tmp_path / name).read_bytes()
    pixels = 1 - pixels
    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(KeyboardInterrupt):
        write()
    assert not (tmp_path / name).exists() or (tmp_path / name).read_bytes() == before
    assert not list(tmp_path.glob("*.tmp"))
