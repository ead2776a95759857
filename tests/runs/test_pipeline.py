"""A recipe from end to end: what a run leaves in its folder, what it says, and its stages as functions."""

import csv
import html
import json
import os
import re
import shutil
import tomllib
from pathlib import Path

import pytest
import torch
from attrs import evolve
from support.runs import IMAGES, ITERATIONS, STAGES, again, images_of, reused
from support.teachers import tiny_teacher

import spdfq
from spdfq.errors import DataError, RecipeError, SpdfqError
from spdfq.quantized.checkpoint import save_quantized
from spdfq.recipe import digest, load_recipe
from spdfq.runs.checks import checked_teacher
from spdfq.runs.inspection import measure_runs
from spdfq.runs.pipeline import check, evaluate_run, run
from spdfq.runtime import pick_precision
from spdfq.teacher import load_teacher

# the run folder


def test_a_run_leaves_these_files_and_no_others(finished):
    found = {str(path.relative_to(finished.folder)) for path in finished.folder.rglob("*") if path.is_file()}
    assert found - {".lock"} == {
        *("recipe.toml", "run.json", "sites.json", "losses.csv", "report.html"),
        *("synthetic.safetensors", "synthetic.png", "attention.png", "real.png"),
        *("site_noise.json", "image_classes.json", "explained.json"),
        *("quantized/model.safetensors", "quantized/config.json"),
    }


def test_a_notebook_shows_a_result_as_its_report(finished):
    shown = finished._repr_html_()
    (page,) = re.findall(r'^<iframe srcdoc="([^"<>]+)" title="Report of [^"]+" style="[^"]+"></iframe>$', shown)
    assert html.unescape(page) == (finished.folder / "report.html").read_text(encoding="utf-8")


def test_a_notebook_shows_plain_text_if_the_report_is_gone(finished):
    assert evolve(finished, folder=finished.folder / "gone")._repr_html_() is None


def test_measures_of_the_images_that_were_there_before_are_gone_after_a_run(finished, recipe):
    again(finished, recipe, "measured")
    measures = finished.folder.parent / "measured" / "measures.json"
    measures.write_text("{}")
    again(finished, recipe, "measured")
    assert not measures.exists()


def test_pictures_and_losses_of_an_earlier_run_do_not_stay(finished, recipe):
    again(finished, recipe, "replaced")
    noise = {**recipe, "extends": [*recipe["extends"][:1], "images/gaussian_noise", recipe["extends"][2]]}
    noise["synthesis"] = {"images": 2}
    result = again(finished, noise, "replaced")
    assert images_of(result).images.shape == (2, 1, 28, 28)
    names = {path.name for path in result.folder.iterdir()}
    assert not {"losses.csv", "attention.png"} & names
    assert {"synthetic.png", "report.html"} <= names


def test_the_losses_are_a_table_of_every_iteration(finished):
    with open(finished.folder / "losses.csv", newline="") as handle:
        rows = list(csv.DictReader(handle))
    losses = {"attention_prior", "soft_cross_entropy", "total_variation", "total", "gradient"}
    assert losses <= set(rows[0])
    assert len(rows) == 2 * ITERATIONS
    assert all(float(row[name]) >= 0 for row in rows for name in losses)


def test_run_json_says_what_was_run_and_what_came_of_it(finished, recipe):
    record = json.loads((finished.folder / "run.json").read_text())
    assert record["metrics"] == finished.metrics
    assert record["stages"] == finished.stages
    assert list(record["stages"]) == STAGES
    assert record["name"] == "first"
    assert record["recipe_digest"] == digest(load_recipe(recipe).to_dict())
    assert record["model"] == {
        **{"name": "bundled:vit_fmnist", "parameters": 678_730, "input_size": [1, 28, 28], "num_classes": 10},
        **{"mean": [0.286], "std": [0.353], "fingerprint": load_teacher(finished.recipe.model).fingerprint()},
        "class_names": [str(label) for label in range(10)],  # those of the folders
    }
    parts = load_recipe(recipe).to_dict()
    own = {"digest": digest(parts["synthesis"])}
    assert record["images"] == {"type": "optimize", "count": IMAGES, "damaged": [], **own}
    steps, own = ["calibrate", "blockwise"], {"digest": digest(parts["quantization"])}
    expected = {"label": "W4A4", "percent_in_float": 0.0, "placement": "matmul_inputs", "steps": steps, **own}
    assert record["backend"] == expected
    assert record["peak_memory"] > 1e8
    assert (record["device"], record["threads"], record["seed"]) == ("cpu", 1, 0)
    assert record["precision"] == pick_precision("auto", torch.device("cpu"))
    assert record["versions"]["torch"] == torch.__version__


def test_threads_are_the_runs_own_and_its_files_are_for_all_to_read(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "environ", os.environ | {"SPDFQ_STORE": str(tmp_path / "store")})
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        result = run(recipe, overrides=["runtime.threads=1"], out=tmp_path / "out")
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert json.loads((result.folder / "run.json").read_text())["threads"] == 1
    mode = (result.folder / "quantized/model.safetensors").stat().st_mode
    assert mode & 0o777 == (result.folder / "run.json").stat().st_mode & 0o777


def test_threads_are_the_callers_own_whatever_is_called(finished, recipe, tmp_path):
    teacher, before, one = spdfq.load_teacher("bundled:vit_fmnist"), torch.get_num_threads(), ["runtime.threads=1"]
    calls = [
        lambda: spdfq.synthesize(teacher, recipe, overrides=one),
        lambda: spdfq.quantize(teacher, torch.zeros(1, 1, 28, 28), recipe, overrides=one),
        lambda: evaluate_run(finished.folder, overrides=one),
        lambda: measure_runs([finished.folder], overrides=one),
    ]
    try:
        for call in calls:
            torch.set_num_threads(2)
            call()
            assert torch.get_num_threads() == 2
        with pytest.raises(SpdfqError, match="no nowhere device"):
            run(recipe, overrides=one, device="nowhere", out=tmp_path / "out")
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_the_metrics_are_those_of_the_saved_model(finished, photos):
    model = spdfq.load_quantized(finished.folder / "quantized")
    teacher = spdfq.load_teacher("bundled:vit_fmnist")
    batches = list(finished.recipe.evaluation.dataset.batches(teacher, 10))
    assert len(batches) == 1
    pixels, labels, _ = batches[0]
    with torch.no_grad():
        ours, theirs = model(pixels).argmax(1), teacher.module(pixels).argmax(1)
    assert finished.metrics["images"] == 10
    assert finished.metrics["simulated"] is True
    assert finished.metrics["quantized"]["top1"] == pytest.approx(100 * (ours == labels).float().mean().item())
    assert finished.metrics["fp"]["top1"] == pytest.approx(100 * (theirs == labels).float().mean().item())
    assert finished.metrics["agreement"] == pytest.approx(100 * (ours == theirs).float().mean().item())
    assert finished.metrics["fp"]["top1"] > 70


def test_sites_json_lists_every_site_and_every_parameter(finished):
    table = json.loads((finished.folder / "sites.json").read_text())
    model = spdfq.load_quantized(finished.folder / "quantized")
    notes = table.pop("notes")  # of the steps; a checkpoint has none
    assert notes == ["blockwise: patch_embed.proj.weight, head.weight: not learned, outside of the blocks"]
    assert table == model.site_table()
    bits = {row["name"]: row["bits"] for row in table["quantized"]}
    assert {bits["patch_embed.proj.weight"], bits["head.input"]} == {8}
    assert bits["blocks.5.attn.softmax"] == 4
    assert sum(row["parameters"] for row in table["float"]) + sum(
        torch.Size(row["shape"]).numel() for row in table["quantized"] if row["kind"] == "weight"
    ) == sum(parameter.numel() for parameter in model.network.parameters())


def test_the_resolved_recipe_of_the_folder_runs_to_the_same_digest(finished, recipe):
    path = finished.folder / "recipe.toml"
    assert "extends" not in tomllib.loads(path.read_text())
    assert load_recipe(path).to_dict() == load_recipe(recipe).to_dict()
    result = again(finished, path, "from-its-recipe")
    assert reused(result) == STAGES
    assert digest(result.recipe.to_dict()) == digest(finished.recipe.to_dict())


# names and warnings


def test_the_default_folder_is_named_after_the_recipe_and_its_changes(finished, recipe, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    store = finished.folder.parent / ".store"
    (tmp_path / "mine.toml").write_text((finished.folder / "recipe.toml").read_text())
    folders = [
        run(source, overrides=overrides, seed=seed, store=store).folder
        for source, overrides, seed in (
            ("mine.toml", (), None),
            ("mine.toml", ["runtime.threads=1"], None),
            (Path("mine.toml"), (), 0),
            (recipe, (), None),
        )
    ]
    short = digest(finished.recipe.to_dict())[:6]
    changed = digest(load_recipe("mine.toml", ["runtime.threads=1"]).to_dict())[:6]
    names = ["mine", f"mine-{changed}", f"mine-{short}", f"recipe-{short}"]
    assert run("runs/mine/recipe.toml", store=store).folder == Path("runs/mine")
    assert folders == [Path("runs") / name for name in names]


def test_a_run_of_another_recipe_is_not_replaced_without_a_word(finished, recipe, tmp_path):
    folder, said = tmp_path / "run", []
    shutil.copytree(finished.folder, folder)
    store = finished.folder.parent / ".store"
    run(folder / "recipe.toml", out=folder, store=store, announce=said.append)
    assert not [line for line in said if "replaces" in line]
    run(recipe, out=folder, store=store, overrides=["runtime.threads=1"], announce=said.append)
    assert f"{folder}: the run of another recipe was here; this run replaces it" in said


def test_a_damaged_model_in_the_store_is_not_handed_on(finished, recipe, tmp_path):
    store = shutil.copytree(finished.folder.parent / ".store", tmp_path / ".store")
    stored = store / f"quantize-{finished.stages['quantize']['key']}" / "quantized" / "model.safetensors"
    stored.write_bytes(stored.read_bytes()[:-1])
    with pytest.raises(DataError, match=r"quantize-.*this finished stage is damaged \(.*truncated.*use --fresh"):
        run(recipe, out=tmp_path / "run")
    assert not (tmp_path / "run" / "quantized").exists()


def test_a_recipe_of_ones_own_is_not_overwritten(finished, tmp_path):
    (tmp_path / "recipe.toml").write_text((finished.folder / "recipe.toml").read_text())
    with pytest.raises(RecipeError, match=r"recipe.toml: the run's own recipe.toml would replace it"):
        run(tmp_path / "recipe.toml", out=tmp_path)


def test_calibrating_on_the_images_of_the_evaluation_is_told(finished, recipe, photos):
    real = {**recipe, "extends": ["models/vit_fmnist", "backends/blockwise"]}
    real["synthesis"] = {"type": "real", "images": 2, "dataset": {"type": "image_folder", "root": str(photos)}}
    result = run(real, out=finished.folder.parent / "real")
    (line,) = json.loads((result.folder / "run.json").read_text())["warnings"]
    assert line.startswith("synthesis.dataset: 10 of its images are evaluation.dataset's too, the first of them ")


def test_real_images_of_another_task_are_told(recipe, photos, tmp_path):
    for name in ("0", "1"):
        shutil.copytree(photos / name, tmp_path / "two" / name)
    own = {"type": "image_folder", "root": str(tmp_path / "two")}
    real = {"type": "real", "images": 2}
    two = {
        **recipe,
        "model": {"name": "vit_tiny_patch16_224", "pretrained": False, "num_classes": 2, "img_size": 32},
        "evaluation": {"dataset": own},
        "controls": {
            "clothes": {**real, "dataset": {"type": "fashion_mnist", "split": "train"}},
            "own": {**real, "dataset": own},
        },
    }
    found = [line for line in checked_teacher(load_recipe(two))[1] if "classes" in line]
    assert found == [
        "controls.clothes.dataset: has 10 classes, vit_tiny_patch16_224 knows 2; give images that the model is meant "
        "for, or leave this source out"
    ]


def test_warnings_are_announced_and_kept(finished, recipe):
    said = []
    changes = ["synthesis.target='one_hot'", "synthesis.images=1"]
    result = again(finished, recipe, "warned", overrides=changes, announce=said.append)
    line = "synthesis: multi_semantic without soft labels is known to lose accuracy; set target = 'soft_label'"
    assert said[0] == f"warning: {line}"
    assert sum(told.startswith("synthesis: about ") for told in said) == 1  # the memory
    assert json.loads((result.folder / "run.json").read_text())["warnings"] == [line]
    assert check(recipe, overrides=changes) == [line]


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("steps=['blockwise']", "nothing chooses the ranges of activations and weights; put { type = 'calibrate' }"),
        (
            "steps=[{ type = 'calibrate', sites = 'weights' }]",
            "quantization.steps: nothing chooses the ranges of activations",
        ),
        (
            "steps=[{ type = 'calibrate', sites = 'activations' }, 'ridge', { type = 'calibrate', sites = 'weights' }]",
            "ranges of weights;",
        ),
        ("steps=['ridge', 'calibrate']", "quantization.steps.0: nothing chooses the ranges of"),
        ("steps=['distill', 'calibrate']", "quantization.steps.0: nothing chooses the ranges of"),
        ("steps=['adalog']", "quantization.steps.0: nothing chooses the ranges of"),
        ("steps=['calibrate', 'ptf']", "quantization.steps.1: ptf: no residual sum is quantized; set"),
        ("steps=['calibrate', { type = 'repq', part = 'fold' }]", "quantization.steps.1: repq: nothing to fold; put"),
        ("weights='log2'", "quantization.weights: 'log2' takes no negative values; weights need one that does"),
        (
            "weights={ type = 'uniform', granularity = 'channel', axis = 5 }",
            "of shape [96, 1, 4, 4] has no axis 5, but 0 to 3",
        ),
        ("activations={ type = 'uniform', granularity = 'channel', axis = 9 }", "has no axis 9, but 0 to 3"),
    ],
)
def test_a_back_end_that_cannot_work_is_refused_before_anything_is_computed(override, problem):
    with pytest.raises(RecipeError) as refused:
        check("quickstart", overrides=[f"quantization.{override}"])
    (line,) = refused.value.problems
    assert problem in line


def test_a_failed_run_leaves_no_empty_folder(recipe, tmp_path):
    with pytest.raises(SpdfqError):
        run(recipe, out=tmp_path / "run", overrides=["quantization.activations='log2'"])
    assert not (tmp_path / "run").exists()


def test_a_part_and_a_bench_file_are_no_recipes(tmp_path):
    with pytest.raises(RecipeError) as refused:
        check("images/spdfq")
    assert refused.value.problems[0].startswith("images/spdfq: is only a part of a recipe; name it under")
    (tmp_path / "bench.toml").write_text("seeds = [1]\n[parents]\nimages = ['images/spdfq']")
    with pytest.raises(RecipeError, match="this is a bench file, not a recipe; 'spdfq bench' runs it"):
        check(tmp_path / "bench.toml")


def test_check_needs_neither_weights_nor_data(recipe):
    assert (
        check(recipe, overrides=["model.checkpoint='nowhere.safetensors'", "evaluation.dataset.root='nowhere'"]) == []
    )
    with pytest.raises(RecipeError, match=r"quantization.overrides.0.sites: 'stages.\*' matches no quantized site"):
        check(recipe, overrides=["quantization.overrides=[{sites=['stages.*'], bits=8}]"])
    assert check("quickstart") == []


def test_what_is_wrong_is_told_before_anything_is_written(recipe, tmp_path):
    wrong = {
        "quantization.overrides=[{sites=['blocks.9.*'], bits=8}]": (RecipeError, "overrides.0.sites: 'blocks.9"),
        "evaluation.dataset.root='nowhere'": (DataError, "nowhere: no such folder"),
        "quantization.weights.bits=1": (RecipeError, "quantization.weights.bits"),
        "runtime.device='cuda'": (SpdfqError, "this machine has no cuda device"),
    }
    if torch.cuda.is_available():
        wrong.popitem()
    for override, (error, message) in wrong.items():
        with pytest.raises(error, match=message):
            run(recipe, out=tmp_path / "runs/x", overrides=[override])
    assert not list(tmp_path.iterdir())


# the stages as functions


def test_images_and_a_quantized_model_for_a_module_of_ones_own(tmp_path):
    teacher = tiny_teacher()
    changes = [f"synthesis.images={IMAGES}", "synthesis.iterations=3", "quantization.overrides=[]"]
    images = spdfq.synthesize(teacher, "quickstart", overrides=changes, seed=5)
    assert images.shape == (IMAGES, 3, 16, 16)
    assert images.dtype == torch.float32
    assert torch.equal(images, spdfq.synthesize(teacher, "quickstart", overrides=[*changes, "seed=5"]))
    assert not torch.equal(images, spdfq.synthesize(teacher, "quickstart", overrides=changes))
    low, high = teacher.pixel_range(images)
    assert ((images >= low - 1e-6) & (images <= high + 1e-6)).all()
    before = {name: value.clone() for name, value in teacher.module.state_dict().items()}
    model = spdfq.quantize(teacher, images, "quickstart", overrides=changes)
    assert model(images).shape == (IMAGES, 5)
    assert {quantizer.bits for quantizer in model.quantizers.values()} == {3}
    assert all(torch.equal(value, before[name]) for name, value in teacher.module.state_dict().items())
    with pytest.raises(RecipeError, match=r"overrides.0.roles: TinyViT does not say which module is 'first'"):
        spdfq.quantize(teacher, images, "quickstart")
    save_quantized(model, tmp_path, teacher)
    assert torch.equal(spdfq.load_quantized(tmp_path, tiny_teacher().module)(images), model(images))
