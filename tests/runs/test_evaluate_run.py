"""A finished run measured again, on its own images or on others."""

import shutil

import pytest

from spdfq.errors import DataError, RecipeError
from spdfq.runs.inspection import measure_runs
from spdfq.runs.pipeline import evaluate_run


def test_evaluating_a_run_again_gives_its_metrics(finished):
    assert evaluate_run(finished.folder) == finished.metrics


def test_a_run_can_be_evaluated_on_other_images(finished, photos, tmp_path):
    copied = shutil.copytree(photos, tmp_path / "photos")
    for label in "012":
        (copied / label / "0.png").unlink()
    assert evaluate_run(str(finished.folder), overrides=[f"evaluation.dataset.root='{copied}'"])["images"] == 7


def test_a_finished_run_is_not_changed_by_evaluating_it(finished):
    with pytest.raises(RecipeError) as raised:
        evaluate_run(finished.folder, overrides=["quantization.weights.bits=3", "evaluation.batch=4", "seed=2"])
    assert raised.value.problems == [
        "--set quantization.weights.bits=3: cannot change a finished run; run its recipe.toml again",
        "--set seed=2: cannot change a finished run; run its recipe.toml again",
    ]


def test_a_run_whose_model_is_another_since_is_refused(finished, tmp_path):
    folder = shutil.copytree(finished.folder, tmp_path / "run")
    recipe = (folder / "recipe.toml").read_text()
    (folder / "recipe.toml").write_text(recipe.replace("vit_fmnist", "swin_fmnist"))
    for call in (evaluate_run, lambda path: measure_runs([path])):
        with pytest.raises(DataError, match=r"run: recipe.toml or the weights have changed"):
            call(folder)


def test_a_folder_that_is_no_run_is_named(tmp_path):
    with pytest.raises(RecipeError, match="not a run folder"):
        evaluate_run(tmp_path)
