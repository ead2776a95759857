"""Models without their head: how they are loaded, images made without labels, and a run from end to end."""

import json
import re

import pytest
import timm
import torch
import torch.nn.functional as F
from attrs import evolve
from safetensors.torch import load_file, save_file
from spdfq_cli.run import accuracy as told
from support.backbones import TEST, own
from support.teachers import TinyViT, recipe, tiny_teacher
from torch import nn

import spdfq
from spdfq.bench import run as bench
from spdfq.bench.rows import row_of_run
from spdfq.errors import ModelError, RecipeError
from spdfq.losses import AttentionPriorLoss, PatchSimilarityEntropyLoss, TotalVariationLoss
from spdfq.quantized.checkpoint import save_quantized
from spdfq.recipe import ModelSpec, load_recipe
from spdfq.registry import losses
from spdfq.report import write_report
from spdfq.runs import pipeline
from spdfq.runtime import Runtime
from spdfq.synth import MultiSemanticSampler, Sampler, WholeImageSampler
from spdfq.teacher import load_teacher
from spdfq.teacher.zoo import data_file

BASE = {
    "extends": ["models/vit_fmnist", "images/gaussian_noise", "backends/blockwise"],
    "model": {"num_classes": 0},
    "synthesis": {"images": 2},
    "quantization": {"steps": [{"type": "calibrate", "observer": "minmax", "weight_observer": "minmax"}]},
    "evaluation": {"dataset": {"limit": 40}, "bank": {"type": "fashion_mnist", "split": "train", "limit": 60}},
}


def headless_tiny():
    teacher = tiny_teacher()
    teacher.module.head = nn.Identity()
    return evolve(teacher, num_classes=0)


# the model


def test_a_bundled_model_without_its_head_gives_what_its_head_was_given():
    whole, bare = (load_teacher(ModelSpec(name="bundled:vit_fmnist", num_classes=n)) for n in (None, 0))
    images = torch.randn(2, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(whole.module.head(bare.module(images)), whole.module(images))
    assert (bare.headless, whole.headless) == (True, False)


@pytest.mark.parametrize("name", ["bundled:vit_fmnist", "bundled:swin_fmnist"])
def test_local_weights_of_the_whole_model_or_without_its_head_fit_a_backbone(name, tmp_path):
    weights = load_file(data_file(f"{name.partition(':')[2]}.safetensors"))
    save_file(weights, tmp_path / "whole.safetensors")
    save_file({key: value for key, value in weights.items() if "head" not in key}, tmp_path / "bare.safetensors")
    found = [
        load_teacher(ModelSpec(name=name, num_classes=0, checkpoint=str(tmp_path / f"{which}.safetensors")))
        for which in ("whole", "bare")
    ]
    plain = load_teacher(ModelSpec(name=name, num_classes=0))
    assert {teacher.fingerprint() for teacher in found} == {plain.fingerprint()}


@pytest.mark.parametrize("name", ["levit_128s"])
def test_weights_with_a_head_of_several_layers_fit_a_backbone(name, tmp_path):
    whole = timm.create_model(name, num_classes=7).half()
    save_file({key: value.half() for key, value in whole.state_dict().items()}, tmp_path / "whole.safetensors")
    spec = ModelSpec(name=name, num_classes=0, checkpoint=str(tmp_path / "whole.safetensors"))
    assert load_teacher(spec).headless


def test_weights_that_lack_more_than_the_head_do_not_fit(tmp_path):
    weights = load_file(data_file("vit_fmnist.safetensors"))
    del weights["norm.weight"]
    save_file(weights, tmp_path / "short.safetensors")
    with pytest.raises(ModelError, match=r"does not fit VisionTransformer: lacks norm\.weight$"):
        load_teacher(
            ModelSpec(name="bundled:vit_fmnist", num_classes=0, checkpoint=str(tmp_path / "short.safetensors"))
        )


def test_a_timm_model_without_its_head_is_a_backbone():
    spec = ModelSpec(name="vit_tiny_patch16_224", pretrained=False, num_classes=0, img_size=32)
    teacher = load_teacher(spec)
    with torch.no_grad():
        assert teacher.module(torch.zeros(2, 3, 32, 32)).shape == (2, 192)
    assert teacher.headless


def test_one_class_is_still_no_classifier():
    with pytest.raises(ModelError, match="at least 2, or 0 for a backbone without a head, got 1"):
        own(classes=1)
    with pytest.raises(
        RecipeError, match=r"model.num_classes: must be at least 2, or 0 for the model without its head"
    ):
        load_recipe(BASE, ["model.num_classes=1"])


# synthesis


FREE = {
    "attention_prior": AttentionPriorLoss(weight=10.0),
    "patch_similarity_entropy": PatchSimilarityEntropyLoss(),
    "total_variation": TotalVariationLoss(weight=0.05),
}


def bare(**changes):
    return recipe(losses=FREE, sampler=WholeImageSampler(), iterations=3, **changes)


def test_images_are_made_from_losses_that_need_no_labels():
    teacher = headless_tiny()
    images = bare().synthesize(teacher, Runtime(seed=1))
    assert images.images.shape == (3, 3, 16, 16)
    assert images.curves.isfinite().all()
    assert images.curves[..., -1].min() > 0  # the gradient
    assert images.labels.shape == images.owners.shape == (0,)
    assert images.boxes.shape == (0, 4)
    assert images.columns[:3] == tuple(FREE)


def test_without_labels_the_images_are_those_of_the_model_with_its_head():
    """The head takes no part in these losses, so neither may its absence."""
    with_head = bare().synthesize(tiny_teacher(), Runtime(seed=1))
    assert torch.equal(bare().synthesize(headless_tiny(), Runtime(seed=1)).images, with_head.images)


def test_what_needs_classes_is_refused_by_name_all_at_once():
    with pytest.raises(RecipeError) as caught:
        recipe().synthesize(headless_tiny(), Runtime())
    loss, sampler = caught.value.problems
    free = ", ".join(name for name in losses.names() if not losses.get(name).label_loss)
    assert {"attention_prior", "total_variation"} <= set(free.split(", "))
    assert loss == (
        "synthesis.losses.soft_cross_entropy: needs classes, but TinyViT has no head (num_classes = 0); use losses "
        f"that need none ({free}), each with a number as its weight, or the model with its head"
    )
    assert sampler == (
        "synthesis.sampler: draws a class for each crop, but TinyViT has no head (num_classes = 0); set sampler = "
        "'whole_image', or use the model with its head"
    )
    recipe().check(tiny_teacher())


def test_a_sampler_that_does_not_say_is_taken_to_need_classes():
    class Unknown(Sampler):
        pass

    with pytest.raises(RecipeError, match=r"synthesis.sampler: draws a class for each crop"):
        evolve(bare(), sampler=Unknown()).check(headless_tiny())
    assert (MultiSemanticSampler.needs_classes, WholeImageSampler.needs_classes) == (True, False)


# a recipe, from end to end


def test_everything_that_needs_a_head_is_told_at_once_before_anything_runs():
    data = {**BASE, "extends": ["models/vit_fmnist", "images/spdfq", "backends/blockwise"], "evaluation": {}}
    with pytest.raises(RecipeError) as caught:
        pipeline.check(data, overrides=["quantization.overrides=[{sites=['head.*'], bits=8}]"])
    assert [problem.partition(": ")[0] for problem in caught.value.problems] == [
        "synthesis.losses.soft_cross_entropy",
        "synthesis.sampler",
        "quantization.overrides.0.sites",
        "evaluation.bank",
    ]


def test_the_role_last_is_ignored_without_a_head():
    assert pipeline.check(BASE) == []
    with pytest.raises(RecipeError, match=r"quantization.overrides.0.roles: own does not say which module is 'first'"):
        spdfq.quantize(own(), torch.zeros(1, 1, 28, 28), BASE)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    said = []
    folder = tmp_path_factory.mktemp("runs") / "backbone"
    store = tmp_path_factory.mktemp("store")
    return pipeline.run(BASE, out=folder, store=store, announce=said.append), said, store


def test_a_run_measures_features_and_says_so(finished):
    result, said, _ = finished
    record = json.loads((result.folder / "run.json").read_text())
    metrics = record["metrics"]
    assert metrics == result.metrics
    assert record["model"]["num_classes"] == 0
    assert 0.3 < metrics["similarity"] < 1
    assert f"full precision: k-NN top-1 {metrics['fp']['top1']:.2f} %" in said
    sites = json.loads((result.folder / "sites.json").read_text())
    bits = {row["name"]: row["bits"] for row in sites["quantized"]}
    assert bits["patch_embed.proj.weight"] == 8
    assert not [name for name in bits if name.startswith("head")]


def test_the_metrics_are_those_of_the_reloaded_model(finished):
    result, _, _ = finished
    model = spdfq.load_quantized(result.folder / "quantized")
    teacher = load_teacher(result.recipe.model)
    pixels, *_ = next(iter(TEST.batches(teacher, 40)))
    with torch.no_grad():
        expected = F.cosine_similarity(model(pixels), teacher.module(pixels)).mean()
    assert result.metrics["similarity"] == pytest.approx(float(expected), abs=1e-5)
    assert pipeline.evaluate_run(result.folder) == result.metrics


def test_the_terminal_and_the_report_call_it_by_its_name(finished):
    result, _, _ = finished
    metrics = result.metrics
    lines = told(metrics)
    assert lines[0].startswith(f"k-NN top-1 {metrics['fp']['top1']:.2f} % FP -> {metrics['quantized']['top1']:.2f} %")
    assert lines[2] == f"similarity {metrics['similarity']:.4f} mean cosine of quantized to full-precision features"
    page = write_report(result.folder).read_text(encoding="utf-8")
    assert "k-NN top-1 (simulated), 40 images" in page
    assert "1 × 28 × 28 input, no head" in page
    assert re.search(rf"<dt>.*Feature similarity.*</dt><dd>{metrics['similarity']:.4f}</dd>", page)


def test_stages_are_shared_as_far_as_the_bank_does_not_matter(finished, tmp_path):
    _, _, store = finished
    again = pipeline.run(BASE, out=tmp_path / "again", store=store)
    assert all(stage["reused"] for stage in again.stages.values())
    other = pipeline.run(BASE, out=tmp_path / "other", store=store, overrides=["evaluation.bank.limit=50"])
    assert [name for name, stage in other.stages.items() if stage["reused"]] == ["images", "quantize"]


def test_a_bench_of_backbones_names_its_measure(finished):
    result, _, _ = finished
    record = json.loads((result.folder / "run.json").read_text())
    assert bench._outcome(row_of_run(record)).startswith("k-NN top-1 ")


def test_the_shipped_example_passes_its_check_and_needs_no_labels():
    assert pipeline.check("headless") == []
    shipped = load_recipe("headless")
    assert shipped.model.num_classes == 0
    assert not [loss for loss in shipped.synthesis.losses.values() if loss.label_loss]


def test_a_backbone_made_in_python_is_synthesised_quantized_and_reloaded(tmp_path):
    teacher = headless_tiny()
    changes = ["synthesis.images=2", "synthesis.iterations=2", "quantization.overrides=[]"]
    changes.append("quantization.steps=[{type='calibrate', observer='minmax', weight_observer='minmax'}]")
    images = spdfq.synthesize(teacher, "headless", overrides=changes)
    model = spdfq.quantize(teacher, images, "headless", overrides=changes)
    save_quantized(model, tmp_path, teacher)
    other = TinyViT().eval()
    other.head = nn.Identity()
    assert torch.equal(spdfq.load_quantized(tmp_path, other)(images), model(images))
    assert model(images).shape == (2, 32)
