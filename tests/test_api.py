"""The stages as functions: what they take besides a recipe, what they refuse, and when."""

import warnings
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from attrs import evolve
from PIL import Image
from support.backbones import EVALUATION, TEST, TRAIN, Pooled
from support.backbones import own as backbone
from support.backends import images, teacher_of
from support.networks import build
from support.teachers import tiny_teacher
from torch import nn

import spdfq
from spdfq.data import FashionMnist, ImageFolder
from spdfq.errors import DataError, ModelError, RecipeError, SpdfqError
from spdfq.losses import CrossEntropyLoss
from spdfq.recipe import Evaluation
from spdfq.runtime import RichProgress
from spdfq.synth import GaussianNoise, MultiSemanticSampler, OneHotTarget, OptimizedImages, SyntheticImages
from spdfq.teacher import load_teacher

NO_OVERRIDES = "quantization.overrides=[]"
PLAIN = {"extends": ["models/vit_fmnist", "images/gaussian_noise", "backends/minmax"]}


@pytest.fixture(scope="module")
def teacher():
    return teacher_of(build("vit"))


@pytest.fixture(scope="module")
def bundled():
    return load_teacher("bundled:vit_fmnist")


@contextmanager
def nothing_is_warned():
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        yield


class Bars:
    """A progress that notes the bars it shows."""

    def __init__(self):
        self.shown = []

    @contextmanager
    def __call__(self, description, total):
        self.shown.append(description)
        yield lambda steps=1, **values: None


# parts


def test_images_and_back_ends_are_made_from_parts(teacher):
    drawn = spdfq.synthesize(teacher, "images/gaussian_noise", overrides=["synthesis.images=3"], seed=1)
    assert torch.equal(drawn, spdfq.synthesize(teacher, GaussianNoise(images=3), seed=1))
    assert not torch.equal(drawn, spdfq.synthesize(teacher, GaussianNoise(images=3), seed=2))
    with nothing_is_warned():
        quantized = spdfq.quantize(teacher, drawn, "backends/minmax")
    whole = spdfq.quantize(teacher, drawn, PLAIN)
    assert torch.equal(quantized(drawn), whole(drawn))


def test_images_that_need_a_student_say_that_they_need_a_back_end(teacher):
    with pytest.raises(RecipeError, match=r"^synthesis.student: needs a quantization section; give both, for example"):
        spdfq.synthesize(teacher, "images/psaq_vit_v2")


# progress and device


def test_both_show_the_bars_they_are_given(teacher):
    bars = Bars()
    overrides = ["synthesis.images=2", "synthesis.iterations=1"]
    drawn = spdfq.synthesize(teacher, "images/cross_entropy", overrides=overrides, progress=bars)
    spdfq.quantize(teacher, drawn, "backends/minmax", progress=bars)
    assert bars.shown == ["synthesising", "calibrating"]


@pytest.mark.parametrize(("progress", "shown"), [(None, False), (False, False), (True, True)])
def test_bars_are_for_terminals_unless_they_are_asked_for(bundled, progress, shown, capsys):
    spdfq.evaluate(bundled.module, bundled, FashionMnist(limit=2), progress=progress)
    assert ("full precision" in capsys.readouterr().err) == shown


def test_a_device_is_given_by_name_or_as_torchs_own(teacher):
    for device in ("cpu", torch.device("cpu"), "auto"):
        assert spdfq.synthesize(teacher, "images/gaussian_noise", device=device).device.type == "cpu"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "gpu"}, "device: this machine has no gpu device; use 'auto' or 'cpu'"),
        ({"device": 3}, "device: expected 'auto', 'cpu' or the type of an accelerator, got 3"),
        ({"device": ""}, "device: expected 'auto', 'cpu' or the type of an accelerator, got ''"),
        ({"device": "cuda:1"}, "device: leave out ':1' of 'cuda:1'; CUDA_VISIBLE_DEVICES=1 chooses the device"),
        ({"progress": "yes"}, r"progress: expected True, False, None or a RichProgress\(\), got 'yes'"),
        ({"progress": RichProgress}, "progress: expected .*, got the class RichProgress"),
        ({"seed": -1}, "seed: 'seed' must be >= 0"),
        ({"seed": True}, "seed: expected a whole number, got True"),
        ({"overrides": "seed=1"}, "overrides: expected a list of 'key=value' strings"),
    ],
    ids=str,
)
def test_both_refuse_wrong_options_in_one_line(teacher, options, message):
    for call in (
        lambda: spdfq.synthesize(teacher, "images/gaussian_noise", **options),
        lambda: spdfq.quantize(teacher, images(2), "backends/minmax", **options),
    ):
        with pytest.raises(SpdfqError, match=f"^{message}"):
            call()


# the teacher and the images


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (nn.Linear(2, 2), r"teacher: Linear is a module; describe its input: spdfq.Teacher\(module, mean=\.\.\., std"),
        ("vit", r"teacher: expected a spdfq.Teacher, got 'vit'; spdfq.load_teacher\(name\) makes one"),
        (None, "teacher: expected a spdfq.Teacher, got None"),
        (spdfq.Teacher, "teacher: expected a spdfq.Teacher, got the class Teacher"),
    ],
)
def test_what_is_no_teacher_is_refused(given, message):
    for call in (
        lambda: spdfq.synthesize(given, "images/gaussian_noise"),
        lambda: spdfq.quantize(given, images(2), "backends/minmax"),
        lambda: spdfq.evaluate(nn.Linear(2, 2), given, TEST),
    ):
        with pytest.raises(ModelError, match=f"^{message}"):
            call()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (images(2).numpy(), r"expected a tensor, got ndarray; give torch.from_numpy\(images\)"),
        (SyntheticImages(images=images(2)), "expected a tensor, got SyntheticImages; give its .images"),
        ([images(2)], r"expected a tensor, got list; give one tensor \[n, C, H, W\]"),
        (images(2)[:0], r"of shape \(0, 3, 32, 32\) do not fit VisionTransformer; it needs \[n, 3x32x32\], n > 0"),
        (images(2).movedim(1, -1), r"of shape \(2, 32, 32, 3\) do not fit"),
        (images(2).byte(), "are torch.uint8, so they are not normalised"),
        (images(2) * torch.nan, "2 of 2 hold NaN or infinite values; leave them out"),
        (torch.cat([images(2), images(1) / 0]), "1 of 3 hold NaN or infinite values; leave them out"),
        (
            torch.rand(2, 3, 32, 32) * 255,
            r"values from .* to 25\d.* are far outside the range of VisionTransformer's normalised pixels, -1 to 1; "
            r"give teacher.normalise\(pixels in 0..1\), for pixels in 0..255 divided by 255",
        ),
    ],
)
def test_images_that_cannot_be_right_are_refused(teacher, given, message):
    with pytest.raises(DataError, match=f"^images:? {message}"):
        spdfq.quantize(teacher, given, "backends/minmax")


def test_images_that_look_as_if_they_were_not_normalised_are_told(teacher):
    with pytest.warns(UserWarning, match="all values are in 0..1, but VisionTransformer takes normalised ones") as told:
        spdfq.quantize(teacher, torch.rand(2, 3, 32, 32), "backends/minmax")
    assert [Path(line.filename) for line in told] == [Path(__file__)]
    with nothing_is_warned():
        raw = spdfq.Teacher(build("vit"), mean=(0, 0, 0), std=(1, 1, 1), num_classes=10)
        spdfq.quantize(raw, torch.rand(2, 3, 32, 32), "backends/minmax")
        spdfq.quantize(teacher, images(2), "backends/minmax")  # standard normal noise


# what does not fit is reported before there are images


@pytest.fixture
def no_images(monkeypatch):
    """A test fails if images are made."""
    monkeypatch.setattr(GaussianNoise, "synthesize", lambda *_: pytest.fail("images were made"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "quantization.overrides.0.roles: TinyViT does not say which module is 'first'; name it under 'sites'"),
        ({"overrides": [], "steps": [{"type": "repq"}]}, "quantization.steps: nothing chooses the ranges"),
        ({"overrides": [{"sites": ["stem.*"], "bits": 8}]}, r"quantization.overrides.0.sites: 'stem.\*' matches no"),
    ],
)
def test_a_back_end_that_does_not_fit_costs_no_images(no_images, changes, message):
    with pytest.raises(RecipeError, match=f"^{message}"):
        spdfq.synthesize(tiny_teacher(), PLAIN | {"quantization": changes})


def test_a_model_without_blocks_costs_no_images_and_no_calibration(no_images):
    module = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
    blocks = spdfq.Teacher(module, mean=(0.5,), std=(0.5,), num_classes=3, input_size=(1, 4, 4))
    data = {"extends": ["images/gaussian_noise", "backends/blockwise"], "quantization": {"overrides": []}}
    bars = Bars()
    for call in (
        lambda: spdfq.synthesize(blocks, data),
        lambda: spdfq.quantize(blocks, torch.randn(2, 1, 4, 4), data, progress=bars),
    ):
        with pytest.raises(RecipeError, match="has no numbered blocks with attention to reconstruct"):
            call()
    assert bars.shown == []


def test_settings_that_are_probably_mistakes_are_warned_of(teacher):
    spec = {"extends": ["backends/repq"], "quantization": {"softmax": {"bits": 5}}}
    expected = "quantization.softmax: 5 bits, but activations have 4"
    with pytest.warns(UserWarning, match=expected) as told:
        spdfq.quantize(teacher, images(2), spec)
    assert [Path(line.filename) for line in told] == [Path(__file__)]
    both = {"extends": ["images/gaussian_noise", "backends/repq"], "quantization": {"softmax": {"bits": 5}}}
    with pytest.warns(UserWarning, match=expected):
        spdfq.synthesize(teacher, both)
    source = OptimizedImages(
        images=1,
        iterations=1,
        sampler=MultiSemanticSampler(),
        target=OneHotTarget(),
        losses={"cross_entropy": CrossEntropyLoss()},
    )
    with pytest.warns(UserWarning, match=r"^synthesis: .*without soft labels is known to lose accuracy"):
        spdfq.synthesize(teacher, source)


# evaluation


def test_the_metrics_are_those_of_a_run(finished):
    trained = load_teacher(finished.recipe.model)
    model = spdfq.load_quantized(finished.folder / "quantized")
    spec = finished.recipe.evaluation
    for dataset in (spec.dataset, spec, finished.recipe, {"type": "image_folder", "root": spec.dataset.root}):
        assert spdfq.evaluate(model, trained, dataset) == finished.metrics
    assert spdfq.evaluate(model, trained, finished.folder / "recipe.toml", batch=3) == finished.metrics
    half = spdfq.evaluate(model, trained, evolve(spec.dataset, limit=5), progress=(bars := Bars()))
    assert (half["images"], bars.shown) == (5, ["full precision", "quantized"])


def test_a_module_that_is_not_quantized_is_not_called_simulated(bundled):
    found = spdfq.evaluate(bundled.module, bundled, FashionMnist(limit=20))
    assert (found["simulated"], found["agreement"], found["fp"]) == (False, 100.0, found["quantized"])


def test_a_module_with_several_outputs_is_measured_by_the_teachers(bundled):
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = bundled.module

        def forward(self, pixels):
            logits = self.net(pixels)
            return {"logits": logits, "negated": -logits}

    described = {"mean": bundled.mean, "std": bundled.std, "num_classes": 10, "input_size": bundled.input_size}
    both = spdfq.Teacher(Both(), **described, output="logits")
    assert spdfq.evaluate(Both(), both, FashionMnist(limit=20))["agreement"] == 100.0
    assert spdfq.evaluate(bundled.module, both, FashionMnist(limit=20))["agreement"] == 100.0


def test_a_backbone_is_measured_by_its_neighbours_in_a_bank():
    teacher = backbone()
    found = spdfq.evaluate(Pooled(), teacher, TEST, bank=TRAIN)
    assert (found["measure"], found["images"], found["bank"], found["similarity"]) == ("k-NN top-1", 40, 60, 1.0)
    assert found == spdfq.evaluate(Pooled(), teacher, EVALUATION)
    with pytest.raises(RecipeError, match=r"evaluation.bank: is required, because own has no head"):
        spdfq.evaluate(Pooled(), teacher, TEST)


def test_damaged_images_are_warned_of_and_named(tmp_path, bundled):
    for label in range(10):
        (tmp_path / str(label)).mkdir()
        (tmp_path / str(label) / "0.png").write_bytes(b"no image")
    pixels, _, _ = next(iter(FashionMnist(limit=1).batches(bundled, 1)))
    grey = (bundled.denormalise(pixels)[0, 0] * 255).byte().numpy()
    Image.fromarray(grey).save(tmp_path / "3" / "good.png")
    with pytest.warns(UserWarning, match="10 images cannot be read and are left out"):
        found = spdfq.evaluate(bundled.module, bundled, ImageFolder(root=str(tmp_path)))
    assert (found["images"], len(found["damaged"])) == (1, 10)


@pytest.mark.parametrize(
    ("model", "dataset", "options", "message"),
    [
        ("x", TEST, {}, "evaluate: model must be an nn.Module, got 'x'"),
        (nn.Linear, TEST, {}, "evaluate: model must be an nn.Module, got the class Linear"),
        (None, [(1, 2)], {}, r"dataset: expected labelled images such as spdfq.data.ImageFolder\(root='val'\), or a"),
        (None, FashionMnist, {}, "dataset: expected labelled images .*, got the class FashionMnist"),
        (None, "images/spdfq", {}, "images/spdfq: has no evaluation section, only synthesis; give one such as"),
        (None, "nothing", {}, "nothing: no shipped recipe of that name"),
        (None, "image_folder", {}, "evaluation.dataset.root: is required"),
        (
            None,
            {"type": "fashion_mnist", "limits": 3},
            {},
            "evaluation.dataset.limits: unknown key; did you mean 'limit'",
        ),
        (None, TEST, {"batch": 0}, "Evaluation.batch: 'batch' must be >= 1"),
        (None, TEST, {"batch": True}, "Evaluation.batch: expected a whole number, got True"),
        (None, TEST, {"bank": "train"}, "Evaluation.bank: expected a dataset such as "),
        (None, TEST, {"bank": TRAIN}, "evaluation.bank: is for models without a head, bundled:vit_fmnist has one"),
        (None, TEST, {"device": "gpu"}, "device: this machine has no gpu device"),
        (nn.Sequential(nn.Flatten(), nn.Linear(784, 7)), TEST, {}, "model: returns 7 logits, but the teacher's num_cl"),
        (nn.Identity(), TEST, {}, r"model: returns float32 \[1, 1, 28, 28\] for one image instead of logits \[1, 10\]"),
        (nn.Linear(3, 3), TEST, {}, r"model: cannot run on one image 1x28x28 \(RuntimeError"),
    ],
    ids=str,
)
def test_what_cannot_be_measured_is_one_line(bundled, model, dataset, options, message):
    with pytest.raises(SpdfqError, match=f"^{message}") as refused:
        spdfq.evaluate(model or bundled.module, bundled, dataset, **options)
    assert "\n" not in str(refused.value)


def test_a_folder_is_named_as_a_dataset_to_be(bundled, tmp_path):
    for folder in (tmp_path, str(tmp_path)):
        with pytest.raises(DataError, match=rf"^dataset: {tmp_path} is a folder; give spdfq.data.ImageFolder\(root="):
            spdfq.evaluate(bundled.module, bundled, folder)


def test_an_evaluation_section_may_be_an_object(bundled):
    assert spdfq.evaluate(bundled.module, bundled, Evaluation(dataset=FashionMnist(limit=7), batch=4))["images"] == 7


# the other functions


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: spdfq.load_teacher(5), "load_teacher: expected a model's name or a ModelSpec, got 5"),
        (
            lambda: spdfq.load_teacher(nn.Linear(2, 2)),
            "load_teacher: expected a model's name or a ModelSpec, got Linear",
        ),
        (lambda: spdfq.load_teacher("x", weights="no"), "load_teacher: weights must be True or False, got 'no'"),
        (lambda: spdfq.run(5), "recipe: expected a Recipe, a name, a .toml path or a dict, got 5"),
        (lambda: spdfq.run("quickstart", overrides="a=b"), "overrides: expected a list of 'key=value' strings"),
        (lambda: spdfq.run("quickstart", out=5), "out: expected the path of a folder, got 5"),
        (lambda: spdfq.run("quickstart", store=5), "store: expected the path of a folder, got 5"),
        (lambda: spdfq.run("quickstart", fresh="no"), "fresh: expected True or False, got 'no'"),
        (lambda: spdfq.run("quickstart", announce=5), "announce: expected a function of one line, got 5"),
        (lambda: spdfq.run("quickstart", progress=5), "progress: expected True, False, None or a RichProgress"),
        (lambda: spdfq.run("quickstart", device="gpu"), "device: this machine has no gpu device; use 'auto' or 'cpu'"),
    ],
)
def test_wrong_arguments_of_the_other_functions_are_one_line(call, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SpdfqError, match=f"^{message}") as refused:
        call()
    assert "\n" not in str(refused.value)
    assert list(tmp_path.iterdir()) == []
