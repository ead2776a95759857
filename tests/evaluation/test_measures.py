"""Quality measures compared with values calculated by hand, and the files that measuring a run writes."""

import json
import math
import re
import shutil

import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from safetensors.torch import load_file
from spdfq_cli.main import main
from support.backends import images as colour_images
from support.backends import teacher

from spdfq.attention import QUERIES_AND_KEYS, record_attention
from spdfq.data import ImageFolder
from spdfq.errors import DataError, ModelError, RecipeError, SpdfqError
from spdfq.evaluation import measures
from spdfq.evaluation.measures import (
    Centroids,
    channel_statistics,
    class_centroids,
    class_features,
    dataset_centroids,
    image_head_similarity,
    measure_images,
    prior_overlap,
    semantic_alignment,
    spectrum_slope,
)
from spdfq.losses.functional import head_similarity
from spdfq.recipe import Evaluation, load_recipe, to_toml
from spdfq.report import write_report, write_sheet
from spdfq.report.image_quality import quality_section
from spdfq.runs.inspection import measure_runs
from spdfq.runtime import Runtime
from spdfq.synth import SyntheticImages
from spdfq.teacher import Teacher
from spdfq.teacher.zoo import data_file

RUNTIME = Runtime()


def exactly(x):
    return pytest.approx(x, rel=1e-5)


# alignment


def test_centroids_are_the_means_of_the_classes():
    features = torch.tensor([[1.0, 0.0], [3.0, 2.0], [0.0, 5.0]])
    found = class_centroids(features, torch.tensor([0, 0, 2]), classes=3)
    assert found.means.tolist() == [[2, 1], [0, 0], [0, 5]]
    assert found.counts.tolist() == [2, 0, 1]


def test_alignment_is_the_mean_cosine_to_the_class_of_each():
    centroids = Centroids(torch.tensor([[2.0, 0.0], [1.0, 1.0]]), torch.tensor([4, 4]))
    features, labels = torch.tensor([[3.0, 0.0], [0.0, 5.0]]), torch.tensor([0, 1])
    assert semantic_alignment(features, labels, centroids) == exactly((1 + math.sqrt(0.5)) / 2)


def test_a_class_without_real_images_is_named():
    centroids = Centroids(torch.ones(3, 2), torch.tensor([1, 0, 1]))
    with pytest.raises(DataError, match="class 1 has no real image; measure on a larger dataset"):
        semantic_alignment(torch.ones(2, 2), torch.tensor([2, 1]), centroids)


@pytest.mark.parametrize("name", ["vit", "deit_distilled", "swin"])
def test_features_are_what_the_classifier_makes_the_logits_of(name):
    chosen = teacher(name)
    batches = colour_images(5).split(2)
    found = list(class_features(chosen, batches, RUNTIME))
    features, logits = torch.cat([pair[0] for pair in found]), torch.cat([pair[1] for pair in found])
    with torch.no_grad():
        assert torch.allclose(logits, chosen.module(colour_images(5)), atol=1e-5)
        if name != "deit_distilled":  # which has two classifiers
            assert torch.allclose(chosen.module.get_classifier()(features), logits, atol=1e-5)
    assert features.shape == (5, 32)


def test_a_module_without_features_is_refused_by_name():
    own = Teacher(torch.nn.Flatten(), mean=(0,), std=(1,), num_classes=16, input_size=(1, 4, 4), name="mine")
    with pytest.raises(ModelError, match="mine: has no forward_features and forward_head"):
        next(class_features(own, [torch.zeros(1, 2)], RUNTIME))


# colour and frequency


def test_channel_statistics_are_over_all_pixels_of_all_images():
    pixels = torch.tensor([[[[0.0, 1.0]], [[0.5, 0.5]]], [[[1.0, 1.0]], [[0.5, 0.5]]]])
    mean, std = channel_statistics(pixels)
    assert mean == [0.75, 0.5]
    assert std == exactly([math.sqrt(3) / 4, 0.0])


def spectrum(exponent, size=(3, 64, 96), count=8):
    """Images whose power falls with the frequency to an exponent, with random phases."""
    height, width = size[1:]
    frequency = (torch.fft.fftfreq(height).unsqueeze(-1) ** 2 + torch.fft.rfftfreq(width) ** 2).sqrt()
    phases = torch.rand(count, size[0], *frequency.shape, generator=torch.Generator().manual_seed(0))
    amplitude = frequency.clamp(min=1e-9) ** (exponent / 2)
    amplitude[0, 0] = 0
    return torch.fft.irfft2(amplitude * torch.exp(2j * math.pi * phases), s=(height, width))


@pytest.mark.parametrize("exponent", [0, -1, -2, -3])
def test_the_slope_is_the_exponent_of_the_power_for_any_contrast_and_brightness(exponent):
    images = spectrum(exponent)
    assert spectrum_slope(images) == pytest.approx(exponent, abs=0.08)
    assert spectrum_slope(3 * images + 0.5) == pytest.approx(spectrum_slope(images), abs=1e-3)


@pytest.mark.parametrize("size", [(6, 6), (6, 12), (12, 7), (9, 9)])
def test_rings_are_as_wide_as_a_cycle_along_the_shorter_side_and_three_are_enough(size):
    frequency = (torch.fft.fftfreq(size[0]).unsqueeze(-1) ** 2 + torch.fft.fftfreq(size[1]) ** 2).sqrt()
    amplitude = (frequency * min(size)).round().clamp(min=1) ** -1
    pixels = torch.fft.ifft2(amplitude).real[None, None]
    assert spectrum_slope(pixels) == pytest.approx(-2, abs=1e-5)
    assert spectrum_slope(pixels[..., :5]) is None


def test_noise_has_no_slope_and_photographs_have_a_steep_one():
    noise = torch.randn(16, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    photographs = load_file(data_file("fmnist_train.safetensors"))["images"].float() / 255
    assert abs(spectrum_slope(noise)) < 0.1
    assert -3.5 < spectrum_slope(photographs) < -1.5


@pytest.mark.parametrize("pixels", [torch.zeros(1, 1, 16, 16), torch.full((2, 3, 16, 16), 0.3), torch.rand(1, 1, 4, 4)])
def test_images_without_a_spectrum_have_no_slope(pixels):
    assert spectrum_slope(pixels) is None


def test_the_slope_does_not_depend_on_how_many_images_are_transformed_at_once(monkeypatch):
    images = spectrum(-2)
    whole = spectrum_slope(images)
    monkeypatch.setattr(measures, "_CHUNK", 1)
    assert spectrum_slope(images) == pytest.approx(whole, rel=1e-9)


# priors and heads


def test_the_overlap_is_the_mass_that_both_maps_share():
    prior = torch.tensor([[[[0.5, 0.5], [0.0, 0.0]]]])
    assert prior_overlap(prior, prior * 7) == exactly(1)
    assert prior_overlap(prior, prior.flip(-2)) == 0
    assert prior_overlap(prior, torch.tensor([[[[0.2, 0.4], [0.4, 0.0]]]])) == exactly(0.2 + 0.4)


def test_the_overlap_is_the_mean_over_images_and_blocks():
    one, other = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    prior = torch.stack([torch.stack([one, one]), torch.stack([one, other])])
    assert prior_overlap(prior, one.expand(2, 2, 1, 2)) == exactly(3 / 4)


@torch.no_grad()
def test_head_similarity_of_images_is_that_of_the_loss_for_any_batch_size():
    chosen = teacher("vit")
    with record_attention(chosen.module, {QUERIES_AND_KEYS}) as record:
        chosen.module(colour_images(5))
    scores = [query[:, :, 1:] @ key[:, :, 1:].mT for query, key in zip(record.queries, record.keys, strict=True)]
    expected = sum(head_similarity(block).item() for block in scores) / 2
    for size in (2, 5):
        assert image_head_similarity(chosen, colour_images(5).split(size), RUNTIME) == pytest.approx(expected, rel=1e-4)


def test_a_model_whose_attention_cannot_be_recorded_is_measured_without_it_and_says_why():
    chosen = teacher("swinv2")
    centroids = Centroids(torch.rand(10, 32), torch.ones(10, dtype=torch.long))
    found = measure_images(colour_images(3), chosen, RUNTIME, centroids, batch=2)
    assert found["head_similarity"] is None
    assert found["notes"][0].startswith(
        "head_similarity: layers.0.blocks.0.attn: multiplies its queries and keys by itself"
    )
    assert found["semantic_alignment"] is not None


def test_the_class_of_an_image_is_the_one_that_the_teacher_predicts():
    chosen, images = teacher("vit"), colour_images(5)
    centroids = Centroids(torch.randn(10, 32), torch.ones(10, dtype=torch.long))
    ((features, logits),) = class_features(chosen, [images], RUNTIME)
    alignments = {n: semantic_alignment(features, logits.topk(10).indices[:, n], centroids) for n in range(10)}
    assert len(set(alignments.values())) == 10
    assert measure_images(images, chosen, RUNTIME, centroids)["semantic_alignment"] == exactly(alignments[0])


def test_images_of_a_class_without_real_images_are_measured_without_alignment():
    centroids = Centroids(torch.rand(10, 32), torch.zeros(10, dtype=torch.long))
    found = measure_images(colour_images(3), teacher("vit"), RUNTIME, centroids)
    assert found["semantic_alignment"] is None
    assert "has no real image; measure on a larger dataset" in found["notes"][0]
    assert 0 < found["head_similarity"] < 1


def test_real_images_that_cannot_be_read_are_named_and_none_is_an_error(tmp_path):
    chosen = teacher("vit")
    for index in range(10):
        (tmp_path / f"c{index}").mkdir()
        Image.new("RGB", (32, 32), (20 * index, 0, 0)).save(tmp_path / f"c{index}/1.png")
    (tmp_path / "c3/1.png").write_bytes(b"no picture")
    spec = Evaluation(dataset=ImageFolder(root=str(tmp_path)))
    centroids = dataset_centroids(chosen, spec, RUNTIME)
    found = measure_images(colour_images(3), chosen, RUNTIME, centroids)
    assert found["real_images"] == 9
    assert found["notes"][0].startswith(
        "semantic_alignment: of the real images, 1 image cannot be read and is left out: c3/1.png ("
    )
    for path in tmp_path.glob("*/1.png"):
        path.write_bytes(b"no picture")
    with pytest.raises(
        DataError, match=r"^evaluation.dataset: none of the 10 images can be read, the first is c0/1.png"
    ):
        dataset_centroids(chosen, spec, RUNTIME)


def test_a_model_without_a_head_names_no_class_and_is_measured_without_alignment():
    chosen = teacher("vit", num_classes=0)
    assert dataset_centroids(chosen, None, RUNTIME) is None
    found = measure_images(colour_images(3), chosen, RUNTIME, None)
    assert (found["semantic_alignment"], found["real_images"]) == (None, 0)
    assert found["notes"] == ["semantic_alignment: the model has no head, so it predicts no class"]
    assert 0 < found["head_similarity"] < 1
    shown = quality_section(found | {"prior_overlap": None})
    assert set(shown["facts"]) == {"Head similarity", "Channel mean", "Channel std", "Spectrum slope"}


# finished runs


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Two test images of each class, in folders."""
    root = tmp_path_factory.mktemp("photos")
    stored = load_file(data_file("fmnist_test.safetensors"))
    for label in range(10):
        (root / str(label)).mkdir()
        for index, pixels in enumerate(stored["images"][stored["labels"] == label][:2]):
            Image.fromarray(pixels.squeeze().numpy()).save(root / str(label) / f"{index}.png")
    return root


def run_folder(folder, photos, images):
    """What measuring reads of a run."""
    folder.mkdir()
    recipe = load_recipe(
        {
            "extends": ["models/vit_fmnist", "images/gaussian_noise", "backends/blockwise"],
            "evaluation": {"dataset": {"type": "image_folder", "root": str(photos)}, "batch": 8},
        }
    )
    (folder / "recipe.toml").write_text(to_toml(recipe.to_dict()))
    record = {
        "name": folder.name,
        "model": {"name": "bundled:vit_fmnist", "parameters": 1, "input_size": [1, 28, 28], "num_classes": 10},
        "images": {"type": "gaussian_noise", "count": len(images.images)},
        "backend": {"label": "W4A4", "placement": "matmul_inputs", "steps": []},
        "metrics": {"images": 20, "fp": {"top1": 90.0}, "quantized": {"top1": 88.5}, "agreement": 95.0},
    }
    (folder / "run.json").write_text(json.dumps(record))
    images.save(folder / "synthetic.safetensors")
    return folder


@pytest.fixture
def noisy(tmp_path, photos):
    noise = torch.randn(3, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    return run_folder(tmp_path / "noisy", photos, SyntheticImages(images=noise))


@pytest.fixture
def photographed(tmp_path, photos):
    stored = load_file(data_file("fmnist_train.safetensors"))["images"][:9].float() / 255
    maps = torch.rand(2, 1, 7, 7, generator=torch.Generator().manual_seed(0))
    images = SyntheticImages(images=(stored - 0.286) / 0.353, prior=maps, reached=2 * maps)
    return run_folder(tmp_path / "photographed", photos, images)


def test_measuring_writes_its_numbers_beside_the_run_and_into_its_report(noisy, photographed):
    rows = measure_runs([noisy, photographed])
    for folder, row in zip((noisy, photographed), rows, strict=True):
        assert json.loads((folder / "measures.json").read_text()) == row
        page = (folder / "report.html").read_text()
        assert re.search(rf"<dt>.*Semantic alignment.*</dt><dd>{row['semantic_alignment']:.2f}</dd>", page)
        assert "(20 real images over all classes)" in " ".join(page.split())
    assert rows[0]["prior_overlap"] is None
    assert rows[1]["prior_overlap"] == exactly(1)
    assert "Prior reached" not in (noisy / "report.html").read_text().split("Head similarity is the")[0]
    assert rows[0]["semantic_alignment"] + 0.05 < rows[1]["semantic_alignment"] <= 1
    assert rows[1]["spectrum_slope"] < -1 < rows[0]["spectrum_slope"]
    assert (rows[0]["source"], rows[0]["quantized_top1"], rows[0]["images"]) == ("gaussian_noise", 88.5, 3)


def test_a_report_without_measures_has_no_such_section(noisy):
    assert "Measures" not in write_report(noisy).read_text()


def test_other_real_images_can_be_given(noisy):
    (row,) = measure_runs([noisy], overrides=["evaluation.dataset={type='fashion_mnist', limit=100}"])
    assert row["real_images"] == 100


def test_the_sheet_has_a_row_of_images_for_each_run(noisy, photographed, tmp_path):
    measure_runs([noisy, photographed], sheet=tmp_path / "sheet.png")
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.mode == "RGBA"
        assert sheet.height == 2 * 96 + 3
        row = sheet.crop((sheet.width - 8 * 99 + 3, 0, sheet.width, 96))
        filled = [row.getpixel((48 + 99 * column, 48))[3] for column in range(8)]
    assert filled == [255] * 3 + [0] * 5  # three images of noise, eight of the nine photographs


def test_images_of_other_shapes_share_a_sheet(tmp_path):
    rows = [("wide", torch.rand(2, 3, 10, 40)), ("tall and long named", torch.rand(1, 1, 200, 50))]
    write_sheet(tmp_path / "sheet.png", rows)
    with Image.open(tmp_path / "sheet.png") as sheet:
        alpha = sheet.getchannel("A")
        right = alpha.crop((sheet.width - 195, 0, sheet.width, sheet.height))
    assert right.crop((0, 0, 96, 96)).getbbox() == (0, 36, 96, 60)
    assert right.crop((0, 99, 96, 195)).getbbox() == (36, 0, 60, 96)


@pytest.mark.parametrize("name", ["sheet.jpg", "nowhere/sheet.png"])
def test_a_sheet_that_cannot_be_written_is_refused(tmp_path, name):
    with pytest.raises(DataError, match=r"the sheet is a \.png file in a folder that exists"):
        write_sheet(tmp_path / name, [("a", torch.rand(1, 1, 4, 4))])


def test_a_folder_without_a_finished_run_is_refused_before_anything_is_written(noisy, tmp_path):
    with pytest.raises(RecipeError, match="not a run folder"):
        measure_runs([noisy, tmp_path])
    (tmp_path / "begun").mkdir()
    shutil.copy(noisy / "recipe.toml", tmp_path / "begun")
    with pytest.raises(DataError, match=r"has no run\.json; measure a finished run"):
        measure_runs([noisy, tmp_path / "begun"])
    with pytest.raises(RecipeError, match="cannot change a finished run"):
        measure_runs([noisy], overrides=["seed=1"])
    assert not (noisy / "measures.json").exists()


def test_the_command_prints_a_row_for_each_run_or_the_numbers(noisy, photographed, tmp_path):
    arguments = ["measure", str(noisy), str(photographed), "--quiet"]
    table = CliRunner().invoke(main, [*arguments, "--sheet", str(tmp_path / "sheet.png")])
    assert table.exit_code == 0
    assert (tmp_path / "sheet.png").exists()
    measured = json.loads((noisy / "measures.json").read_text())
    row = next(line.split() for line in table.stdout.splitlines() if line.split()[:1] == ["noisy"])
    assert row[1:5] == [
        "gaussian_noise",
        "88.50",
        f"{measured['semantic_alignment']:.2f}",
        f"{measured['head_similarity']:.2f}",
    ]
    assert row[5] == "-"
    assert "the classes of 20 real images" in " ".join(table.stdout.split())
    numbers = CliRunner().invoke(main, [*arguments, "--json"])
    assert [found["name"] for found in json.loads(numbers.stdout)] == ["noisy", "photographed"]


def test_no_measures_stay_whose_report_cannot_be_written(noisy):
    (noisy / "sites.json").write_text("[]")
    with pytest.raises(DataError, match=r"sites\.json: damaged"):
        measure_runs([noisy])
    assert not (noisy / "measures.json").exists()


def test_damaged_measures_are_one_clear_error(noisy):
    (noisy / "measures.json").write_text("{}")
    with pytest.raises(SpdfqError, match=r"measures\.json: lacks 'semantic_alignment'"):
        write_report(noisy)


@pytest.mark.parametrize("text", ["{", "{}", '{"images": 3}'])
def test_a_damaged_record_is_one_clear_error(noisy, text):
    (noisy / "run.json").write_text(text)
    with pytest.raises(DataError, match=r"run.json: damaged \(.*\); run the recipe again with --fresh"):
        measure_runs([noisy])
