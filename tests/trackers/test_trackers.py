"""Trackers: what they are given, what each library writes, and a run whose tracker fails or is missing."""

import json

import pytest
from attrs import define
from PIL import Image
from support.runs import ITERATIONS, again, images_of

from spdfq.errors import SpdfqError
from spdfq.recipe import load_recipe
from spdfq.registry import trackers
from spdfq.runs.tracking import tracked
from spdfq.trackers import TensorBoardTracker, Tracked, Tracker, TrackioTracker, WandbTracker


@pytest.fixture
def run_of_two_steps(tmp_path):
    folder = tmp_path / "first"
    folder.mkdir()
    Image.new("L", (4, 4), 100).save(folder / "synthetic.png")
    return Tracked(
        name="first",
        folder=folder,
        recipe={"seed": 0, "model": {"name": "tiny"}},
        values={"quantized/top1": 87.5},
        curves={"total": [2.0, 1.0], "prior": [0.5, 0.25]},
        pictures={"images": folder / "synthetic.png"},
    )


def test_the_losses_of_each_step_are_those_of_the_curves(run_of_two_steps):
    assert list(run_of_two_steps.steps()) == [{"total": 2.0, "prior": 0.5}, {"total": 1.0, "prior": 0.25}]


def test_a_tracker_gets_the_results_and_the_mean_losses_of_a_run(finished):
    record = json.loads((finished.folder / "run.json").read_text())
    images = images_of(finished)
    found = tracked(finished.folder, finished.recipe, images, record)
    assert found.values["quantized/top1"] == finished.metrics["quantized"]["top1"]
    assert {"agreement", "seconds/images", "size/quantized", "fp/top1"} <= found.values.keys()
    assert set(found.curves) == set(images.columns)
    assert len(found.curves["total"]) == ITERATIONS
    assert found.curves["total"][1] == pytest.approx(float(images.curves[:, 1, images.columns.index("total")].mean()))
    assert set(found.pictures) == {"images", "attention"}
    assert json.dumps(found.recipe)


def test_tensorboard_writes_scalars_and_pictures(run_of_two_steps):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    TensorBoardTracker().track(run_of_two_steps)
    found = EventAccumulator(str(run_of_two_steps.folder / "tensorboard")).Reload()
    assert [event.value for event in found.Scalars("losses/total")] == [2.0, 1.0]
    assert found.Scalars("quantized/top1")[0].value == 87.5
    assert found.Tags()["images"] == ["images"]


def test_wandb_writes_an_offline_run_and_reaches_no_network(run_of_two_steps, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    WandbTracker().track(run_of_two_steps)
    assert len(list((run_of_two_steps.folder / "wandb").glob("offline-run-*/*.wandb"))) == 1


def test_trackio_writes_its_database(run_of_two_steps, tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # read when it is imported
    pytest.importorskip("trackio")
    TrackioTracker(project="mine").track(run_of_two_steps)
    assert [path.suffix for path in (tmp_path / "trackio").glob("mine*")]


@pytest.mark.parametrize("cls", [TensorBoardTracker, WandbTracker, TrackioTracker])
def test_a_missing_package_is_reported_before_anything_runs(cls, finished, recipe, monkeypatch):
    monkeypatch.setattr("spdfq.extras.installed", lambda package: False)
    name = trackers.name_of(cls)
    with pytest.raises(SpdfqError, match=rf"runtime.tracker: needs {name}.*pip install 'spdfq\[{name}\]'"):
        again(finished, {**recipe, "runtime": {"tracker": name}}, f"tracked-{name}")
    assert not (finished.folder.parent / f"tracked-{name}").exists()


@define(kw_only=True)
class Failing(Tracker):
    """Fails."""

    packages = ()
    extra = "none"

    def track(self, run):
        raise ConnectionError("no network")


def test_no_tracker_by_default_and_a_failing_one_costs_no_result(finished, recipe, monkeypatch):
    assert load_recipe(recipe).runtime.tracker is None
    assert "tracker" not in load_recipe(recipe).to_dict()["runtime"]
    monkeypatch.setattr(trackers, "_entries", dict(trackers._entries))
    trackers.register("failing")(Failing)
    said = []
    result = again(finished, {**recipe, "runtime": {"tracker": "failing"}}, "tracked", announce=said.append)
    assert "warning: runtime.tracker: ConnectionError: no network; the results are in the run folder" in said
    assert all(stage["reused"] for stage in result.stages.values())
    assert (result.folder / "report.html").is_file()
