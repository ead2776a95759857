"""The rows in benchmarks/results, and the conversion of older ones."""

import json
import sys

import pytest
from support.docs import ROOT

from spdfq.bench.rows import read_rows
from spdfq.errors import SpdfqError

sys.path.insert(0, str(ROOT / "tools"))

import convert_rows

FILES = sorted((ROOT / "benchmarks" / "results").glob("*.jsonl"))
CELL = {
    "axes": {"images": "gaussian_noise"},
    "seed": 0,
    "error": None,
    "metrics": {
        "images": 500,
        "fp": {"top1": 84.8, "top5": 99.6},
        "quantized": {"top1": 25.8},
        "agreement": 25,
        "simulated": True,
    },
    "stages": {"teacher": {"seconds": 27.371, "reused": True, "key": "477b7a9f810da0e2cd2b"}},
    "seconds": 259.849,
    "model": "vit_small_patch14_dinov2",
    "backend": {"label": "W4A4", "placement": "matmul_inputs", "steps": ["calibrate", "blockwise"]},
    **{"device": "cpu", "device_name": "AMD EPYC, 2 cores", "precision": "float32", "git_commit": None},
    "versions": {"torch": "2.14.1"},
}
INTEGERS = {
    **{"model": "vit_fmnist", "backend": "w8a8", "images": "images/spdfq_plus", "seed": 0, "test_images": 2000},
    **{"fp": 90.8, "simulated": 91.2, "size": 802454},
    "measured": [
        {
            **{"runtime": "onnxruntime", "version": "1.32.0", "images": 2000, "top1": 91.3, "simulated_top1": 91.2},
            **{"agreement": 99.5, "products": 38, "integer_products": 38, "float_products": []},
        }
    ],
    "machine": {"device": "a processor", "threads": 1, "versions": {}, "commit": "c"},
}
TRIAL = {"idea": "`strong`", "images": "spdfq_plus", "seed": 0, "test_images": 500, "top1": 87.4, "divergence": 0.1}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_row_is_as_the_schema_says(path):
    assert read_rows(path)


def convert(path, *lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    convert_rows.main([str(path)])
    return read_rows(path)


def test_old_rows_of_every_kind_are_converted_and_what_they_do_not_know_is_null(tmp_path):
    path = tmp_path / "real_vit_112_strong_tries.jsonl"
    cell, simulated, measured, trial = convert(path, CELL, INTEGERS, TRIAL)
    assert (cell.top1, cell.model.name, cell.seconds) == (25.8, "vit_small_patch14_dinov2", 259.849)
    assert (cell.model.fingerprint, cell.threads, cell.measured.test_images, cell.measured.correct) == (None,) * 4
    assert (simulated.top1, simulated.measured.simulated, simulated.integer_file) == (91.2, True, None)
    assert (measured.top1, measured.measured.simulated, measured.integer_file.agreement) == (91.3, False, 99.5)
    assert measured.measured.agreement is None  # with the float model: it was not recorded
    assert (trial.top1, trial.measured.divergence, trial.measured.fp.top1) == (87.4, 0.1, None)


def test_a_second_conversion_changes_nothing_and_new_old_rows_are_added(tmp_path):
    path = tmp_path / "rows.jsonl"
    convert(path, CELL)
    once = path.read_text()
    convert_rows.main([str(path)])
    assert path.read_text() == once
    path.write_text(once + json.dumps({**CELL, "seed": 1}) + "\n")  # as another branch appends it
    convert_rows.main([str(path)])
    assert path.read_text().startswith(once)
    assert [row.seed for row in read_rows(path)] == [0, 1]


def test_a_row_of_an_unknown_kind_is_refused_and_the_file_stays(tmp_path):
    path = tmp_path / "rows.jsonl"
    with pytest.raises(SystemExit, match=r"rows.jsonl, line 2: a row with the fields top1 is of no known kind"):
        convert(path, CELL, {"top1": 1})
    assert json.loads(path.read_text().splitlines()[0]) == CELL
    with pytest.raises(SpdfqError, match="no known kind"):
        convert_rows.converted(TRIAL, "another_file")
