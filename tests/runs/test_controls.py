"""Controls: the same teacher and back-end on other images, beside a run's own row."""

import json

import pytest
from PIL import Image
from support.runs import STAGES, again, reused

from spdfq.errors import RecipeError, SpdfqError
from spdfq.recipe import load_recipe
from spdfq.runs.pipeline import check, run

NOISE = {"gaussian_noise": {"images": 2}}


@pytest.fixture(scope="module")
def controlled(finished, recipe):
    """The finished run once more, with noise and two real images as controls."""
    real = {"type": "real", "images": 2, "dataset": {"type": "fashion_mnist", "split": "train"}}
    return again(finished, {**recipe, "controls": {**NOISE, "photos": real}}, "controlled")


def test_a_control_has_its_own_stages_and_shares_the_teachers(controlled):
    controls = [f"{name}: {stage}" for name in ("gaussian_noise", "photos") for stage in STAGES[1:]]
    assert list(controlled.stages) == [*STAGES, *controls]
    assert reused(controlled) == STAGES  # controls have no part in the run's own stages


def test_a_control_gives_what_a_run_on_its_images_gives(controlled, finished, recipe):
    alone = again(finished, {**recipe, "synthesis": {"type": "gaussian_noise", "images": 2}}, "alone")
    assert controlled.controls["gaussian_noise"] == alone.metrics
    assert reused(alone) == STAGES  # the control's stages serve the run


def test_the_record_and_the_recipe_of_the_folder_keep_the_controls(controlled):
    record = json.loads((controlled.folder / "run.json").read_text())
    assert [(row["name"], row["type"], row["count"]) for row in record["controls"]] == [
        ("gaussian_noise", "gaussian_noise", 2),
        ("photos", "real", 2),
    ]
    assert {row["name"]: row["metrics"] for row in record["controls"]} == controlled.controls
    assert load_recipe(str(controlled.folder / "recipe.toml")).controls == controlled.recipe.controls
    assert record["size"]["float"] > 5 * record["size"]["quantized"] > 0


def test_the_stages_are_counted_over_the_whole_run(finished, recipe, tmp_path):
    said, begun = [], []

    class Progress:
        def stage(self, number, count, name, expected, later):
            begun.append((number, count, name, later is None))

        def __call__(self, description, total):
            from spdfq.runtime import silent

            return silent(description, total)

    changed = {**recipe, "controls": NOISE, "seed": 5}
    run(changed, out=tmp_path / "run", progress=Progress(), announce=said.append)
    assert [(number, count) for number, count, _, _ in begun] == [(number, 7) for number in range(1, 8)]
    assert [name for _, _, name, unknown in begun if unknown] == STAGES[:3]  # until the back-end has run once
    assert said[-2].startswith("stage 7 of 7, gaussian_noise: evaluate: ")


def test_mistakes_in_a_control_are_reported_with_its_name(recipe):
    with pytest.raises(RecipeError, match=r"^controls\.gaussian_nois: unknown source 'gaussian_nois'; did you mean"):
        load_recipe({**recipe, "controls": {"gaussian_nois": {}}})
    with pytest.raises(RecipeError, match=r"^controls\.gaussian_noise\.image: unknown key; did you mean 'images'\?"):
        load_recipe({**recipe, "controls": {"gaussian_noise": {"image": 2}}})
    student = {"type": "optimize", "losses": {"attention_prior": {}}, "pruning": {}}
    with pytest.raises(RecipeError, match=r"^controls\.pruned"):
        check({**recipe, "model": {"name": "bundled:swin_fmnist"}, "controls": {"pruned": student}})


def test_calibrating_a_control_on_the_images_of_the_evaluation_is_a_warning(recipe, photos, tmp_path):
    said = []
    real = {"type": "real", "images": 2, "dataset": {"type": "image_folder", "root": str(photos)}}
    run({**recipe, "controls": {"photos": real}}, out=tmp_path / "run", announce=said.append)
    assert any(line.startswith("warning: controls.photos.dataset: 10 of its images are evaluation") for line in said)


def test_an_empty_table_drops_the_controls_of_the_extended_recipe():
    assert list(load_recipe("quickstart").controls) == ["gaussian_noise", "real", "natural_noise"]
    assert load_recipe({"extends": ["quickstart"], "controls": {}}).controls == {}
    assert list(load_recipe({"extends": ["quickstart"], "controls": {"gaussian_noise": {"images": 4}}}).controls) == [
        "gaussian_noise",
        "real",
        "natural_noise",
    ]


def test_a_control_gets_the_checks_and_the_advice_of_a_source(recipe):
    student = {"type": "optimize", "losses": {"teacher_student_discrepancy": {}}, "student": {}, "target": "none"}
    budget = {**recipe["quantization"], "budget": {"weights": 4.0}}
    with pytest.raises(RecipeError, match=r"quantization\.budget: needs finished images, but controls\.v2\.student"):
        load_recipe({**recipe, "quantization": budget, "controls": {"v2": student}})
    hard = {"type": "optimize", "sampler": "multi_semantic", "target": "one_hot", "losses": {"cross_entropy": {}}}
    assert any(line.startswith("controls.hard: ") for line in check({**recipe, "controls": {"hard": hard}}))


def test_damaged_images_of_a_control_are_reported(recipe, tmp_path):
    said, folder = [], tmp_path / "images" / "a"
    folder.mkdir(parents=True)
    for index in range(3):
        Image.new("L", (28, 28), 40 * index).save(folder / f"{index}.png")
    (folder / "2.png").write_bytes(b"damaged")
    dataset = {"type": "image_folder", "root": str(tmp_path / "images")}
    changed = {**recipe, "controls": {"photos": {"type": "real", "images": 2, "dataset": dataset}}}
    result = run(changed, out=tmp_path / "run", announce=said.append)
    damaged = "a/2.png (not an image format that Pillow knows)"
    told = f"controls.photos.dataset: 1 image cannot be read and is left out: {damaged}"
    record = json.loads((result.folder / "run.json").read_text())
    assert f"warning: {told}" in said
    assert told in record["warnings"]
    assert record["controls"][0]["damaged"] == [damaged]


def test_a_control_that_fails_is_named_and_the_runs_own_result_is_kept(recipe, photos, tmp_path):
    dataset = {"type": "image_folder", "root": str(photos), "limit": 5}
    real = {"type": "real", "images": 40, "dataset": dataset}
    with pytest.raises(SpdfqError, match=r"^controls\.photos\.images: 40 asked for, but the dataset holds 5"):
        run({**recipe, "controls": {"photos": real}}, out=tmp_path / "run")
    record = json.loads((tmp_path / "run/run.json").read_text())
    assert (record["controls"], record["metrics"]["images"]) == ([], 10)
    assert (tmp_path / "run/report.html").exists()
