"""A finished run measured again, on its own images or on others."""

import json
import shutil

import pytest
from support.runs import again

from spdfq.errors import DataError, RecipeError
from spdfq.runs.inspection import measure_runs
from spdfq.runs.pipeline import check, evaluate_run


def test_evaluating_a_run_again_gives_its_metrics(finished):
    assert evaluate_run(finished.folder) == finished.metrics


def test_a_run_can_be_evaluated_on_other_images(finished, photos, tmp_path):
    copied = shutil.copytree(photos, tmp_path / "photos")
    for label in "012":
        (copied / label / "0.png").unlink()
    assert evaluate_run(str(finished.folder), overrides=[f"evaluation.dataset.root='{copied}'"])["images"] == 7


def test_classes_that_may_be_in_another_order_are_told(finished, photos, recipe, tmp_path):
    copied = shutil.copytree(photos, tmp_path / "photos")
    for label in range(10):
        for number in range(1, 5):
            shutil.copy(copied / f"{label}/0.png", copied / f"{label}/{number}.png")
    change, said = [f"evaluation.dataset.root='{copied}'"], []
    assert evaluate_run(finished.folder, overrides=change, announce=said.append)["fp"]["top1"] >= 80
    assert said == check(recipe, overrides=change) == []
    for label in range(10):
        (copied / str(label)).rename(copied / f"c{label + 2}")
    (line,) = check(recipe, overrides=change)
    assert line.startswith("evaluation.dataset: class 0 is c2 in natural order, and c10 in the order of characters")
    assert evaluate_run(finished.folder, overrides=change, announce=said.append)["fp"]["top1"] >= 80
    assert said == [f"warning: {line}"]
    order = [f"c{label}" for label in (10, 11, *range(2, 10))]
    change.append(f"evaluation.dataset.class_order={order}")
    assert check(recipe, overrides=change) == []
    metrics = evaluate_run(finished.folder, overrides=change, announce=said.append)
    assert metrics["fp"]["top1"] <= 30
    assert "in a different order than the model's" in said[1]
    assert again(finished, recipe, "wrong", overrides=change, announce=said.append).metrics == metrics
    record = json.loads((finished.folder.parent / "wrong/run.json").read_text())
    assert [f"warning: {line}" for line in record["warnings"]] == [said[1]]
    (copied / "c5").rename(copied / "c55")
    with pytest.raises(RecipeError, match=r"class_order: lacks c55; name every class at its place"):
        check(recipe, overrides=change)


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
