"""Accuracy on labelled images, unreadable images, and interrupted evaluations."""

import math
import os
import signal
from itertools import count
from types import SimpleNamespace

import pytest
import torch
from attrs import frozen
from safetensors import safe_open
from support.accuracy import BATCH, evaluated, stopping
from support.data import GREY, RED, Means, names, shade, teacher, write
from support.second_device import second_device, transfers

from spdfq.data import FashionMnist, ImageFolder
from spdfq.errors import DataError, NonFiniteError
from spdfq.evaluation import predictions
from spdfq.evaluation.accuracy import LogitsEvaluator, accuracy, agreement, another_order, left_out
from spdfq.evaluation.predictions import Predictions
from spdfq.recipe import Evaluation
from spdfq.runtime import Runtime
from spdfq.runtime.ranks import Ranks

COUNT = 11
EVALUATOR = LogitsEvaluator()


@pytest.fixture
def folder(tmp_path):
    """``folder({"cat": {"a.png": colour}})`` writes 8×8 images of one colour and gives the dataset."""

    def make(classes, **options):
        write(tmp_path / "images", classes)
        return ImageFolder(root=str(tmp_path / "images"), **options)

    return make


class Steps:
    """A progress bar that records its calls."""

    def __init__(self):
        self.total, self.moved = None, []

    def __call__(self, _, total):
        self.total = total
        return self

    def __enter__(self):
        return self.moved.append

    def __exit__(self, *_):
        pass


# numbers


def test_accuracy_of_a_case_done_by_hand():
    logits = torch.tensor([[3.0, 1, 0, 0, 0, 2], [3, 1, 0, 0, 0, 2], [0, 5, 4, 3, 2, 1], [0, 5, 4, 3, 2, 1]])
    labels = torch.tensor([0, 5, 1, 0])
    # first and third are right; the second is second best, the fourth the worst of six
    assert accuracy(logits, labels) == {"top1": 50.0, "top5": 75.0}
    assert accuracy(logits[:, :3], torch.tensor([0, 0, 2, 1])) == {"top1": 75.0}


@pytest.mark.parametrize("classes", [6, 7, 20])
def test_the_five_best_classes_count_and_no_others(classes):
    logits = torch.arange(float(classes)).flip(0).expand(classes, classes)  # class 0 is the best of each image
    assert accuracy(logits, torch.arange(classes)) == {"top1": 100 / classes, "top5": 500 / classes}
    assert accuracy(logits[:5, :5], torch.arange(5)) == {"top1": 20.0}


def predicting(classes):
    """Logits whose highest is that of the class asked for."""
    return torch.eye(10)[torch.as_tensor(classes)]


def test_classes_in_another_order_are_seen_in_the_predictions():
    labels = torch.arange(10).repeat(5)
    shifted = (labels + 1) % 10
    shifted[:4] = 7
    assert another_order(predicting(shifted), labels) == (
        "evaluation.dataset: top-1 is 0.00 %, but would be 92.00 % if each class had the index that the model predicts "
        "most often for it; the classes are in a different order than the model's"
    )
    assert another_order(predicting(labels), labels) is None
    assert another_order(predicting(torch.full_like(labels, 3)), labels) is None, "a model that has learnt nothing"
    generator = torch.Generator().manual_seed(0)
    assert another_order(torch.randn(50, 10, generator=generator), labels) is None
    assert another_order(predicting(shifted)[:49], labels[:49]) is None, "too few images"


def test_agreement_of_a_case_done_by_hand():
    ours, theirs = torch.tensor([[1.0, 0], [0, 1], [0, 1], [1, 0]]), torch.tensor([[2.0, 1], [2, 1], [1, 2], [3, 0]])
    assert agreement(ours, theirs) == 75.0


def test_every_image_is_evaluated_once_in_evaluation_mode(folder):
    dataset = folder({"a": {f"{i}.png": GREY for i in range(4)}, "b": {f"{i}.png": RED for i in range(4)}})
    owner, steps = teacher(), Steps()
    owner.module.train()
    found = evaluated(owner.module, owner, dataset, progress=steps)
    # grey: every channel (0.2 - 0.5) / 0.25; red: (2 - 2 - 2) / 3
    grey, red = pytest.approx([-1.2, -2.4], abs=1e-6), pytest.approx([-2 / 3, -4 / 3])
    assert found.logits.tolist() == [grey] * 4 + [red] * 4
    assert found.labels.tolist() == [0] * 4 + [1] * 4
    assert found.damaged == ()
    assert not found.logits.requires_grad
    assert owner.module.training
    assert (steps.total, steps.moved) == (8, [3, 3, 2])


def test_logits_are_read_while_an_accelerator_computes_the_next_batch(folder):
    dataset, read = folder({"a": {f"{i}.png": GREY for i in range(4)}, "b": {f"{i}.png": RED for i in range(4)}}), []
    plain = evaluated(teacher().module, teacher(), dataset)
    with second_device() as device, transfers() as events:
        owner = teacher()
        owner.module.to(device)
        owner.module.register_forward_hook(lambda *_: read.append(events["copy from the device"]))
        found = evaluated(owner.module, owner, dataset, device=device)
    assert read == [0, 0, 1]
    assert events["copy from the device"] == 3
    assert torch.equal(found.logits, plain.logits)
    assert torch.equal(found.labels, plain.labels)


def test_the_precision_is_that_of_the_evaluation_section(folder):
    dataset, seen = folder({"a": {"a.png": GREY}, "b": {"b.png": RED}}), []
    owner = teacher()
    owner.module.register_forward_hook(lambda *_: seen.append(torch.is_autocast_enabled("cpu")))
    for precision in ("float32", "bfloat16"):
        spec = Evaluation(dataset=dataset, precision=precision)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = EVALUATOR.reference(owner, spec, Runtime(precision="bfloat16"))
        assert found.logits.dtype == torch.float32
    assert seen == [False, True]


@pytest.mark.parametrize("classes", [1 + 1, 4])
def test_a_dataset_of_more_or_fewer_classes_than_the_model_is_refused(folder, classes):
    dataset = folder({name: {"1.png": RED} for name in "abc"})
    with pytest.raises(
        DataError, match=f"^evaluation.dataset: has 3 classes, Means knows {classes}; labels are positions"
    ):
        evaluated(Means(classes), teacher(classes), dataset)
    with pytest.raises(DataError, match="has 10 classes, Means knows 2"):
        evaluated(Means(2), teacher(2), FashionMnist())


def test_logits_that_are_not_finite_are_refused(folder):
    dataset = folder({"a": {"1.png": RED}, "b": {"1.png": RED}})
    owner = teacher()
    owner.module.scale.data.fill_(float("nan"))
    with pytest.raises(NonFiniteError, match="fp: the logits of 2 of 2 images are NaN or infinite"):
        evaluated(owner.module, owner, dataset)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_one_logit_that_is_not_finite_is_enough(folder, value):
    owner = teacher()
    owner.module.register_forward_hook(lambda _, __, logits: logits.__setitem__((0, 1), value))
    with pytest.raises(NonFiniteError, match="fp: the logits of 1 of 2 images are NaN or infinite"):
        evaluated(owner.module, owner, folder({"a": {"1.png": RED}, "b": {"1.png": RED}}))


# damaged images

DAMAGED = {"a": {"0.png": GREY, "1.png": None, "2.png": GREY}, "b": {"0.png": RED, "1.png": RED, "2.png": None}}


def test_accuracy_is_that_of_the_images_that_can_be_read_and_the_others_are_named(folder):
    spec, owner = Evaluation(dataset=folder(DAMAGED), batch=2), teacher()
    steps = Steps()
    fp = EVALUATOR.reference(owner, spec, Runtime(progress=steps))
    assert (names(fp.damaged), fp.labels.tolist()) == (("a/1.png", "b/2.png"), [0, 0, 1, 1])
    assert (steps.total, steps.moved) == (6, [2, 2, 2]), "the bar counts them as done"
    metrics = EVALUATOR.measure(owner.module, owner, spec, Runtime(), fp)
    assert (metrics["images"], names(metrics["damaged"])) == (4, ("a/1.png", "b/2.png"))
    # every mean is negative, so the smaller factor wins: class 0 everywhere
    assert metrics["fp"] == metrics["quantized"] == {"top1": 50.0}
    assert metrics["agreement"] == 100.0


def test_both_models_must_have_seen_the_same_images(folder, tmp_path):
    spec, owner = Evaluation(dataset=folder(DAMAGED)), teacher()
    fp = EVALUATOR.reference(owner, spec, Runtime())
    good = (tmp_path / "images/a/0.png").read_bytes()
    (tmp_path / "images/a/1.png").write_bytes(good)
    (tmp_path / "images/a/0.png").write_bytes(good[:40])
    with pytest.raises(
        DataError,
        match=r"^evaluation\.dataset: a/0\.png \(.*\), a/1\.png \(.*\) could be read for only one of the two models",
    ):
        EVALUATOR.measure(owner.module, owner, spec, Runtime(), fp)


def test_images_that_are_all_damaged_are_an_error(folder):
    dataset = folder({"a": {"0.png": None, "1.png": None}, "b": {"0.png": None}})
    with pytest.raises(
        DataError, match=r"^evaluation\.dataset: none of the 3 images can be read, the first is a/0.png \(\w"
    ):
        evaluated(Means(2), teacher(), dataset, batch=2)


def test_the_line_on_damaged_images_names_the_first_five():
    assert left_out(("a",)) == "1 image cannot be read and is left out: a"
    assert (
        left_out(tuple(map(str, range(2007))))
        == "2,007 images cannot be read and are left out: 0, 1, 2, 3, 4 and 2,002 more"
    )


def test_predictions_are_read_back_as_they_were(tmp_path):
    stored = Predictions(torch.randn(3, 4), torch.tensor([1, 0, 3]), ("a, b", "ü"))
    stored.save(tmp_path / "p.safetensors")
    read = Predictions.load(tmp_path / "p.safetensors")
    assert read.logits.equal(stored.logits)
    assert read.labels.equal(stored.labels)
    assert read.damaged == stored.damaged


# interrupted


class Interrupted(Exception):
    pass


def eleven(folder):
    """Eleven images of their own shades in two classes, the fifth of them damaged."""
    shades = {f"{index:02d}.png": None if index == 4 else shade(10 * index) for index in range(COUNT)}
    return folder({"a": dict(list(shades.items())[:6]), "b": dict(list(shades.items())[6:])})


def interrupt():
    raise Interrupted


@pytest.fixture
def save_always(monkeypatch):
    monkeypatch.setattr(predictions, "SAVE_SECONDS", 0.0)


def same(first, second):
    return first.logits.equal(second.logits) and first.labels.equal(second.labels) and first.damaged == second.damaged


@pytest.mark.parametrize("batches", range(6))
def test_an_evaluation_resumed_after_any_batch_is_the_uninterrupted_one_to_the_bit(
    folder, tmp_path, save_always, batches
):
    dataset, owner = eleven(folder), teacher()
    hook = stopping(owner, batches, interrupt)
    with pytest.raises(Interrupted):
        evaluated(owner.module, owner, dataset, BATCH, tmp_path / "state")
    hook.remove()
    owner.module.seen = 0
    steps = Steps()
    resumed = evaluated(owner.module, owner, dataset, BATCH, tmp_path / "state", progress=steps)
    done = sum((2, 2, 1, 2, 2, 1)[:batches])  # the third batch has a damaged image
    assert owner.module.seen == 10 - done, "finished batches are not computed again"
    assert (steps.total, sum(steps.moved)) == (COUNT, COUNT)
    assert steps.moved[0] == (2 * batches or 2), "the bar starts where it stood"
    assert same(resumed, evaluated(owner.module, owner, dataset, BATCH))
    assert names(resumed.damaged) == ("a/04.png",)


def test_an_evaluation_that_had_finished_every_batch_computes_none(folder, tmp_path, save_always):
    dataset, owner = eleven(folder), teacher()
    first = evaluated(owner.module, owner, dataset, BATCH, tmp_path / "state")
    owner.module.seen = 0
    assert same(evaluated(owner.module, owner, dataset, BATCH, tmp_path / "state"), first)
    assert owner.module.seen == 0


def test_batches_are_written_every_few_seconds_and_each_once(folder, tmp_path, monkeypatch):
    ticks = count(step=2)  # a clock that moves on by two seconds each time it is read
    monkeypatch.setattr(predictions, "time", SimpleNamespace(monotonic=lambda: next(ticks)))
    dataset, owner = eleven(folder), teacher()
    evaluated(owner.module, owner, dataset, BATCH, tmp_path)
    starts = {}
    for path in tmp_path.glob("*.safetensors"):
        with safe_open(path, "pt") as stored:
            starts[path.stem] = sorted(int(name.split(".")[0]) for name in stored.keys() if "logits" in name)  # noqa: SIM118
    # of six batches three take six seconds; the last two readings are those of saving
    assert starts == {"000000000": [0, 2, 4], "000000006": [6, 8, 10]}


def test_without_a_folder_nothing_is_written(folder, tmp_path, save_always):
    dataset, owner = eleven(folder), teacher()
    before = sorted(tmp_path.rglob("*"))
    evaluated(owner.module, owner, dataset, BATCH)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_damaged_state_is_one_clear_line(folder, tmp_path, save_always):
    dataset, owner = eleven(folder), teacher()
    evaluated(owner.module, owner, dataset, BATCH, tmp_path / "state")
    path = tmp_path / "state/000000004.safetensors"
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(DataError, match=r"000000004.safetensors: damaged or missing .*; delete it, or use --fresh"):
        evaluated(owner.module, owner, dataset, BATCH, tmp_path / "state")


def test_a_killed_process_is_taken_up_where_it_stood(folder, tmp_path, save_always):
    dataset, owner = eleven(folder), teacher()
    if not (child := os.fork()):
        try:
            stopping(owner, 4, lambda: os.kill(os.getpid(), signal.SIGKILL))
            evaluated(owner.module, owner, dataset, BATCH, tmp_path / "state")
        finally:
            os._exit(1)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    whole = evaluated(owner.module, owner, dataset, BATCH)
    owner.module.seen = 0
    assert same(evaluated(owner.module, owner, dataset, BATCH, tmp_path / "state"), whole)
    assert owner.module.seen == 3


# several processes


@frozen
class Played(Ranks):
    """One of two processes, run one after the other; ``told`` is what rank 0 found, ``others`` what the others did."""

    told: object = None
    others: tuple = ()

    def first(self, make):
        return make() if self.leads else self.told

    def gathered(self, value):
        if not self.leads:
            raise Finished(value)
        return [value, *self.others]


class Finished(Exception):
    pass


def left_after_one_batch(owner, dataset, state):
    hook = stopping(owner, 1, interrupt)
    with pytest.raises(Interrupted):
        evaluated(owner.module, owner, dataset, BATCH, state)
    hook.remove()
    owner.module.seen = 0


def share_of_the_second(owner, dataset, state):
    with pytest.raises(Finished) as second:
        evaluated(owner.module, owner, dataset, BATCH, state, ranks=Played(1, 2, told=[0]))
    return second.value.args[0]


def test_two_processes_share_what_a_single_one_left(folder, tmp_path, save_always):
    dataset, owner = eleven(folder), teacher()
    left_after_one_batch(owner, dataset, tmp_path / "state")
    share = share_of_the_second(owner, dataset, tmp_path / "elsewhere")
    assert sorted(share) == [4, 8], "of the batches at 2, 4, 6, 8 and 10"
    owner.module.seen = 0
    both = evaluated(owner.module, owner, dataset, BATCH, tmp_path / "state", ranks=Played(0, 2, others=(share,)))
    assert owner.module.seen == 5, "those at 2, 6 and 10"
    assert same(both, evaluated(owner.module, owner, dataset, BATCH))


def test_a_single_process_takes_up_what_two_left(folder, tmp_path, monkeypatch):
    dataset, owner = eleven(folder), teacher()
    with monkeypatch.context() as patch:
        patch.setattr(predictions, "SAVE_SECONDS", 0.0)
        left_after_one_batch(owner, dataset, tmp_path / "state")
    share_of_the_second(owner, dataset, tmp_path / "state")  # it has finished, and waits for the first
    owner.module.seen = 0
    alone = evaluated(owner.module, owner, dataset, BATCH, tmp_path / "state")
    assert owner.module.seen == 5
    assert same(alone, evaluated(owner.module, owner, dataset, BATCH))
