"""Every shipped recipe: which there are, and that each runs for a few iterations on both bundled models."""

import re

import pytest
import torch

from spdfq.api import make_images
from spdfq.errors import RecipeError, SpdfqError
from spdfq.recipe import load_recipe, resolve, shipped
from spdfq.runs.pipeline import check, run
from spdfq.runtime import Runtime
from spdfq.synth import OptimizedImages
from spdfq.teacher import load_teacher

BASELINES = ["clamp_vit", "fdd", "maskaq", "mimiq", "psaq_vit", "psaq_vit_v2", "smi", "spdfq", "spdfq_psaq"]
PAPER = ["deit_b", "deit_s", "deit_t", "swin_b", "swin_s", "vit_b", "vit_s"]
WHOLE = [*BASELINES, "gaussian_noise", "headless", "quickstart", "real", "spdfq_plus"]
IMAGES = [*BASELINES, "cross_entropy", "gaussian_noise", "real", "real_fmnist", "real_imagenet"]
IMAGES += ["patch_rebirth", "spdfq_plus", "spdfq_swin"]
SHORT = [*BASELINES, "apa", "apa_sl", "cross_entropy", "msr_sl", "spdfq_spectral"]
OTHERS = [
    "backends/adalog",
    "backends/adaround",
    "backends/blockwise",
    "backends/distill",
    "backends/minmax",
    "backends/plus",
    "backends/ptf",
    "backends/repq",
    "backends/ridge",
    "backends/strong",
    "backends/three_stage",
    "backends/w4a8",
    "backends/w8a16",
    "backends/w8a8",
    "bits/w3a3",
    "bits/w6a6",
    "bits/w8a8",
    "evaluation/imagenet",
    "models/swin_fmnist",
    "models/vit_fmnist",
]
MODELS = ["vit_fmnist", "swin_fmnist"]
NEEDS_A_CLASS_TOKEN = {"smi", "patch_rebirth"}
NEEDS_A_FOLDER = {"images/real", "images/real_imagenet"}
MAKES_IMAGES = [name for name in shipped() if "synthesis" in resolve(name) and name not in NEEDS_A_FOLDER]
RUNTIME = Runtime(seed=0)
QUICK = ["synthesis.images=2", "quantization.steps=[{type='calibrate', observer='minmax', weight_observer='minmax'}]"]


@pytest.fixture(scope="module")
def teachers():
    return {model: load_teacher(f"bundled:{model}") for model in MODELS}


@pytest.fixture(scope="module")
def images_of(teachers):
    """The images of a recipe; those that differ in their numbers of images and iterations alone are the same here."""
    made = {}

    def found(recipe, model):
        sections = recipe.to_dict()
        key = model, repr([sections["synthesis"], sections["quantization"]])
        if key not in made:
            made[key] = make_images(recipe, teachers[model], RUNTIME)
        return made[key]

    return found


def quick(name, model):
    """The recipe with two images, and two iterations where it optimises."""
    recipe = load_recipe({"extends": ["images/gaussian_noise", "backends/blockwise", name, f"models/{model}"]}, QUICK)
    if not isinstance(recipe.synthesis, OptimizedImages):
        return recipe
    changes = ["synthesis.iterations=2"]
    if recipe.synthesis.pruning:
        changes.append("synthesis.pruning.at=[1]")
    if recipe.synthesis.student:
        changes.append("synthesis.student.recalibrate=1")
    return load_recipe(recipe, changes)


def test_these_are_the_recipes_and_none_is_left_out():
    expected = [*WHOLE, *(f"images/{name}" for name in IMAGES), *(f"fmnist/{name}" for name in SHORT)]
    expected += [*(f"paper/{name}" for name in PAPER), *OTHERS]
    assert shipped() == sorted(expected)
    assert len(shipped()) == 72
    assert len(MAKES_IMAGES) == 72 - len(OTHERS) - len(NEEDS_A_FOLDER)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("name", MAKES_IMAGES)
def test_every_recipe_that_makes_images_makes_them_on_both_bundled_models(name, model, teachers, images_of):
    recipe, teacher = quick(name, model), teachers[model]
    if name.rpartition("/")[2] in NEEDS_A_CLASS_TOKEN and model == "swin_fmnist":
        with pytest.raises(SpdfqError, match=r"synthesis.pruning: bundled:swin_fmnist has no class token"):
            recipe.synthesis.check(teacher)
        return
    recipe.synthesis.check(teacher)
    images = images_of(recipe, model)
    assert images.images.shape == (2, 1, 28, 28)
    pixels = images.images * torch.tensor(teacher.std) + torch.tensor(teacher.mean)
    assert pixels.isfinite().all()
    if isinstance(recipe.synthesis, OptimizedImages):
        assert images.curves.shape[:2] == (1, 2)
        assert images.curves.isfinite().all()
        assert pixels.min() >= -1e-5
        assert pixels.max() <= 1 + 1e-5
        assert len(images.images.flatten(1).unique(dim=0)) == 2


@pytest.mark.parametrize("name", ["psaq_vit", "psaq_vit_v2", "smi"])
def test_a_baseline_runs_from_its_name_to_its_accuracy(name, tmp_path):
    changes = [*QUICK, "synthesis.iterations=2", "evaluation.dataset.limit=20"]
    changes += ["synthesis.pruning.at=[1]"] if name == "smi" else []
    done = run(name, overrides=changes, out=tmp_path / name)
    assert done.metrics["images"] == 20
    assert 0 <= done.metrics["quantized"]["top1"] <= 100
    assert (tmp_path / name / "report.html").exists()


# constants of the papers


@pytest.mark.parametrize("name", [*BASELINES, "spdfq_plus"])
def test_a_whole_recipe_is_its_images_part_in_full(name):
    whole, part = resolve(name), resolve(f"images/{name}")
    assert whole["synthesis"] == part["synthesis"]


@pytest.mark.parametrize(
    ("name", "group", "iterations", "lr", "betas"),
    [
        ("psaq_vit", 32, 1000, 0.2, (0.5, 0.9)),
        ("psaq_vit_v2", 32, 1000, 0.2, (0.5, 0.9)),
        ("mimiq", 16, 2000, 0.1, (0.9, 0.999)),
        ("maskaq", 16, 2000, 0.1, (0.9, 0.999)),
        ("smi", 32, 4000, 0.25, (0.5, 0.99)),
        ("fdd", 32, 1000, 0.2, (0.5, 0.9)),
    ],
)
def test_lengths_groups_and_optimisers_are_the_published_ones(name, group, iterations, lr, betas):
    synthesis = load_recipe(name).synthesis
    assert (synthesis.group, synthesis.iterations) == (group, iterations)
    assert (synthesis.optimizer.lr, synthesis.optimizer.betas) == (lr, betas)


@pytest.mark.parametrize(
    ("name", "begins"),
    [("psaq_vit", [500]), ("fdd", [200, 400, 600, 800]), ("mimiq", []), ("smi", [])],
)
def test_rounds_begin_where_the_papers_have_them(name, begins):
    synthesis = load_recipe(name).synthesis
    length = synthesis.iterations
    assert [i for i in range(length) if synthesis.schedule.restarts(i, length)] == begins


def test_warm_ups_and_floors_are_the_published_ones():
    def warms_up(name):
        synthesis = load_recipe(name).synthesis
        rates = [synthesis.schedule.factor(i, synthesis.iterations) for i in range(synthesis.iterations)]
        return rates.index(max(rates)), rates[-1] * synthesis.optimizer.lr

    assert warms_up("psaq_vit")[0] in (99, 100)
    assert warms_up("fdd")[0] in (39, 40)
    assert warms_up("mimiq") == (0, pytest.approx(1e-3, rel=1e-3))


# what cannot be had


def test_no_images_at_all_are_refused():
    with pytest.raises(RecipeError, match=r"synthesis.images: 'images' must be >= 1: 0"):
        load_recipe("psaq_vit", ["synthesis.images=0"])


def test_a_single_class_is_refused():
    with pytest.raises(RecipeError, match=r"model.num_classes: must be at least 2"):
        load_recipe("psaq_vit", ["model.num_classes=1"])


@pytest.mark.parametrize(
    ("baseline", "model", "why"),
    [
        ("psaq_vit", "xcit_nano_12_p16_224", "it cannot be recorded, leave out the losses that need it"),
        ("mimiq", "cait_xxs24_224", "computes a softmax of its own"),
        ("smi", "swin_tiny_patch4_window7_224", "has no class token to rank its patches by"),
        ("spdfq", "resnet18", "no attention went through scaled_dot_product_attention"),
    ],
)
def test_a_baseline_asked_of_a_model_that_cannot_have_it_is_one_clear_line(baseline, model, why):
    changes = [f'model.name="{model}"', "model.pretrained=false", "quantization.overrides=[]"]
    with pytest.raises(SpdfqError) as caught:
        check(baseline, overrides=changes)
    assert re.search(why, str(caught.value).splitlines()[0])
