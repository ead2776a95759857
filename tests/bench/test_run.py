"""Running benches: cells that are run, kept or fail, and the table."""

import json
import statistics

import pytest
from click.testing import CliRunner
from PIL import Image
from spdfq_cli.main import main
from support.benches import BENCH, bench_files, run_record
from support.recipes import NO_IMAGES

from spdfq.bench import run as bench
from spdfq.bench.rows import read_rows
from spdfq.bench.run import run_bench
from spdfq.errors import DataError, SpdfqError
from spdfq.recipe import load_recipe
from spdfq.runs import pipeline, provenance
from spdfq.runs.store import lock_folder
from spdfq.runtime.ranks import Ranks


@pytest.fixture
def write(tmp_path):
    """Write a bench file beside its parents and give its path."""
    return bench_files(tmp_path)


def record(recipe):
    """A result whose top-1 is 80 for noise and 90 for optimised images, plus the bits, plus the seed."""
    images = 90 if type(recipe.synthesis).__name__ == "OptimizedImages" else 80
    return run_record(recipe, images + recipe.quantization.weights.bits + recipe.seed)


@pytest.fixture
def ran(monkeypatch):
    """The cells the pipeline was asked for; it writes nothing but ``run.json``, and fails on the seeds in ``fail``."""

    class Ran(list):
        def __init__(self):
            self.fail = {}

    seen = Ran()
    monkeypatch.delenv("SPDFQ_STORE", raising=False)

    def fake_run(recipe, *, out, **options):
        seen.append((out.name, recipe, options))
        if recipe.seed in seen.fail:
            raise seen.fail[recipe.seed]
        out.mkdir(parents=True, exist_ok=True)
        (out / "run.json").write_text(json.dumps(record(recipe)))

    monkeypatch.setattr(pipeline, "run", fake_run)
    monkeypatch.setattr(pipeline, "check", lambda source, **options: load_recipe(source, **options).warnings())
    return seen


def test_every_cell_is_run_with_one_store_and_its_own_seed(write, ran, tmp_path):
    result = run_bench(write(), out=tmp_path / "runs" / "bits", device="cpu")
    assert len(ran) == 12
    assert {options["store"] for _, _, options in ran} == {tmp_path / "runs" / ".store"}
    assert {options["device"] for _, _, options in ran} == {"cpu"}
    assert [(name, recipe.seed) for name, recipe, _ in ran[:3]] == [(f"noise-weights.bits=3-s{s}", s) for s in range(3)]
    assert (result.reused, result.failed) == (0, 0)


def test_results_are_one_line_of_json_for_each_cell(write, ran, tmp_path):
    result = run_bench(write(), out=tmp_path / "out")
    rows = [json.loads(line) for line in (tmp_path / "out/results.jsonl").read_text().splitlines()]
    assert read_rows(tmp_path / "out/results.jsonl") == result.rows
    assert rows[4]["axes"] == {"images": "noise", "quantization.weights.bits": 4}
    assert (rows[4]["seed"], rows[4]["error"], rows[4]["seconds"]) == (1, None, 4.0)
    assert rows[4]["metrics"]["quantized"]["top1"] == 80 + 4 + 1


def test_the_table_gives_mean_and_sample_deviation_over_the_seeds(write, ran, tmp_path):
    run_bench(write(), out=tmp_path / "out")
    text = (tmp_path / "out/table.md").read_text()
    caption, table = text.split("\n\n")
    assert table.splitlines() == [
        "| images | weights.bits | FP top-1 | quantized top-1 | agreement | seconds |",
        "| --- | --- | ---: | ---: | ---: | ---: |",
        "| noise | 3 | 99.00 | 84.00 ± 1.00 (3) | 75.00 | 4.0 |",
        "| noise | 4 | 99.00 | 85.00 ± 1.00 (3) | 75.00 | 4.0 |",
        "| optimized | 3 | 99.00 | 94.00 ± 1.00 (3) | 75.00 | 4.0 |",
        "| optimized | 4 | 99.00 | 95.00 ± 1.00 (3) | 75.00 | 4.0 |",
    ]
    assert statistics.stdev([83, 84, 85]) == 1.0
    for said in (
        "simulated",
        "bundled:vit_fmnist",
        "matmul_inputs",
        "cpu (a processor, float32, 1 thread)",
        "50 images",
    ):
        assert said in caption


def test_one_seed_has_no_deviation(write, ran, tmp_path):
    run_bench(write(BENCH.replace("[0, 1, 2]", "[0]")), out=tmp_path / "out")
    assert "| noise | 3 | 99.00 | 83.00 (1) | 75.00 | 4.0 |" in (tmp_path / "out/table.md").read_text()


def test_a_second_call_runs_nothing_and_says_so(write, ran, tmp_path):
    first = run_bench(write(), out=tmp_path / "out")
    table = (tmp_path / "out/table.md").read_text()
    ran.clear()
    said = []
    again = run_bench(write(), out=tmp_path / "out", announce=said.append)
    assert (ran, again.rows, again.reused) == ([], first.rows, 12)
    assert said[0] == "12 cells planned, 12 reused, 0 to run"
    assert said[-1] == "0 stages in the cells that ran: 0 reused, 0 run"
    assert said[1] == "[1/12] noise-weights.bits=3-s0: top-1 99.00 -> 83.00 in 4.0 s (reused)"
    assert (tmp_path / "out/table.md").read_text() == table


def test_a_widened_axis_or_a_changed_base_runs_what_is_missing_only(write, ran, tmp_path):
    run_bench(write(), out=tmp_path / "out")
    ran.clear()
    run_bench(write(BENCH.replace("[3, 4]", "[3, 4, 5]")), out=tmp_path / "out")
    assert [name.partition("-")[2] for name, _, _ in ran] == [f"weights.bits=5-s{seed}" for seed in range(3)] * 2
    ran.clear()
    (tmp_path / "base.toml").write_text(NO_IMAGES.replace('"log2", bits = 4', '"log2", bits = 3'))
    assert run_bench(write(), out=tmp_path / "out").reused == 0


def test_a_renamed_axis_keeps_its_results(write, ran, tmp_path):
    run_bench(write(), out=tmp_path / "out")
    result = run_bench(write(BENCH.replace("images = [", "source = [")), out=tmp_path / "out")
    assert result.reused == 12
    assert "| source | weights.bits | FP" in (tmp_path / "out/table.md").read_text()
    assert "not run yet" not in (tmp_path / "out/table.md").read_text()


def test_a_cell_whose_folder_is_gone_is_run_again(write, ran, tmp_path):
    run_bench(write(), out=tmp_path / "out")
    ran.clear()
    (tmp_path / "out/cells/optimized-weights.bits=3-s2/run.json").unlink()
    assert run_bench(write(), out=tmp_path / "out").reused == 11
    assert [name for name, _, _ in ran] == ["optimized-weights.bits=3-s2"]


def test_a_row_of_another_precision_is_not_kept(write, ran, tmp_path, monkeypatch):
    monkeypatch.setattr("spdfq.runtime.runtime._fast_bfloat16", lambda device: False)
    run_bench(write(), out=tmp_path / "out")
    monkeypatch.setattr("spdfq.runtime.runtime._fast_bfloat16", lambda device: True)
    assert run_bench(write(), out=tmp_path / "out").reused == 0


def test_damaged_results_are_one_clear_error(write, ran, tmp_path):
    run_bench(write(), out=tmp_path / "out")
    (tmp_path / "out/results.jsonl").write_text('{"axes": ')
    with pytest.raises(DataError, match=r"results.jsonl, line 1: not JSON; .* or remove the file"):
        run_bench(write(), out=tmp_path / "out")


def test_rows_of_an_older_version_are_measured_again_and_that_is_said(write, ran, tmp_path):
    run_bench(write(), out=tmp_path / "out")
    path, said = tmp_path / "out/results.jsonl", []
    old = [{key: value for key, value in json.loads(line).items() if key != "schema"} for line in path.open()]
    path.write_text("".join(json.dumps(row) + "\n" for row in old))
    assert run_bench(write(), out=tmp_path / "out", announce=said.append).reused == 0
    assert said[0] == f"warning: {path.parent}: has rows of an older version; their cells are measured again"


def test_a_bench_folder_says_what_its_rows_are_compared_with(write, ran, tmp_path):
    text = BENCH.replace("[0, 1, 2]", "[0]") + '[baseline]\naxis = "images"\nvalue = "noise"\n'
    run_bench(write(text), out=tmp_path / "out")
    found = json.loads((tmp_path / "out/bench.json").read_text())
    assert found == {"gap": None, "baseline": {"axis": "images", "value": "noise"}}


def test_a_checkpoint_that_is_not_there_is_one_clear_error(write, ran, tmp_path):
    text = BENCH.replace('extends = ["base.toml"]', 'extends = ["base.toml"]\nmodel.checkpoint = "gone.safetensors"')
    with pytest.raises(DataError, match=r"^model.checkpoint: gone.safetensors: no such file"):
        run_bench(write(text), out=tmp_path / "out")


def test_the_files_of_a_model_in_a_folder_are_part_of_the_key(tmp_path):
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_text("{}")
    recipe = load_recipe({"extends": ["quickstart"], "model": {"name": f"local-dir:{tmp_path}"}})
    keys = {bench.result_key(recipe)}
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_text("other")
        keys.add(bench.result_key(recipe))
    assert len(keys) == 3


def test_several_processes_are_refused(write, ran, tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "join", lambda: Ranks(rank=1, count=2))
    with pytest.raises(SpdfqError, match="start it without torchrun"):
        run_bench(write(), out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_bench_that_another_process_is_writing_is_refused(write, ran, tmp_path):
    lock = lock_folder(tmp_path / "out")
    with pytest.raises(SpdfqError, match="out: another process is writing this"):
        run_bench(write(), out=tmp_path / "out")
    lock.release()
    assert run_bench(write(), out=tmp_path / "out").failed == 0


def test_a_failing_cell_is_recorded_and_the_rest_goes_on(write, ran, tmp_path):
    ran.fail = {0: SpdfqError("loss: is not finite\ntry less"), 1: ZeroDivisionError("by zero")}
    result = run_bench(write(), out=tmp_path / "out")
    assert (len(ran), result.failed) == (12, 8)
    assert result.rows[0].error == "loss: is not finite; try less"
    assert result.rows[1].error.startswith("ZeroDivisionError: by zero (traceback in cells/noise-weights.bits=3-s1/")
    assert "in fake_run" in (tmp_path / "out/cells/noise-weights.bits=3-s1/error.txt").read_text()
    text = (tmp_path / "out/table.md").read_text()
    assert "| noise | 3 | 99.00 | 85.00 (1) | 75.00 | 4.0 |" in text
    assert "- cells/noise-weights.bits=3-s0: loss: is not finite; try less\n" in text
    ran.clear()
    ran.fail = {}
    assert run_bench(write(), out=tmp_path / "out").reused == 4
    assert len(ran) == 8


def test_an_interrupted_bench_keeps_what_is_finished(write, ran, tmp_path):
    ran.fail = {1: KeyboardInterrupt()}
    with pytest.raises(KeyboardInterrupt):
        run_bench(write(), out=tmp_path / "out")
    ran.fail = {}
    assert "| noise | 4 |  | not run yet |  |  |" in (tmp_path / "out/table.md").read_text()
    assert run_bench(write(), out=tmp_path / "out").reused == 1


def test_all_recipes_are_checked_before_the_first_runs(write, ran, tmp_path):
    text = BENCH.replace("[3, 4]", "[3, 11]") + '"evaluation.batc" = [1]\n"synthesis.iterations" = [2]\n'
    result = CliRunner().invoke(main, ["bench", write(text), "--out", str(tmp_path / "out")])
    assert result.exit_code == 2
    assert ran == []
    lines = [line.removeprefix("error: ") for line in result.stderr.splitlines()]
    assert [line.split(": ")[:2] for line in sorted(lines)] == [
        ["every cell", "evaluation.batc"],
        ["noise-weights.bits=11 and 1 more", "quantization.weights.bits"],
        ["noise-weights.bits=3 and 1 more", "synthesis.iterations"],
    ]


def test_the_command_prints_the_table_and_exits_with_1_after_a_failure(write, ran, tmp_path):
    arguments = ["bench", write(), "--out", str(tmp_path / "out")]
    done = CliRunner().invoke(main, arguments)
    assert done.exit_code == 0
    assert "84.00 ± 1.00 (3)" in done.stdout
    assert done.stderr.startswith("12 cells planned, 0 reused, 12 to run\n[1/12] noise-")
    ran.fail = {5: SpdfqError("no")}
    failed = CliRunner().invoke(
        main, [*arguments[:1], write(BENCH.replace("[0, 1, 2]", "[0, 5]")), *arguments[2:], "--json", "--quiet"]
    )
    assert (failed.exit_code, failed.stderr) == (1, "")
    assert [cell["error"] for cell in json.loads(failed.stdout)["cells"]] == [None, "no"] * 4
    again = CliRunner().invoke(main, [*arguments, "--quiet"])
    assert again.exit_code == 1
    assert again.stderr.splitlines()[0] == "failed: cells/noise-weights.bits=3-s5: no"


def test_results_of_code_that_was_edited_since_are_not_kept(write, ran, tmp_path, monkeypatch):
    run_bench(write(), out=tmp_path / "out")
    monkeypatch.setattr(bench, "code_digests", lambda *_: {"images": "edited"})
    assert run_bench(write(), out=tmp_path / "out").reused == 0


@pytest.mark.parametrize(("name", "kept"), [("psaq_vit_v2", False), ("psaq_vit", True)])
def test_a_row_depends_on_the_student_that_helped_to_make_its_images(name, kept, monkeypatch):
    recipe = load_recipe(name)
    before, normalised = bench.result_key(recipe), provenance._normalised
    student = "spdfq.backends.quantized_student"
    monkeypatch.setattr(provenance, "_normalised", lambda name: normalised(name) + " edited" * (name == student))
    assert (bench.result_key(recipe) == before) == kept


def test_the_store_can_be_elsewhere(write, ran, tmp_path, monkeypatch):
    monkeypatch.setenv("SPDFQ_STORE", str(tmp_path / "elsewhere"))
    run_bench(write(), out=tmp_path / "out")
    assert {options["store"] for _, _, options in ran} == {tmp_path / "elsewhere"}


def test_a_bench_really_runs_and_its_cells_share_their_stages(write, tmp_path):
    for label in range(10):
        (tmp_path / f"val/{label}").mkdir(parents=True)
        Image.new("L", (28, 28), 20 * label).save(tmp_path / f"val/{label}/0.png")
    few = f"extends = ['base.toml']\nevaluation.dataset = {{ type = 'image_folder', root = '{tmp_path / 'val'}' }}"
    text = BENCH.replace("[0, 1, 2]", "[0]").replace(', "images/optimized.toml"', "")
    text = text.replace('extends = ["base.toml"]', few)
    said = []
    result = run_bench(write(text), out=tmp_path / "runs/bits", device="cpu", announce=said.append)
    assert [row.error for row in result.rows] == [None, None]
    reused = [[name for name, stage in row.stages.items() if stage["reused"]] for row in result.rows]
    assert reused == [[], ["teacher", "images"]]
    assert said[-1] == "8 stages in the cells that ran: 2 reused, 6 run"
    assert run_bench(write(text), out=tmp_path / "runs/bits").rows == result.rows
