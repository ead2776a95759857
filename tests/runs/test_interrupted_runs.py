"""Runs that are killed, interrupted, locked out or fail: how they go on, and what they leave as it was."""

import json
import shutil
import signal
import subprocess
import sys
from contextlib import contextmanager

import pytest
import torch
from support.runs import STAGES, again, images_of, reused

from spdfq.errors import SpdfqError
from spdfq.evaluation import accuracy, predictions
from spdfq.runs.pipeline import evaluate_run, run
from spdfq.runs.store import lock_folder
from spdfq.synth import loop

KILLED = """
import json, os, signal, sys, torch
from contextlib import contextmanager
from spdfq.runs.pipeline import run
from spdfq.synth import loop
torch.set_num_threads(1)
loop.SAVE_SECONDS = 0.0
step = loop.step

def dying(groups, iteration):
    if (groups[0].index, iteration) == (1, 2):
        os.kill(os.getpid(), signal.SIGKILL)
    step(groups, iteration)

loop.step = dying
run(json.loads(sys.argv[1]), out=sys.argv[2])
"""


def test_a_killed_run_goes_on_and_ends_as_if_it_had_not_been(finished, recipe, tmp_path, monkeypatch):
    out = tmp_path / "runs/killed"
    killed = subprocess.run([sys.executable, "-c", KILLED, json.dumps(recipe), str(out)])
    assert killed.returncode == -signal.SIGKILL
    assert sorted(path.name for path in out.iterdir()) == [".lock"]
    done, step = [], loop.step

    def watched(groups, iteration):
        done.append((groups[0].index, iteration))
        step(groups, iteration)

    monkeypatch.setattr(loop, "step", watched)
    result = run(recipe, out=out)
    assert done == [(1, 2)]
    assert reused(result) == ["teacher"]
    assert torch.equal(images_of(result).images, images_of(finished).images)
    assert torch.equal(images_of(result).curves, images_of(finished).curves)
    assert result.metrics == finished.metrics
    assert not list((out.parent / ".store").glob("*/state"))


def interrupt_after(monkeypatch, batches):
    """Ctrl-C before an evaluation's next batch; gives the list of the batches that are computed, by their start."""
    computed, predict = [], accuracy._batch_by_batch

    def watched(*arguments):
        for start, found in predict(*arguments):
            if len(computed) == batches:
                raise KeyboardInterrupt
            computed.append(start)
            yield start, found

    monkeypatch.setattr(accuracy, "_batch_by_batch", watched)
    monkeypatch.setattr(predictions, "SAVE_SECONDS", 0.0)
    return computed


# batches of 4, 4 and 2 images, first for the teacher and then for the quantized model
@pytest.mark.parametrize(("batches", "rest", "kept"), [(2, [8, 0, 4, 8], []), (4, [4, 8], STAGES[:3])])
def test_an_interrupted_evaluation_goes_on_with_the_next_batch(
    finished, recipe, tmp_path, monkeypatch, batches, rest, kept
):
    store = shutil.copytree(finished.folder.parent / ".store", tmp_path / "store")
    left = set(store.glob("*/state"))  # by other tests
    again = {"out": tmp_path / "runs/x", "store": store, "overrides": ["evaluation.batch=4"]}
    interrupt_after(monkeypatch, batches)
    with pytest.raises(KeyboardInterrupt):
        run(recipe, **again)
    monkeypatch.undo()
    computed = interrupt_after(monkeypatch, None)
    result = run(recipe, **again)
    assert computed == rest
    assert reused(result) == (kept or STAGES[1:3])
    assert result.metrics == finished.metrics
    assert set(store.glob("*/state")) == left


@pytest.mark.parametrize(("batches", "rest"), [(1, [5, 0, 5]), (3, [5])])
def test_evaluating_a_run_again_goes_on_where_it_was_interrupted(finished, monkeypatch, batches, rest):
    store = finished.folder.parent / ".store"
    before = {path for path in store.rglob("*") if path.suffix != ".lock"}
    interrupt_after(monkeypatch, batches)
    with pytest.raises(KeyboardInterrupt):
        evaluate_run(finished.folder)
    monkeypatch.undo()
    computed = interrupt_after(monkeypatch, None)
    assert evaluate_run(finished.folder) == finished.metrics
    assert computed == rest
    assert {path for path in store.rglob("*") if path.suffix != ".lock"} == before, "no state is left"


def test_a_folder_that_is_being_written_is_refused_and_free_again_afterwards(finished, recipe, tmp_path):
    lock = lock_folder(tmp_path / "busy")
    with pytest.raises(SpdfqError, match="busy: another process is writing this run"):
        run(recipe, out=tmp_path / "busy", store=finished.folder.parent / ".store")
    lock.release()
    run(recipe, out=tmp_path / "busy", store=finished.folder.parent / ".store")
    lock_folder(tmp_path / "busy").release()


def test_a_run_that_fails_leaves_the_earlier_one_in_its_folder(finished, recipe):
    result = again(finished, recipe, "fails")
    before = {path: path.read_bytes() for path in result.folder.rglob("*") if path.is_file()}

    @contextmanager
    def progress(label, _):
        if label == "reconstructing":
            raise KeyboardInterrupt
        yield lambda steps=1, **values: None

    with pytest.raises(KeyboardInterrupt):
        again(finished, recipe, "fails", overrides=["quantization.weights.bits=5"], progress=progress)
    assert {path: path.read_bytes() for path in result.folder.rglob("*") if path.is_file()} == before
    lock_folder(result.folder).release()
