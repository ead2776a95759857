"""k-NN evaluation of models without a head, and banks that are refused."""

import math

import pytest
import torch
import torch.nn.functional as F
from attrs import evolve
from PIL import Image
from support.backbones import EVALUATION, TEST, TRAIN, Pooled, own
from torch import nn

from spdfq.data import FashionMnist, ImageFolder, LabelledImages
from spdfq.errors import DataError, RecipeError
from spdfq.evaluation import neighbours
from spdfq.evaluation.evaluator import evaluator_for
from spdfq.evaluation.neighbours import NEIGHBOURS, NeighboursEvaluator, nearest_neighbours, similarity
from spdfq.recipe import Evaluation
from spdfq.runtime import Runtime

EVALUATOR = NeighboursEvaluator()
CLASSIFIER = nn.Sequential(nn.Flatten(), nn.Linear(784, 10))

# neighbours and similarity


def test_neighbours_vote_by_the_exponential_of_their_cosine():
    # a query along x: ten bank features along x, of any length, ten at 60 degrees, and ten opposite, beyond the twenty
    x, slant = torch.tensor([1.0, 0.0]), torch.tensor([0.5, math.sqrt(0.75)])
    bank = torch.stack([*(x * (i + 1) for i in range(10)), *(slant * (i + 1) for i in range(10)), *(-x,) * 10])
    labels = torch.tensor([2] * 10 + [0] * 10 + [1] * 10)
    votes = nearest_neighbours(3 * x[None], bank, labels, 3)
    expected = torch.tensor([[10 * math.exp(0.5 / 0.07), 0.0, 10 * math.exp(1 / 0.07)]])
    torch.testing.assert_close(votes, expected, rtol=1e-5, atol=0.0)


def test_chunks_of_queries_vote_as_all_together(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    queries, bank = torch.randn(7, 5, generator=generator), torch.randn(30, 5, generator=generator)
    labels = torch.arange(30) % 4
    whole = nearest_neighbours(queries, bank, labels, 4)
    monkeypatch.setattr(neighbours, "_CHUNK", 60)  # two queries at a time
    torch.testing.assert_close(nearest_neighbours(queries, bank, labels, 4), whole)


def test_similarity_is_the_mean_cosine():
    # cosines 1, -1 and 0.6
    ours = torch.tensor([[2.0, 0.0], [0.0, 1.0], [3.0, 4.0]])
    theirs = torch.tensor([[1.0, 0.0], [0.0, -5.0], [7.0, 0.0]])
    assert similarity(ours, theirs) == pytest.approx(0.6 / 3)


# what is measured


def test_a_reference_is_the_teachers_neighbours_among_the_banks_own_features():
    teacher = own()
    found = EVALUATOR.reference(teacher, EVALUATION, Runtime())
    pixels, labels, _ = next(iter(TEST.batches(teacher, 40)))
    banked, known, _ = next(iter(TRAIN.batches(teacher, 60)))
    with torch.no_grad():
        ours, theirs = teacher.module(pixels), teacher.module(banked)
    cosine = F.cosine_similarity(ours[:, None], theirs[None], dim=-1)
    near = cosine.topk(NEIGHBOURS).indices
    by_hand = torch.stack(
        [
            torch.stack([(cosine[i][near[i]] / 0.07).exp()[known[near[i]] == label].sum() for label in range(10)])
            for i in range(40)
        ]
    )
    torch.testing.assert_close(found.logits, by_hand, rtol=1e-4, atol=1e-3)
    assert torch.equal(found.labels, labels)
    assert torch.equal(found.features, ours)


def test_measuring_the_teacher_itself_finds_no_difference():
    teacher = own()
    fp = EVALUATOR.reference(teacher, EVALUATION, Runtime())
    metrics = EVALUATOR.measure(teacher.module, teacher, EVALUATION, Runtime(), fp)
    assert metrics["quantized"] == metrics["fp"]
    assert (metrics["agreement"], metrics["similarity"]) == (100.0, pytest.approx(1.0))
    assert (metrics["images"], metrics["bank"], metrics["measure"]) == (40, 60, "k-NN top-1")
    assert set(metrics["fp"]) == {"top1"}  # a top-5 of votes would count classes that got none


def test_a_quantized_model_is_judged_by_a_bank_of_its_own_features():
    """Turned by an orthogonal matrix, every feature is far from the teacher's, but its neighbours are the same."""

    class Turned(Pooled):
        def forward(self, images):
            return -super().forward(images)

    teacher = own()
    fp = EVALUATOR.reference(teacher, EVALUATION, Runtime())
    metrics = EVALUATOR.measure(Turned(), teacher, EVALUATION, Runtime(), fp)
    assert metrics["similarity"] == pytest.approx(-1.0)
    assert (metrics["agreement"], metrics["quantized"]) == (100.0, metrics["fp"])


def test_a_stored_reference_reads_back(tmp_path):
    fp = EVALUATOR.reference(own(), EVALUATION, Runtime())
    fp.save(tmp_path / "reference.safetensors")
    again = EVALUATOR.load_reference(tmp_path / "reference.safetensors")
    tensors = ("features", "logits", "labels", "bank_labels")
    assert all(torch.equal(getattr(fp, name), getattr(again, name)) for name in tensors)
    assert again.bank_damaged == fp.bank_damaged == ()


# banks


@pytest.mark.parametrize(
    ("spec", "teacher", "message"),
    [
        (
            Evaluation(dataset=TEST),
            own(),
            "evaluation.bank: is required, because own has no head and is measured by nearest",
        ),
        (Evaluation(dataset=TEST, bank=TEST), own(), "evaluation.bank: is the same as evaluation.dataset"),
        (
            EVALUATION,
            own(CLASSIFIER, classes=10),
            "evaluation.bank: is for models without a head, own has one; leave it out",
        ),
    ],
)
def test_a_bank_is_for_models_without_a_head_and_they_need_one(spec, teacher, message):
    with pytest.raises(RecipeError, match=message):
        evaluator_for(teacher).check(spec, teacher)


def test_a_bank_with_too_few_images_or_other_classes_is_refused(tmp_path):
    with pytest.raises(DataError, match="has 19 readable images; at least 20 are needed"):
        EVALUATOR.reference(own(), evolve(EVALUATION, bank=evolve(TRAIN, limit=19)), Runtime())
    EVALUATOR.reference(own(), evolve(EVALUATION, bank=evolve(TRAIN, limit=20)), Runtime())
    (tmp_path / "only").mkdir()
    with pytest.raises(DataError, match=r"evaluation.bank: has 1 classes, evaluation.dataset 10"):
        EVALUATOR.reference(own(), evolve(EVALUATION, bank=ImageFolder(root=str(tmp_path))), Runtime())


def test_images_of_the_bank_that_cannot_be_read_are_counted_out_named_and_the_same_for_both_models(tmp_path):
    for index in range(24):
        path = tmp_path / f"class{index % 2}" / f"{index:02}.png"
        path.parent.mkdir(exist_ok=True)
        Image.new("L", (28, 28), 10 * index).save(path)
    broken, teacher = tmp_path / "class0/02.png", own()
    whole = broken.read_bytes()
    broken.write_bytes(whole[:40])
    val = tmp_path / "val"
    for name in ("class0", "class1"):
        (val / name).mkdir(parents=True)
        Image.new("L", (28, 28), 255).save(val / name / "1.png")
    (tmp_path / "bank").mkdir()
    for name in ("class0", "class1"):
        (tmp_path / name).rename(tmp_path / "bank" / name)
    spec = evolve(EVALUATION, dataset=ImageFolder(root=str(val)), bank=ImageFolder(root=str(tmp_path / "bank")))
    fp = EVALUATOR.reference(teacher, spec, Runtime())
    metrics = EVALUATOR.measure(teacher.module, teacher, spec, Runtime(), fp)
    assert (metrics["bank"], metrics["damaged"]) == (23, [])
    (line,) = metrics["bank_damaged"]
    assert line.startswith("class0/02.png (")
    (tmp_path / "bank/class0/02.png").write_bytes(whole)
    with pytest.raises(DataError, match=r"^evaluation\.bank: class0/02.png .* could be read for only one of the two"):
        EVALUATOR.measure(teacher.module, teacher, spec, Runtime(), fp)
    again = EVALUATOR.measure(teacher.module, teacher, spec, Runtime(), EVALUATOR.reference(teacher, spec, Runtime()))
    assert (again["bank"], again["test_images"]) == (24, metrics["test_images"])
    assert again["bank_images"] != metrics["bank_images"]


def test_a_bank_of_other_class_folders_is_refused_by_the_first_that_differs(tmp_path):
    for name in ("bank/ant", "bank/bee", "bank/cat", "val/bee", "val/cat", "val/jay"):
        (tmp_path / name).mkdir(parents=True)
        Image.new("L", (28, 28)).save(tmp_path / name / "1.png")
    bank, val = (ImageFolder(root=str(tmp_path / name)) for name in ("bank", "val"))
    with pytest.raises(DataError, match=r"^evaluation.bank: class 0 is ant, in evaluation.dataset bee; labels are pos"):
        EVALUATOR.reference(own(), evolve(EVALUATION, dataset=val, bank=bank), Runtime())


def test_images_that_are_in_the_bank_too_are_refused_under_any_path(tmp_path):
    photos, links = tmp_path / "photos", tmp_path / "links"
    for index in range(6):
        folder = photos / f"class{index % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("L", (28, 28), index).save(folder / f"{index}.png")
    links.symlink_to(photos)
    spec = evolve(EVALUATION, dataset=ImageFolder(root=str(photos), limit=3), bank=ImageFolder(root=str(links)))
    EVALUATOR.check(spec, own())
    with pytest.raises(DataError, match=r"evaluation.bank: shares 3 images with evaluation.dataset, .*photos/class0/"):
        EVALUATOR.reference(own(), spec, Runtime())
    farm = tmp_path / "farm"
    for path in photos.glob("*/*"):
        (farm / path.parent.name).mkdir(parents=True, exist_ok=True)
        (farm / path.parent.name / f"other{path.name}").symlink_to(path)
    with pytest.raises(DataError, match=r"evaluation.bank: shares 3 images with evaluation.dataset, .*photos/class0/"):
        EVALUATOR.reference(own(), evolve(spec, bank=ImageFolder(root=str(farm))), Runtime())
    with pytest.raises(DataError, match=r"shares 7 images with evaluation.dataset, the first of them fmnist_test"):
        EVALUATOR.reference(own(), evolve(EVALUATION, bank=evolve(TEST, limit=7)), Runtime())


def test_a_dataset_that_cannot_name_its_images_is_measured_all_the_same():
    class Nameless(FashionMnist):
        identities = LabelledImages.identities

    found = EVALUATOR.reference(own(), evolve(EVALUATION, bank=Nameless(split="train", limit=60)), Runtime())
    assert len(found.labels) == 40


def test_a_bank_of_bare_numbers_has_the_classes_of_the_dataset():
    class Bare(FashionMnist):
        classes = None

    found = EVALUATOR.reference(own(), evolve(EVALUATION, bank=Bare(split="train", limit=60)), Runtime())
    assert found.logits.shape == (40, 10)
    with pytest.raises(DataError, match=r"evaluation.bank: has label 9, but the other one's classes are 0 to 4"):
        neighbours._check_labels(5, torch.tensor([9]), torch.tensor([4]))
    with pytest.raises(DataError, match=r"evaluation.dataset: has label 5, but the other one's classes are 0 to 4"):
        neighbours._check_labels(5, torch.tensor([4]), torch.tensor([5]))
