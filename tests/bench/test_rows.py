"""Result rows: what is checked when they are read, and the row of a run."""

import json
from pathlib import Path

import attrs
import pytest
from support.benches import bench_row

from spdfq.bench.rows import Row, checked_row, read_rows, row_of_run, write_rows
from spdfq.errors import DataError


def one(**changes):
    return {**bench_row({"images": "noise"}, 0, 50.0).to_dict(), **changes}


def test_rows_come_back_as_they_were_written(tmp_path):
    rows = [bench_row({"images": "noise", "quantization.weights.bits": 3}, seed, 50.0) for seed in (0, 1)]
    write_rows(tmp_path / "rows.jsonl", rows)
    assert read_rows(tmp_path / "rows.jsonl") == rows


def test_what_is_not_known_is_null_in_the_file():
    data = one()
    assert data["threads"] is None
    assert data["backend"]["percent_in_float"] is None
    assert set(data) == {field.name for field in attrs.fields(Row)}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"seed": "0"}, "seed: expected a whole number, got '0'"),
        ({"schema": 2}, "schema: 'schema' must be in (1,)"),
        ({"sede": 1}, "sede: unknown key; did you mean 'seed'?"),
        ({"model": None}, "model: is required"),
        ({"metrics": None}, "a row has either metrics or an error"),
        ({"error": "no"}, "a row has either metrics or an error"),
        ({"metrics": {"images": 5}}, "metrics.fp: is required (and 2 more)"),
        ({"threads": -1}, "threads: 'threads' must be >= 0"),
        ({"stages": {"images": 3}}, "stages.images: expected its seconds and whether it was reused"),
    ],
)
def test_a_wrong_row_is_one_line_with_its_place(tmp_path, changes, said):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(one()) + "\n" + json.dumps(one(**changes)) + "\n")
    with pytest.raises(DataError) as raised:
        read_rows(path)
    assert str(raised.value).startswith(f"{path}, line 2: {said}")
    assert "\n" not in str(raised.value)


def test_a_percentage_above_100_is_refused():
    data = one()
    data["metrics"]["quantized"]["top1"] = 101.0
    with pytest.raises(DataError, match=r"metrics.quantized.top1: 'top1' must be <= 100"):
        checked_row(data, "row")


def test_a_row_without_a_schema_is_an_older_one(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"axes": {}}\n')
    with pytest.raises(DataError, match=r"line 1: a row of an older version; python tools/convert_rows.py"):
        read_rows(path)


def test_a_missing_file_is_one_line():
    with pytest.raises(DataError, match=r"nowhere.jsonl: cannot be read"):
        read_rows(Path("nowhere.jsonl"))


@pytest.mark.parametrize(
    ("content", "said"), [(b"\xff\n", "rows.jsonl: damaged (UnicodeDecodeError: "), (b"[" * 100_000, "not JSON")]
)
def test_a_file_that_is_no_text_or_nested_too_deeply_is_one_line(tmp_path, content, said):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    with pytest.raises(DataError) as raised:
        read_rows(path)
    assert said in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_record_of_an_older_run_is_refused():
    with pytest.raises(DataError, match=r"run.json: has no 'peak_memory'; run the recipe again"):
        row_of_run({"seed": 0, "model": {"name": "m", "fingerprint": "f"}, "stages": {}, "images": {}, "backend": {},
                    "metrics": {}})  # fmt: skip


def test_a_row_of_a_failed_cell_has_no_top1():
    row = checked_row({"seed": 0, "model": {"name": "m"}, "error": "no", "folder": "cells/a"}, "row")
    with pytest.raises(DataError, match=r"cells/a: failed \(no\)"):
        _ = row.top1
