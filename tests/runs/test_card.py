"""The model card of a run: its metadata, what it states, and that its folder can be uploaded."""

import json
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import yaml
from huggingface_hub import CommitOperationAdd, ModelCard
from huggingface_hub.utils import filter_repo_objects
from PIL import Image
from support.commands import spdfq

from spdfq.errors import DataError
from spdfq.recipe import ModelSpec, load_recipe, to_toml
from spdfq.runs.card import _base, card_run
from spdfq.teacher import Teacher


@pytest.fixture
def run(finished, tmp_path):
    """A copy of the finished run that a test may change."""
    return shutil.copytree(finished.folder, tmp_path / "mine")


@pytest.fixture(scope="module")
def exported(exported_run, tmp_path_factory):
    """A copy of the finished run with a checked ONNX file and its card."""
    folder = shutil.copytree(exported_run, tmp_path_factory.mktemp("exported") / "vit")
    card_run(folder)
    return folder


def front_matter(folder):
    text = (folder / "README.md").read_text()
    _, block, body = text.split("---\n", 2)
    return yaml.safe_load(block), body


def change(folder, **sections):
    """Other sections in the recipe of a run."""
    recipe = load_recipe(str(folder / "recipe.toml")).to_dict()
    (folder / "recipe.toml").write_text(to_toml({**recipe, **sections}))


def test_the_metadata_are_those_of_a_card_of_the_hub(exported):
    found, body = front_matter(exported)
    assert found["base_model_relation"] == "quantized"
    assert found["pipeline_tag"] == "image-classification"
    assert found["library_name"] == "onnx"
    assert found["license"] == "apache-2.0"
    assert {"quantized", "onnx", "w4a4", "data-free-quantization"} <= set(found["tags"])
    card = ModelCard.load(exported / "README.md")
    assert card.data.to_dict() == found
    assert card.text == body
    assert str(card) == (exported / "README.md").read_text()  # what push_to_hub would send


def test_the_folder_can_be_uploaded(exported):
    paths = [str(path.relative_to(exported)) for path in exported.rglob("*") if path.is_file()]
    kept = list(filter_repo_objects(paths, ignore_patterns=[".lock"]))
    assert {"README.md", "model.onnx", "quantized/model.safetensors", "recipe.toml"} <= set(kept)
    sizes = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=exported / name).upload_info.size for name in kept]
    assert all(sizes)
    listed = re.findall(r"^\| `([^`]+)` \|.*\| \d+\.\d\d \|$", (exported / "README.md").read_text(), re.MULTILINE)
    assert "model.onnx" in listed
    assert set(listed) <= set(kept)


def test_the_card_says_what_was_measured_where(exported):
    text = (exported / "README.md").read_text()
    row = json.loads((exported / "exports.json").read_text())["model.onnx"]["measured"][0]
    metrics = json.loads((exported / "run.json").read_text())["metrics"]
    assert "| quantized | simulated in torch" in text
    assert (
        f"| {metrics['quantized']['top1']:.2f} % | {metrics['agreement']:.2f} %, compared with full precision |" in text
    )
    measured = f"| `model.onnx` | measured in onnxruntime {row['version']} | {row['top1']:.2f} % |"
    assert measured in text
    assert f"{row['integer_products']} of {row['products']} quantized products are integer kernels" in text
    assert "log2 of 4 bits is now uniform of 8 bits" in text
    assert "made **without any real image**" in text
    assert 'type = "optimize"' in text


def test_the_lines_of_the_card_classify_a_picture_without_spdfq(exported, photos):
    code = re.findall(r"```python\n(.*?)```", (exported / "README.md").read_text(), re.DOTALL)[0]
    assert "spdfq" not in code
    Image.open(photos / "1/0.png").save(exported / "picture.jpg", quality=100)
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\nimport sys\nassert not {{'torch', 'spdfq'}} & sys.modules.keys()"],
        cwd=exported,
        capture_output=True,
        text=True,
        timeout=120,
    )
    (exported / "picture.jpg").unlink()
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    assert len(lines) == 5
    values = [float(value) for _, value in lines]
    assert values == sorted(values, reverse=True)


WAYS = {
    "centre": {"crop_pct": 0.875, "interpolation": "bicubic"},
    "squash": {"crop_pct": 0.9, "interpolation": "bilinear", "crop_mode": "squash"},
    "oblong squash": {"crop_pct": 1.0, "crop_mode": "squash", "input_size": (3, 24, 40)},
    "grey": {"mean": (0.5,), "std": (0.25,), "input_size": (1, 28, 28)},
}


@pytest.mark.parametrize("way", WAYS)
def test_the_lines_of_the_card_prepare_a_picture_as_the_teacher_does(way, tmp_path):
    import torch

    from spdfq.report.card import _pillow, _templates
    from spdfq.runs.card import CardFacts

    options = {
        "mean": (0.5, 0.4, 0.3),
        "std": (0.2, 0.3, 0.25),
        "input_size": (3, 32, 32),
        "crop_pct": 1.0,
        **WAYS[way],
    }
    features = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
    teacher = Teacher(features, num_classes=0, **options)
    described = {name: getattr(teacher, name) for name in ("input_size", "crop_pct", "crop_mode", "interpolation")}
    mode = "L" if way == "grey" else "RGB"
    empty = dict.fromkeys(("front_matter", "base", "dataset", "recipe"), "")
    facts = CardFacts(**empty, data_free=True, teacher=described, mode=mode, limits=())
    names = {"backend": {"steps": []}, "versions": {}, "images": {}}
    text = _templates().get_template("card.md").render(**names, onnx="model.onnx", pillow=_pillow(facts))
    code = re.findall(r"```python\n(.*?)\(outputs,\) = ", text, re.DOTALL)[0]
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 71, 3), np.uint8))
    picture.save(tmp_path / "picture.png")
    code = code.replace("picture.jpg", str(tmp_path / "picture.png"))
    code = re.sub("session = .*\nabout = .*\n", "", code)
    found = {"about": {"mean": list(teacher.mean), "std": list(teacher.std)}}
    exec(code, found)
    assert found["images"].dtype == np.float32
    np.testing.assert_allclose(found["images"][0], teacher.transform()(picture).numpy(), atol=1e-5)


def test_a_way_that_needs_more_lines_has_none():
    from spdfq.report.card import _pillow
    from spdfq.runs.card import CardFacts

    empty = dict.fromkeys(("front_matter", "base", "dataset", "recipe"), "")
    for described in ({"crop_mode": "border"}, {"crop_mode": "center", "input_size": [3, 8, 9]}, {"crop_pct": 1.1}):
        teacher = {"input_size": [3, 8, 8], "crop_pct": 1.0, "crop_mode": "center", "interpolation": "bicubic"}
        assert _pillow(CardFacts(**empty, data_free=True, teacher=teacher | described, mode="RGB", limits=())) is None


def test_the_command_prints_the_file_and_what_to_look_at(run):
    done = spdfq("card", run)
    assert done.exit_code == 0, done.output
    assert "note: no ONNX file in the folder; 'spdfq export RUN --check' writes and measures one" in done.stderr
    assert "note: recipe.toml and the report name local paths" in done.stderr
    assert "note: real.png and the report show images of the test set" in done.stderr
    assert "evaluation.dataset.root = " in done.stderr
    assert f"upload     hf upload USER/NAME {run} . --exclude .lock" in done.stdout
    found, body = front_matter(run)
    assert found["library_name"] == "spdfq"
    assert "No exported file was measured in its runtime." in body
    assert "spdfq predict" not in body
    done = spdfq("card", run, "--json")
    assert json.loads(done.stdout)["data_free"] is True


def test_a_run_on_real_images_is_not_called_data_free(run):
    change(run, synthesis={"type": "real", "images": 2, "dataset": {"type": "fashion_mnist", "split": "train"}})
    assert card_run(run)["data_free"] is False
    found, body = front_matter(run)
    assert "data-free-quantization" not in found["tags"]
    assert "This model is **not** data-free" in body
    assert "without any real image" not in body


def test_its_own_card_is_replaced_and_no_other(run):
    card_run(run)
    first = (run / "README.md").read_text()
    card_run(run)
    assert (run / "README.md").read_text() == first
    for text in (first.replace("## Limits", "## Limits\n\n* mine"), "# mine\n"):
        (run / "README.md").write_text(text)
        done = spdfq("card", run)
        assert done.exit_code == 2
        assert done.stderr.endswith(
            "was not written by 'spdfq card', or was edited since; move it, and run this again\n"
        )
        assert (run / "README.md").read_text() == text


def test_a_folder_that_is_no_finished_run_is_refused(run, tmp_path):
    done = spdfq("card", tmp_path)
    assert done.exit_code == 2
    assert "not a run folder" in done.stderr
    (run / "run.json").write_text('{"metrics": {}}')
    with pytest.raises(DataError, match=r"run.json or exports.json is damaged"):
        card_run(run)
    (run / "run.json").unlink()
    with pytest.raises(DataError, match=r"has no run.json; give the folder of a finished run"):
        card_run(run)
    assert not (run / "README.md").exists()


@pytest.mark.parametrize(
    ("spec", "hub_id", "license"),
    [
        ({"name": "bundled:vit_fmnist"}, None, "apache-2.0"),
        ({"name": "vit_tiny_patch16_224"}, "timm/vit_tiny_patch16_224.augreg_in21k_ft_in1k", "apache-2.0"),
        ({"name": "vit_small_patch16_dinov3.lvd1689m"}, "timm/vit_small_patch16_dinov3.lvd1689m", "dinov3-license"),
        ({"name": "hf-hub:somebody/model@v1"}, "somebody/model", None),
        ({"name": "local-dir:folder"}, None, None),
        ({"name": "vit_tiny_patch16_224", "checkpoint": "mine.safetensors"}, None, None),
        ({"name": "vit_tiny_patch16_224", "pretrained": False}, None, None),
    ],
)
def test_the_base_model_is_that_of_the_hub_if_its_weights_were_used(spec, hub_id, license):
    found = _base(ModelSpec(**spec))
    assert (found.hub_id, found.license) == (hub_id, license)


def test_a_licence_that_the_hub_does_not_list_is_named_beside_other(run):
    change(run, model={"name": "vit_small_patch16_dinov3.lvd1689m"})
    card_run(run)
    found, body = front_matter(run)
    assert (found["license"], found["license_name"]) == ("other", "dinov3-license")
    assert found["base_model"] == "timm/vit_small_patch16_dinov3.lvd1689m"
    assert "(https://huggingface.co/timm/vit_small_patch16_dinov3.lvd1689m)" in body
