"""A recipe from end to end: what a run leaves, what it takes from earlier ones, and how it goes on after a kill."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import tomllib
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_teacher import tiny_teacher

import spdfq
from spdfq import evaluate, predictions, provenance
from spdfq.checkpoint import save_quantized
from spdfq.errors import DataError, RecipeError, SpdfqError
from spdfq.pipeline import check, evaluate_run, run
from spdfq.recipe import digest, load_recipe
from spdfq.runtime import pick_precision
from spdfq.store import lock_folder
from spdfq.synth import SyntheticImages, loop
from spdfq.zoo import data_file

IMAGES, ITERATIONS = 2, 3
STAGES = ["teacher", "images", "quantize", "evaluate"]
STEPS = [
    {"type": "calibrate", "observer": "minmax", "weight_observer": "minmax"},
    {"type": "blockwise", "iterations": 1, "lr": 1e-3},
]


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """A test image of each class, in folders."""
    root = tmp_path_factory.mktemp("photos")
    stored = load_file(data_file("fmnist_test.safetensors"))
    for label in range(10):
        (root / str(label)).mkdir()
        pixels = stored["images"][stored["labels"] == label][0]
        Image.fromarray(pixels.squeeze().numpy()).save(root / str(label) / "0.png")
    return root


@pytest.fixture(scope="module")
def recipe(photos):
    return {
        "extends": ["models/vit_fmnist", "images/spdfq", "backends/blockwise"],
        "synthesis": {"images": IMAGES, "group": 1, "iterations": ITERATIONS},
        "quantization": {"steps": STEPS},
        "evaluation": {"dataset": {"type": "image_folder", "root": str(photos)}, "batch": 5},
    }


@pytest.fixture(scope="module", autouse=True)
def own_store():
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("SPDFQ_STORE", raising=False)
        yield


@pytest.fixture(scope="module")
def finished(recipe, tmp_path_factory):
    """A finished run; its store is shared by the tests of this file."""
    return run(recipe, out=tmp_path_factory.mktemp("project") / "runs/first")


def again(finished, recipe, name, **options):
    """Another run beside the first."""
    return run(recipe, out=finished.folder.parent / name, **options)


def reused(result):
    return [name for name, stage in result.stages.items() if stage["reused"]]


def images_of(result):
    return SyntheticImages.load(result.folder / "synthetic.safetensors")


# the run folder


def test_a_run_leaves_these_files_and_no_others(finished):
    found = {str(path.relative_to(finished.folder)) for path in finished.folder.rglob("*") if path.is_file()}
    assert found - {".lock"} == {
        *("recipe.toml", "run.json", "sites.json", "losses.csv", "report.html"),
        *("synthetic.safetensors", "synthetic.png", "attention.png"),
        *("quantized/model.safetensors", "quantized/config.json"),
    }


def test_measures_of_the_images_that_were_there_before_are_gone_after_a_run(finished, recipe):
    again(finished, recipe, "measured")
    measures = finished.folder.parent / "measured" / "measures.json"
    measures.write_text("{}")
    again(finished, recipe, "measured")
    assert not measures.exists()


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
        **{"mean": [0.286], "std": [0.353]},
    }
    assert record["images"] == {"type": "optimize", "count": IMAGES, "damaged": []}
    steps = ["calibrate", "blockwise"]
    assert record["backend"] == {"label": "W4A4", "placement": "matmul_inputs", "steps": steps}
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


# the store


def test_a_second_run_reuses_every_stage_and_says_so(finished, recipe):
    said = []
    result = again(finished, recipe, "second", announce=said.append)
    assert reused(finished) == []
    assert reused(result) == STAGES
    assert result.metrics == finished.metrics
    keys = {name: stage["key"] for name, stage in finished.stages.items()}
    assert {name: stage["key"] for name, stage in result.stages.items()} == keys
    told = [line for line in said if "reused from the store" in line]
    assert told == [f"{name}: reused from the store ({keys[name][:8]})" for name in STAGES]
    assert f"full precision: top-1 {finished.metrics['fp']['top1']:.2f} %" in said
    assert torch.equal(images_of(result).images, images_of(finished).images)
    for name in ("quantized/model.safetensors", "sites.json", "losses.csv", "synthetic.png"):
        assert (result.folder / name).read_bytes() == (finished.folder / name).read_bytes()


@pytest.mark.parametrize(
    ("override", "kept"),
    [
        ("evaluation.batch=10", ["images", "quantize"]),
        ("evaluation.dataset.workers=3", STAGES),
        ("evaluation.dataset.limit=5", ["images", "quantize"]),
        ("quantization.weights.bits=3", ["teacher", "images"]),
        ("quantization.steps.1.lr=2e-3", ["teacher", "images"]),
        ("synthesis.losses.total_variation.weight=0.1", ["teacher"]),
        ("seed=1", ["teacher"]),
        ("runtime.device='cpu'", STAGES),
    ],
)
def test_what_a_change_does_not_touch_is_reused(finished, recipe, override, kept):
    assert reused(again(finished, recipe, "changed", overrides=[override])) == kept


@pytest.mark.parametrize(
    ("module", "kept"),
    [
        ("spdfq.losses.total_variation", ["teacher"]),
        ("spdfq.quantizers.log2", ["teacher", "images"]),
        ("spdfq.evaluate", ["images", "quantize"]),
        ("spdfq.report.page", STAGES),
    ],
)
def test_an_edited_component_never_meets_an_old_result(finished, recipe, monkeypatch, module, kept):
    parsed = provenance._parsed
    monkeypatch.setattr(provenance, "_parsed", lambda name: parsed(name) + (" edited" if name == module else ""))
    assert reused(again(finished, recipe, "edited")) == kept


def test_other_weights_or_another_mean_of_the_teacher_are_another_teacher(finished, recipe, tmp_path):
    weights = load_file(data_file("vit_fmnist.safetensors"))
    weights["head.bias"][0] += 0.01
    save_file(weights, tmp_path / "other.safetensors")
    checkpoint = f"model.checkpoint='{tmp_path / 'other.safetensors'}'"
    assert reused(again(finished, recipe, "other-weights", overrides=[checkpoint])) == []
    # the same weights from elsewhere are the same teacher
    save_file(load_file(data_file("vit_fmnist.safetensors")), tmp_path / "other.safetensors")
    assert reused(again(finished, recipe, "same-weights", overrides=[checkpoint])) == STAGES


def test_other_evaluation_images_of_the_same_name_are_seen(finished, recipe, photos, tmp_path):
    copied = shutil.copytree(photos, tmp_path / "photos")
    root = f"evaluation.dataset.root='{copied}'"
    again(finished, recipe, "copied", overrides=[root])
    assert reused(again(finished, recipe, "copied", overrides=[root])) == STAGES
    (copied / "3" / "0.png").unlink()
    result = again(finished, recipe, "copied", overrides=[root])
    assert reused(result) == ["images", "quantize"]
    assert result.metrics["images"] == 9


def test_fresh_does_everything_anew_to_the_same_bits(finished, recipe, tmp_path):
    store = shutil.copytree(finished.folder.parent / ".store", tmp_path / "store")
    result = run(recipe, out=tmp_path / "runs/anew", store=store, fresh=True)
    assert reused(result) == []
    assert not (tmp_path / "runs/.store").exists()
    assert torch.equal(images_of(result).images, images_of(finished).images)
    weights = "quantized/model.safetensors"
    assert (result.folder / weights).read_bytes() == (finished.folder / weights).read_bytes()
    assert result.metrics == finished.metrics
    assert reused(run(recipe, out=tmp_path / "runs/anew", store=store)) == STAGES


def test_the_environment_can_name_the_store(finished, recipe, tmp_path, monkeypatch):
    monkeypatch.setenv("SPDFQ_STORE", str(finished.folder.parent / ".store"))
    assert reused(run(recipe, out=tmp_path / "elsewhere")) == STAGES


# killed, locked, failed

KILLED = """
import json, os, signal, sys, torch
from contextlib import contextmanager
from spdfq.pipeline import run
from spdfq.synth import loop
torch.set_num_threads(1)
loop.SAVE_SECONDS = 0.0
step = loop.Group.step

def dying(group, iteration):
    if (group.index, iteration) == (1, 2):
        os.kill(os.getpid(), signal.SIGKILL)
    step(group, iteration)

loop.Group.step = dying
run(json.loads(sys.argv[1]), out=sys.argv[2])
"""


def test_a_killed_run_goes_on_and_ends_as_if_it_had_not_been(finished, recipe, tmp_path, monkeypatch):
    out = tmp_path / "runs/killed"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    killed = subprocess.run([sys.executable, "-c", KILLED, json.dumps(recipe), str(out)], env=environment)
    assert killed.returncode == -signal.SIGKILL
    assert sorted(path.name for path in out.iterdir()) == [".lock"]
    done, step = [], loop.Group.step
    monkeypatch.setattr(
        loop.Group, "step", lambda group, iteration: (done.append((group.index, iteration)), step(group, iteration))
    )
    result = run(recipe, out=out)
    assert done == [(1, 2)]
    assert reused(result) == ["teacher"]
    assert torch.equal(images_of(result).images, images_of(finished).images)
    assert torch.equal(images_of(result).curves, images_of(finished).curves)
    assert result.metrics == finished.metrics
    assert not list((out.parent / ".store").glob("*/state"))


def interrupt_after(monkeypatch, batches):
    """Ctrl-C before an evaluation's next batch; gives the list of the batches that are computed, by their start."""
    computed, predict = [], evaluate._batch_by_batch

    def watched(*arguments):
        for start, found in predict(*arguments):
            if len(computed) == batches:
                raise KeyboardInterrupt
            computed.append(start)
            yield start, found

    monkeypatch.setattr(evaluate, "_batch_by_batch", watched)
    monkeypatch.setattr(predictions, "SAVE_SECONDS", 0.0)
    return computed


# batches of 4, 4 and 2 images, first for the teacher and then for the quantized model
@pytest.mark.parametrize(("batches", "rest", "kept"), [(2, [8, 0, 4, 8], []), (4, [4, 8], STAGES[:3])])
def test_an_interrupted_evaluation_goes_on_with_the_next_batch(
    finished, recipe, tmp_path, monkeypatch, batches, rest, kept
):
    store = shutil.copytree(finished.folder.parent / ".store", tmp_path / "store")
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
    assert not list(store.glob("*/state"))


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


def test_pictures_and_losses_of_an_earlier_run_do_not_stay(finished, recipe):
    again(finished, recipe, "replaced")
    noise = {**recipe, "extends": [*recipe["extends"][:1], "images/gaussian_noise", recipe["extends"][2]]}
    noise["synthesis"] = {"images": 2}
    result = again(finished, noise, "replaced")
    assert images_of(result).images.shape == (2, 1, 28, 28)
    names = {path.name for path in result.folder.iterdir()}
    assert not {"losses.csv", "attention.png"} & names
    assert {"synthetic.png", "report.html"} <= names


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
    assert folders == [Path("runs") / name for name in names]


def test_warnings_are_announced_and_kept(finished, recipe):
    said = []
    changes = ["synthesis.target='one_hot'", "synthesis.images=1"]
    result = again(finished, recipe, "warned", overrides=changes, announce=said.append)
    line = "synthesis: multi_semantic without soft labels is known to lose accuracy; set target = 'soft_label'"
    assert said[0] == f"warning: {line}"
    assert json.loads((result.folder / "run.json").read_text())["warnings"] == [line]
    assert check(recipe, overrides=changes) == [line]


def test_check_needs_neither_weights_nor_data(recipe):
    assert (
        check(recipe, overrides=["model.checkpoint='nowhere.safetensors'", "evaluation.dataset.root='nowhere'"]) == []
    )
    with pytest.raises(RecipeError, match=r"quantization.overrides.0.sites: 'stages.\*' matches no quantized site"):
        check(recipe, overrides=["quantization.overrides=[{sites=['stages.*'], bits=8}]"])
    assert check("quickstart") == []


# measuring again


def test_evaluating_a_run_again_gives_its_metrics(finished):
    assert evaluate_run(finished.folder) == finished.metrics


def test_a_run_can_be_evaluated_on_other_images(finished, photos, tmp_path):
    copied = shutil.copytree(photos, tmp_path / "photos")
    for label in "012":
        (copied / label / "0.png").unlink()
    assert evaluate_run(str(finished.folder), overrides=[f"evaluation.dataset.root='{copied}'"])["images"] == 7


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


# damaged images


@pytest.fixture
def damaged(photos, tmp_path):
    """The folder of photos with one that is cut off, as a recipe's dataset."""
    copied = shutil.copytree(photos, tmp_path / "photos")
    photo = copied / "3" / "0.png"
    photo.write_bytes(photo.read_bytes()[:200])
    return {"type": "image_folder", "root": str(copied)}


def test_damaged_images_are_left_out_and_named_in_the_record_and_in_a_warning(finished, recipe, damaged):
    said = []
    changed = {**recipe, "evaluation": {"dataset": damaged}}
    result = again(finished, changed, "damaged", announce=said.append)
    assert (result.metrics["images"], result.metrics["damaged"]) == (9, ["3/0.png"])
    record = json.loads((result.folder / "run.json").read_text())
    assert record["metrics"] == result.metrics
    line = "evaluation.dataset: 1 image cannot be read and is left out: 3/0.png"
    assert record["warnings"] == [line]
    assert f"warning: {line}" in said
    assert line in (result.folder / "report.html").read_text()
    assert again(finished, changed, "damaged", announce=said.append).metrics == result.metrics
    assert said.count(f"warning: {line}") == 2, "also where the stage is reused"


def test_damaged_images_stop_a_run_that_refuses_them(finished, recipe, damaged):
    refusing = {**recipe, "evaluation": {"dataset": {**damaged, "damaged": "refuse"}}}
    with pytest.raises(
        DataError, match=r"^image_folder: 3/0.png: not a readable image \(.*; replace it, or set damaged"
    ):
        again(finished, refusing, "refused")


def test_damaged_images_among_real_ones_for_calibration_are_named(finished, recipe, damaged):
    real = {"synthesis": {"type": "real", "images": 9, "dataset": damaged}}
    base = {**recipe, "extends": [name for name in recipe["extends"] if not name.startswith("images/")]}
    result = again(finished, {**base, **real, "quantization": {"steps": STEPS[:1]}}, "real")
    record = json.loads((result.folder / "run.json").read_text())
    assert record["images"] == {"type": "real", "count": 9, "damaged": ["3/0.png"]}
    assert record["warnings"] == ["synthesis.dataset: 1 image cannot be read and is left out: 3/0.png"]


def test_a_finished_run_is_not_changed_by_evaluating_it(finished):
    with pytest.raises(RecipeError) as raised:
        evaluate_run(finished.folder, overrides=["quantization.weights.bits=3", "evaluation.batch=4", "seed=2"])
    assert raised.value.problems == [
        "--set quantization.weights.bits=3: cannot change a finished run; run its recipe.toml again",
        "--set seed=2: cannot change a finished run; run its recipe.toml again",
    ]


def test_a_folder_that_is_no_run_is_named(tmp_path):
    with pytest.raises(RecipeError, match="not a run folder"):
        evaluate_run(tmp_path)


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
    changes.append("quantization.steps.1.iterations=2")
    model = spdfq.quantize(teacher, images, "quickstart", overrides=changes)
    assert model(images).shape == (IMAGES, 5)
    assert {quantizer.bits for quantizer in model.quantizers.values()} == {4}
    assert all(torch.equal(value, before[name]) for name, value in teacher.module.state_dict().items())
    with pytest.raises(RecipeError, match=r"overrides.0.roles: TinyViT does not say which module is 'first'"):
        spdfq.quantize(teacher, images, "quickstart")
    save_quantized(model, tmp_path, teacher)
    assert torch.equal(spdfq.load_quantized(tmp_path, tiny_teacher().module)(images), model(images))
