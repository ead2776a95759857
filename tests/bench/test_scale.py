"""Benches on several machines: shards, merging, priorities, estimates, and the log."""

import json
import threading

import pytest
from attrs import evolve
from support.benches import BENCH, bench_files, bench_row, run_record
from support.commands import spdfq

from spdfq.bench import run as bench
from spdfq.bench.estimate import seconds_of
from spdfq.bench.forecast import forecast_bench
from spdfq.bench.log import LogProgress, said_every
from spdfq.bench.merge import merge_bench
from spdfq.bench.plan import read_plan
from spdfq.bench.run import run_bench
from spdfq.errors import DataError, RecipeError, SpdfqError
from spdfq.recipe import load_recipe
from spdfq.runs import pipeline


@pytest.fixture
def write(tmp_path):
    """Write a bench file beside its parents and give its path."""
    return bench_files(tmp_path)


@pytest.fixture
def ran(monkeypatch):
    """The cells that were run; top-1 is 80 plus the seed plus ``drift``."""

    class Ran(list):
        drift = 0.0
        machine = "a processor"

    seen = Ran()

    def fake_run(recipe, *, out, **options):
        seen.append(out.name)
        out.mkdir(parents=True, exist_ok=True)
        seconds = (8.0, 2.0 * recipe.quantization.weights.bits)
        record = run_record(recipe, 80 + recipe.seed + seen.drift, seconds, seen.machine)
        (out / "run.json").write_text(json.dumps(record))

    monkeypatch.delenv("SPDFQ_STORE", raising=False)
    monkeypatch.setattr(pipeline, "run", fake_run)
    monkeypatch.setattr(pipeline, "check", lambda source, **options: load_recipe(source, **options).warnings())
    return seen


def test_shards_have_each_cell_once_and_a_file_of_their_own(write, ran, tmp_path):
    out, cells = tmp_path / "out", []
    for shard in ((1, 3), (2, 3), (3, 3)):
        result = run_bench(write(), out=out, shard=shard)
        assert len(result.rows) == 4
        cells += ran
        ran.clear()
    assert len(cells) == len(set(cells)) == 12
    assert not (out / "results.jsonl").exists()
    assert not (out / "table.md").exists()
    _, _, rows = merge_bench(write(), out=out)
    assert [row.folder for row in rows] == [row.folder for row in run_bench(write(), out=out).rows]
    assert ran == []  # the whole bench keeps what the shards have run
    assert "| noise | 3 | 99.00 | 81.00 ± 1.00 (3)" in (out / "table.md").read_text()


def test_the_command_of_a_shard_says_where_its_rows_are_and_what_to_type_next(write, ran, tmp_path):
    done = spdfq("bench", source := write(), "--out", tmp_path / "out", "--shard", "2/4", "--quiet")
    assert done.exit_code == 0, done.output
    lines = [f"lines   {tmp_path}/out/results-2-of-4.jsonl", f"then    spdfq bench merge {source} --out {tmp_path}/out"]
    assert done.stdout.splitlines() == lines


def test_a_killed_shard_runs_only_what_is_missing(write, ran, tmp_path, monkeypatch):
    fake = pipeline.run

    def killed(recipe, **options):
        if len(ran) == 2:
            raise KeyboardInterrupt
        fake(recipe, **options)

    monkeypatch.setattr(pipeline, "run", killed)
    with pytest.raises(KeyboardInterrupt):
        run_bench(write(), out=tmp_path / "out", shard=(2, 3))
    assert len((tmp_path / "out/results-2-of-3.jsonl").read_text().splitlines()) == 2
    said = []
    _, _, rows = merge_bench(write(), out=tmp_path / "out", announce=said.append)
    assert (len(rows), said) == (2, ["12 cells, 2 with a row, 0 failed"])
    monkeypatch.setattr(pipeline, "run", fake)
    assert run_bench(write(), out=tmp_path / "out", shard=(2, 3)).reused == 2


def two_machines(write, ran, tmp_path, drift):
    run_bench(write(), out=tmp_path / "one")
    ran.drift, ran.machine = drift, "another processor"
    run_bench(write(), out=tmp_path / "two")
    return write(), [tmp_path / "one", tmp_path / "two"]


def test_rows_that_agree_are_merged_and_lead_to_their_runs(write, ran, tmp_path):
    source, folders = two_machines(write, ran, tmp_path, 0.0)
    _, folder, rows = merge_bench(source, folders, out=tmp_path / "merged")
    assert len(rows) == 12
    assert (folder / rows[0].folder / "run.json").resolve().is_file()


def test_rows_of_a_cell_that_disagree_are_refused_and_named_with_both_machines(write, ran, tmp_path):
    source, folders = two_machines(write, ran, tmp_path, 0.5)
    with pytest.raises(SpdfqError) as raised:
        merge_bench(source, folders, out=tmp_path / "merged")
    lines = str(raised.value).splitlines()
    assert len(lines) == 12 + 1
    assert "top-1 80.0 on a processor (float32), but 80.5 on another processor (float32)" in lines[0]
    assert not (tmp_path / "merged").exists()
    done = spdfq("bench", "merge", source, *folders, "--out", tmp_path / "merged", "--prefer-first")
    assert done.exit_code == 0, done.output
    assert done.stderr.count("warning: ") == 12
    assert "81.00 ± 1.00 (3)" in done.stdout


def test_rows_of_other_code_are_not_mixed(write, ran, tmp_path, monkeypatch):
    run_bench(write(), out=tmp_path / "one")
    monkeypatch.setattr(bench, "code_digests", lambda *_: {"images": "edited"})
    run_bench(write(), out=tmp_path / "two")
    with pytest.raises(SpdfqError, match="depend on different code, data, weights or versions"):
        merge_bench(write(), [tmp_path / "one", tmp_path / "two"], out=tmp_path / "merged")


def test_a_folder_without_rows_and_rows_of_other_cells_are_told(write, ran, tmp_path):
    with pytest.raises(DataError, match="out: has no rows of a bench"):
        merge_bench(write(), out=tmp_path / "out")
    run_bench(write(), out=tmp_path / "out")
    said = []
    merge_bench(write(BENCH.replace("[3, 4]", "[3, 5]")), out=tmp_path / "out", announce=said.append)
    assert "6 rows are of no cell" in said[0]


def test_the_cells_named_first_run_first(write, ran, tmp_path):
    text = BENCH.replace("schema = 1", 'schema = 1\nfirst = [{ images = "optimized", seed = 2 }, { seed = 1 }]')
    result = run_bench(write(text), out=tmp_path / "out")
    assert ran[:2] == ["optimized-weights.bits=3-s2", "optimized-weights.bits=4-s2"]
    assert {name[-2:] for name in ran[2:6]} == {"s1"}
    assert result.rows[0].folder == "cells/noise-weights.bits=3-s0"  # the order of the table does not change


def test_a_pattern_that_no_cell_can_match_is_an_error(write):
    text = BENCH.replace("schema = 1", 'schema = 1\nfirst = [{ source = "a" }, { images = "b" }, {}]')
    with pytest.raises(RecipeError) as raised:
        read_plan(write(text))
    assert [problem.partition(":")[0] for problem in raised.value.problems] == ["first.0", "first.1", "first.2"]


def test_a_key_with_one_value_is_no_column_and_not_in_names(write, ran, tmp_path):
    result = run_bench(write(BENCH + '"evaluation.batch" = [7]\n'), out=tmp_path / "out")
    assert [axis.name for axis in result.plan.axes] == ["images", "quantization.weights.bits"]
    assert ran[0] == "noise-weights.bits=3-s0"
    assert all(c.data["evaluation"]["batch"] == 7 for c in result.plan.combinations)


def test_a_dry_run_writes_nothing_and_estimates_from_the_rows_that_are_there(write, ran, tmp_path):
    out = tmp_path / "out"
    done = spdfq("bench", write(), "--out", out, "--dry-run")
    assert done.exit_code == 0, done.output
    assert done.stdout.splitlines()[-1] == "0 cells reused, 12 to run; time not known: no row is finished"
    assert (ran, out.exists()) == ([], False)
    run_bench(write(), out=out)
    found = forecast_bench(write(BENCH.replace("[0, 1, 2]", "[0, 1, 2, 3]")), out=out, jobs=2)
    assert found.reused == 12
    assert found.to_run["noise-weights.bits=3-s3"] == 8.0 + 6.0
    assert found.seconds == (2 * 14.0 + 2 * 16.0) / 2
    assert len(ran) == 12


def test_a_reused_stage_counts_with_the_seconds_of_the_rows_that_computed_it():
    def row(bits, seconds, reused):
        return evolve(bench_row({"bits": bits}, 0, 80.0), stages={"images": {"seconds": seconds, "reused": reused}})

    assert seconds_of({"bits": 3}, [row(3, 0.1, True), row(4, 60.0, False)]) == 60.0
    assert seconds_of({"bits": 3}, [evolve(row(3, 1.0, False), error="no", metrics=None)]) is None


def test_the_log_names_the_running_cell_and_its_stage():
    progress, said, spoken = LogProgress(), [], threading.Event()

    def say(line):
        said.append(line)
        spoken.set()

    with said_every(0.01, progress.line, say):
        assert not spoken.wait(0.05)  # nothing runs yet
        progress.cell("noise-s0")
        progress.stage(2, 4, "images", None, None)
        with progress("making images", 10) as advance:
            advance(3)
            spoken.clear()
            said.clear()
            assert spoken.wait(10)
    assert said[0].startswith("noise-s0, stage 2 of 4, images: making images 3/10, 0:0")


def test_merge_without_a_file_says_what_is_missing():
    done = spdfq("bench", "merge")
    assert done.exit_code == 2
    assert "merge needs the bench file" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shard", "3/2"], "expected i/n"),
        (["--launcher", "submitit"], "--launcher needs --shards"),
        (["another.toml"], "one bench file at a time"),
    ],
)
def test_wrong_arguments_of_the_command_are_refused(write, arguments, message):
    done = spdfq("bench", write(), *arguments)
    assert done.exit_code == 2
    assert message in done.stderr
