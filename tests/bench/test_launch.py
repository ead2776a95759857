"""Shards as jobs of submitit's local executor, of which one is killed; and cells in processes of their own."""

import json
import os
import signal

import pytest
from PIL import Image
from support.benches import BENCH, bench_files

from spdfq.bench.launch import launch, merge_command
from spdfq.bench.merge import merge_bench
from spdfq.bench.run import run_bench
from spdfq.errors import SpdfqError

LOCAL = ['cluster="local"', "timeout_min=5"]


@pytest.fixture
def small(tmp_path):
    """A bench of two cells that each take a second."""
    for label in range(10):
        (tmp_path / f"val/{label}").mkdir(parents=True)
        Image.new("L", (28, 28), 20 * label).save(tmp_path / f"val/{label}/0.png")
    few = f"extends = ['base.toml']\nevaluation.dataset = {{ type = 'image_folder', root = '{tmp_path / 'val'}' }}"
    text = BENCH.replace("[0, 1, 2]", "[0]").replace(', "images/optimized.toml"', "")
    return bench_files(tmp_path)(text.replace('extends = ["base.toml"]', few))


def test_a_killed_shard_of_the_local_executor_is_run_again_and_merged(small, tmp_path):
    pytest.importorskip("submitit")
    out = tmp_path / "runs/bits"
    folder, jobs = launch(small, 2, out=out, options=LOCAL, arguments=["--device", "cpu"])
    os.kill(int(jobs[1].job_id), signal.SIGKILL)  # as a cluster does with a job that is over its time
    jobs[0].result()
    assert "[1/1] noise-weights.bits=3-s0: top-1" in jobs[0].stderr()
    _, _, rows = merge_bench(small, out=folder)
    assert [row.axes["quantization.weights.bits"] for row in rows] == [3]
    again = run_bench(small, out=out, device="cpu", jobs=2)  # the cell that is missing, in a process of its own
    assert (again.reused, again.failed) == (1, 0)
    lines = (out / "results.jsonl").read_text().splitlines()
    assert [json.loads(line)["axes"]["quantization.weights.bits"] for line in lines] == [3, 4]


def test_without_submitit_the_error_has_the_command_that_installs_it(small, monkeypatch):
    monkeypatch.setattr("spdfq.extras.installed", lambda package: False)
    with pytest.raises(SpdfqError, match=r"needs submitit.*pip install 'spdfq\[cluster\]'"):
        launch(small, 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["timeout_min=later"], "text needs quotes"),
        (['cluster="local"', "no_such_option=1"], "--launcher submitit: "),
        ([f"a={'[' * 2000}"], "text needs quotes"),
        (['cluster="slurm"'], "--launcher submitit: "),
    ],
)
def test_a_wrong_option_is_one_clear_error(small, tmp_path, options, message):
    pytest.importorskip("submitit")
    with pytest.raises(SpdfqError, match=message) as raised:
        launch(small, 1, out=tmp_path / "out", options=options)
    assert len(str(raised.value).splitlines()) == 1


def test_the_command_that_merges_names_the_file_and_the_folder(tmp_path):
    assert merge_command("my bench.toml", tmp_path) == f"spdfq bench merge 'my bench.toml' --out {tmp_path}"
