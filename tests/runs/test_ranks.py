"""Two processes on one recipe give what one gives."""

import atexit
import json
import subprocess
import sys
from functools import partial

import pytest
import torch.distributed as dist
from safetensors.torch import load_file
from support.commands import spdfq

from spdfq.runtime.ranks import Ranks, join

RECIPE = """
extends = ["models/vit_fmnist", "images/spdfq", "backends/blockwise"]
[synthesis]
images = 4
group = 2
iterations = 3
[evaluation]
batch = 16
dataset = { type = "fashion_mnist", split = "test", limit = 40 }
[runtime]
threads = 1
"""


def arguments(folder):
    """Those of ``spdfq`` for one run of the recipe."""
    folder.parent.mkdir()
    (folder.parent / "two.toml").write_text(RECIPE)
    short = ["--set", "quantization.steps.1.iterations=1", "--quiet", "--fresh"]
    return ["run", str(folder.parent / "two.toml"), "--out", str(folder), *short]


def found(folder):
    """The images and metrics of a run."""
    facts = json.loads((folder / "run.json").read_text())
    return load_file(folder / "synthetic.safetensors"), facts["metrics"]


def test_torchrun_with_two_processes_gives_the_images_and_accuracy_of_one(tmp_path):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "spdfq"]
    command = [*torchrun, *arguments(tmp_path / "shared" / "run")]
    both = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert both.returncode == 0, both.stderr[-2000:]
    one = spdfq(*arguments(tmp_path / "alone" / "run"))
    assert one.exit_code == 0, one.output
    alone, metrics = found(tmp_path / "alone" / "run")
    shared, shared_metrics = found(tmp_path / "shared" / "run")
    assert all(alone[name].equal(shared[name]) for name in alone)
    assert shared_metrics == metrics
    assert metrics["images"] == 40
    assert both.stdout.count("top-1") == 1, "only the first process speaks"


@pytest.mark.parametrize("count", [1, 2, 3])
def test_every_item_is_done_by_one_process(count):
    items = list(range(7))
    shares = [Ranks(rank, count).share(items) for rank in range(count)]
    assert sorted(item for share in shares for item in share) == items
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_the_group_ends_before_the_interpreter_does(monkeypatch):
    """Without it gloo's threads now and then aborted a process that had done its work (pytorch/pytorch#179291)."""
    at_exit = []
    begin = partial(dist.init_process_group, store=dist.HashStore(), rank=0, world_size=1)
    monkeypatch.setattr(dist, "init_process_group", begin)
    monkeypatch.setattr(atexit, "register", at_exit.append)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    try:
        join()
        assert dist.is_initialized()
        join()
        (leave,) = at_exit
        leave()
        assert not dist.is_initialized()
        leave()
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def test_without_torchrun_a_process_is_alone(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert join() == Ranks(0, 1)
    assert Ranks().gathered("x") == ["x"]
    assert Ranks().first(lambda: 3) == 3
