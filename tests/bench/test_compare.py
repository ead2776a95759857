"""Comparing runs and benches: groups, intervals, refusals, and keys that differ."""

import json
import re

import numpy as np
import pytest
from click.testing import CliRunner
from spdfq_cli.main import main
from support.benches import bench_row

from spdfq.bench.compare import compare
from spdfq.bench.rows import write_rows
from spdfq.errors import DataError, SpdfqError

RECIPE = """
seed = {seed}
[synthesis]
type = "{source}"
images = 4
[quantization]
weights.bits = 3
"""
GAP = {"axis": "images", "floor": "noise", "ceiling": "real"}


def hits(share, seed, images=2000):
    return np.random.default_rng(3).random(images) + 0.002 * seed < share


@pytest.fixture
def a_run(tmp_path):
    """Write the folder of a run, as far as a comparison reads it."""

    def write(name, source, seed, share, **changes):
        row = bench_row({"images": source}, seed, None, hits=hits(share, seed)).to_dict()
        record = {
            **{key: row[key] for key in ("seed", "device", "device_name", "precision", "metrics")},
            "model": {"name": "bundled:vit_fmnist", "fingerprint": "m"},
            "images": {"type": source, "count": 4, "damaged": [], "digest": source},
            "backend": {"label": "W3A3", "placement": "matmul_inputs", "steps": ["calibrate"], "digest": "b"},
            **{"stages": {}, "peak_memory": None, "threads": 1, "versions": {}, "git_commit": None},
            "recipe_digest": f"{source}{seed}",
            **changes,
        }
        folder = tmp_path / name
        folder.mkdir()
        (folder / "run.json").write_text(json.dumps(record))
        (folder / "recipe.toml").write_text(RECIPE.format(seed=seed, source=source))
        return folder

    return write


@pytest.fixture
def a_bench(tmp_path):
    """Write the folder of a bench with rows of the given sources, and its gap and baseline."""

    def write(name, shares, backend="repq", digest="b", gap=None, baseline=None, bits=True):
        rows = []
        for source, share in shares.items():
            for seed in (0, 1):
                given = hits(share, seed) if bits else None
                data = bench_row({"images": source}, seed, 100 * share + seed, hits=given).to_dict()
                data["images"]["digest"], data["backend"]["digest"] = (source, digest) if digest else (None, None)
                rows.append(data)
        folder = tmp_path / name
        folder.mkdir()
        (folder / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (folder / "bench.json").write_text(json.dumps({"gap": gap, "baseline": baseline}))
        return folder

    return write


def cells(found, heading):
    return {line[0]: line[found.table.headings.index(heading)] for line in found.table.rows}


def test_runs_that_differ_in_their_seed_alone_are_one_row(a_run):
    folders = [a_run(f"{source}-s{seed}", source, seed, share) for source, share in (("noise", 0.5), ("real", 0.8))
               for seed in (0, 1, 2)]  # fmt: skip
    found = compare(folders)
    assert [line[0] for line in found.table.rows] == ["noise", "real"]
    assert re.fullmatch(r"\+\d+\.\d \[\d+\.\d, \d+\.\d\]", cells(found, "over noise")["real"])
    assert found.table.best == [False, True]
    assert "Bold" in found.caption


def test_another_row_can_be_what_the_others_are_compared_with(a_run):
    folders = [a_run("noise", "noise", 0, 0.5), a_run("real", "real", 0, 0.8)]
    found = compare(folders, over_label="real")
    assert cells(found, "over real")["noise"].startswith("-29.7 [")
    assert cells(found, "over real")["noise"].endswith("(images only)")
    assert found.table.best == [False, False]  # one seed supports no best row
    with pytest.raises(SpdfqError, match="--over x: is not among noise, real"):
        compare(folders, over_label="x")


def test_keys_in_which_recipes_differ_are_shown_side_by_side(a_run):
    found = compare([a_run("noise", "noise", 0, 0.5), a_run("real", "real", 1, 0.8), a_run("more", "real", 0, 0.7)])
    assert [(each.key, each.values) for each in found.keys] == [
        ("synthesis.type", {"noise": '"noise"', "real": '"real"'})
    ]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model": {"name": "bundled:vit_fmnist", "fingerprint": "n"}}, "quantize different models"),
        ({"model": {"name": "other", "fingerprint": "n"}}, "(other n and bundled:vit_fmnist m)"),
    ],
)
def test_runs_of_different_models_are_refused_in_one_line(a_run, changes, said):
    folders = [a_run("noise", "noise", 0, 0.5), a_run("real", "real", 0, 0.8, **changes)]
    result = CliRunner().invoke(main, ["compare", *map(str, folders)])
    assert result.exit_code == 2
    (line,) = result.stderr.splitlines()
    assert said in line


def test_runs_on_different_test_images_are_refused_in_one_line(a_run):
    noise, real = a_run("noise", "noise", 0, 0.5), a_run("real", "real", 0, 0.8)
    record = json.loads((real / "run.json").read_text())
    record["metrics"]["test_images"] = "u"
    (real / "run.json").write_text(json.dumps(record))
    with pytest.raises(SpdfqError, match=r"real and noise: were measured on different test images \(2000 images u and"):
        compare([noise, real])


@pytest.mark.parametrize(
    ("known", "said"),
    [
        (
            {"bank_images": "v", "bank": 30},
            r"real and noise: sought neighbours among different images \(30 images v and",
        ),
        (
            {"precision": "bfloat16"},
            r"one is top-1, simulated, in bfloat16 and one top-1, simulated, in float32; compare",
        ),
    ],
)
def test_runs_with_another_bank_or_precision_of_the_evaluation_are_refused_in_one_line(a_run, known, said):
    noise, real = a_run("noise", "noise", 0, 0.5), a_run("real", "real", 0, 0.8)
    for folder, more in ((noise, {"bank_images": "u", "bank": 40, "precision": "float32"}), (real, known)):
        record = json.loads((folder / "run.json").read_text())
        record["metrics"] |= more
        (folder / "run.json").write_text(json.dumps(record))
    with pytest.raises(SpdfqError, match=said):
        compare([noise, real])


def test_an_older_run_is_refused_with_its_folder(a_run):
    noise, real = a_run("noise", "noise", 0, 0.5), a_run("real", "real", 0, 0.8)
    record = json.loads((real / "run.json").read_text())
    del record["threads"]
    (real / "run.json").write_text(json.dumps(record))
    with pytest.raises(DataError, match=r"real: run.json: has no 'threads'; run the recipe again"):
        compare([noise, real])


def test_runs_without_a_seed_in_common_have_no_interval_and_that_is_said(a_run):
    found = compare([a_run("noise", "noise", 0, 0.5), a_run("real", "real", 1, 0.8)])
    assert cells(found, "over noise")["real"] == ""
    assert found.table.notes == ["real: no interval; it shares no seed with noise."]


def test_several_benches_share_a_gap_and_a_baseline(a_bench):
    baseline = {"axis": "images", "value": "psaq"}
    first = a_bench("first", {"noise": 0.4, "psaq": 0.6, "real": 0.8}, gap=GAP, baseline=baseline)
    second = a_bench("second", {"mine": 0.7})
    found = compare([first, second])
    assert round(float(cells(found, "gap closed")["mine"].removesuffix("%"))) in range(72, 79)
    assert cells(found, "over psaq")["mine"].startswith("+")
    assert found.table.best == [False, False, False, True]


def test_benches_that_differ_in_more_than_the_images_are_not_compared(a_bench):
    baseline = {"axis": "images", "value": "psaq"}
    first = a_bench("first", {"noise": 0.4, "psaq": 0.6, "real": 0.8}, gap=GAP, baseline=baseline)
    found = compare([first, a_bench("second", {"mine": 0.7}, digest="another back-end")])
    assert (cells(found, "gap closed")["mine"], cells(found, "over psaq")["mine"]) == ("", "")
    assert "mine: no bench has psaq with the same back-end or images." in found.table.notes


def test_benches_with_different_gaps_are_refused(a_bench):
    first = a_bench("first", {"noise": 0.4, "real": 0.8}, gap=GAP)
    second = a_bench("second", {"mine": 0.7}, gap={**GAP, "floor": "zero"})
    with pytest.raises(SpdfqError, match=r"the benches have different \[gap\] tables"):
        compare([first, second])


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("bench.json", b'{"gap": nul', "damaged (JSONDecodeError: "),
        ("bench.json", b"[]", "damaged (expected an object, got [])"),
        ("bench.json", b"\xff", "damaged (UnicodeDecodeError: "),
        ("bench.json", b"[" * 100_000, "damaged (RecursionError: "),
        ("bench.json", b'{"gap": 5}', "gap: expected a table, got 5"),
        ("results.jsonl", b"\xff", "damaged (UnicodeDecodeError: "),
    ],
)
def test_a_damaged_file_of_a_bench_is_one_line_with_its_name(a_bench, name, content, said):
    folder = a_bench("first", {"noise": 0.4, "real": 0.8})
    (folder / name).write_bytes(content)
    result = CliRunner().invoke(main, ["compare", str(folder)])
    assert result.exit_code == 2
    (line,) = result.stderr.splitlines()
    assert line.startswith(f"error: {folder / name}: {said}")


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("run.json", "{", "damaged (JSONDecodeError: "),
        ("run.json", "[]", "damaged (expected an object, got [])"),
        ("run.json", "{}", "damaged (it is empty)"),
        ("recipe.toml", "seed = ", "not valid TOML: "),
        ("recipe.toml", "[model]\nname = 2026-01-01\n", "damaged (TypeError: a date is not a recipe value)"),
    ],
)
def test_a_damaged_file_of_a_run_is_one_line_with_its_name(a_run, name, content, said):
    noise, real = a_run("noise", "noise", 0, 0.5), a_run("real", "real", 0, 0.8)
    (real / name).write_text(content)
    result = CliRunner().invoke(main, ["compare", str(noise), str(real)])
    assert result.exit_code == 2
    (line,) = result.stderr.splitlines()
    assert line.startswith(f"error: {real / name}: {said}")


def test_rows_without_per_image_results_say_so(a_bench, tmp_path):
    folder = a_bench("old", {"noise": 0.4, "real": 0.8}, digest=None, bits=False)
    found = compare([folder / "results.jsonl"])
    assert cells(found, "over noise")["real"] == "+40.0 [40.0, 40.0] (seeds only)"
    assert found.table.notes == ["No per-image results in noise, real: intervals over the seeds only."]
    assert found.table.best == [False, False]
    assert found.recipes_missing == ["noise", "real"]


def test_the_same_cell_twice_is_refused_with_both_numbers(a_bench):
    first, second = a_bench("first", {"noise": 0.4}), a_bench("second", {"noise": 0.5, "real": 0.6})
    with pytest.raises(SpdfqError, match=r"noise: seed 0 is given twice \(top-1 4\d\.\d+ and 5\d\.\d+, the second in "):
        compare([first, second])


@pytest.mark.parametrize(
    ("names", "said"),
    [
        ([], "Missing argument"),
        (["gone"], "gone: no such folder; give the folder of a finished run or of a bench"),
        (["noise"], "only one kind of result, noise; give at least two"),
        (["noise", "bench"], "noise is a run and "),
    ],
)
def test_what_cannot_be_compared_is_one_line(a_run, a_bench, tmp_path, names, said):
    a_run("noise", "noise", 0, 0.5)
    a_bench("bench", {"noise": 0.4, "real": 0.8})
    result = CliRunner().invoke(main, ["compare", *(str(tmp_path / name) for name in names)])
    assert (result.exit_code, said in result.stderr) == (2, True)


def test_the_command_prints_the_table_the_keys_or_json(a_run):
    folders = [str(a_run("noise", "noise", 0, 0.5)), str(a_run("real", "real", 0, 0.8))]
    printed = CliRunner().invoke(main, ["compare", *folders])
    assert printed.exit_code == 0
    assert "synthesis.type" in printed.stdout
    data = json.loads(CliRunner().invoke(main, ["compare", *folders, "--json"]).stdout)
    assert data["recipes"] == {"synthesis.type": {"noise": '"noise"', "real": '"real"'}}
    assert data["rows"][1]["difference"]["images"] == 2000


def test_many_recipes_are_shown_as_the_rows_that_share_a_value(a_run):
    folders = [str(a_run(f"r{index}", f"source{index % 2}{index // 4}", index, 0.5)) for index in range(5)]
    folders += [str(a_run(f"t{index}", f"other{index}", 0, 0.5)) for index in range(3)]
    printed = CliRunner().invoke(main, ["compare", *folders])
    assert 'synthesis.type: "source00" (r0); "source10" (r1)' in printed.stdout


def test_a_file_of_rows_is_a_bench(a_bench, tmp_path):
    write_rows(tmp_path / "rows.jsonl", [bench_row({"images": name}, seed, None, hits=hits(share, seed))
                                         for name, share in (("a", 0.5), ("b", 0.6)) for seed in (0, 1)])  # fmt: skip
    assert cells(compare([tmp_path / "rows.jsonl"]), "over a")["b"].startswith("+")
