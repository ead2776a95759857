"""What a run takes from earlier ones, and what it does anew after a change."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.runs import STAGES, again, images_of, reused

from spdfq.runs import provenance
from spdfq.runs.pipeline import run
from spdfq.teacher.zoo import data_file


def test_a_second_run_reuses_every_stage_and_says_so(finished, recipe):
    said = []
    result = again(finished, recipe, "second", announce=said.append)
    assert reused(finished) == []
    assert reused(result) == STAGES
    assert result.metrics == finished.metrics
    keys = {name: stage["key"] for name, stage in finished.stages.items()}
    assert {name: stage["key"] for name, stage in result.stages.items()} == keys
    told = [line for line in said if "reused from the store" in line]
    assert told == [
        f"stage {number} of 4, {name}: reused from the store ({keys[name][:8]})"
        for number, name in enumerate(STAGES, 1)
    ]
    assert not any("of memory" in line for line in said)
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
        ("synthesis.groups_per_pass=2", ["teacher"]),  # the last digits
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
        ("spdfq.evaluation.accuracy", ["images", "quantize"]),
        ("spdfq.report.page", STAGES),
    ],
)
def test_an_edited_component_never_meets_an_old_result(finished, recipe, monkeypatch, module, kept):
    normalised = provenance._normalised
    monkeypatch.setattr(
        provenance, "_normalised", lambda name: normalised(name) + (" edited" if name == module else "")
    )
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
