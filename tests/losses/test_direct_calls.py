"""Losses called without a recipe: what each needs, and one line for each thing that is missing or wrong."""

import re

import pytest
import torch
from support.docs import DOCS, text
from support.losses import pictures, random
from support.networks import build

from spdfq.attention import NEEDS, AttentionRecord, record_attention
from spdfq.errors import SpdfqError
from spdfq.losses import (
    AttentionPriorLoss,
    CrossEntropyLoss,
    FrequencyConsistencyLoss,
    GaussianMixturePrior,
    HeadSimilarityLoss,
    LaplacePrior,
    SoftCrossEntropyLoss,
    TeacherStudentDiscrepancyLoss,
    TotalVariationLoss,
    attention_prior_loss,
    draw_priors,
    functional,
)
from spdfq.registry import losses
from spdfq.runtime import Draws, generator
from spdfq.synth import label_mask

PAGE = text(DOCS / "components-without-recipes.md")
INPUTS = {name: re.findall(r"`(\w+)`", inputs) for name, inputs in re.findall(r"^\| `(\w+)` \| (.*) \|$", PAGE, re.M)}
OPTIONAL = {"iteration", "iterations", "view_weights", "target"}


@pytest.fixture(scope="module")
def model():
    return build("vit").requires_grad_(False)


@pytest.fixture(scope="module")
def recorded(model):
    """Images, logits, a record of everything, and other inputs for the losses."""
    images = pictures(2).requires_grad_()
    with record_attention(model, NEEDS) as record:
        logits = model(images)
    return {
        "images": images,
        "record": record,
        "logits": logits,
        "labels": label_mask([0, 1], logits.shape[1]),
        "targets": random(*logits.shape).softmax(-1),
        "view_weights": torch.full((2,), 0.5),
        "forward": model,
        "student_logits": logits.detach() + 1,
        "student_attention": record,
        "draws": Draws(),
        "iteration": 3,
        "iterations": 9,
    }


def given(recorded, names):
    """The arguments of `Loss.of` with these inputs."""
    chosen = {name: recorded[name] for name in names if name not in ("record", "target")}
    return (recorded["images"], *([recorded["record"]] if "record" in names else [])), chosen


def one_line(call):
    with pytest.raises(SpdfqError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("name", INPUTS)
def test_a_loss_is_called_with_the_inputs_on_the_page(recorded, name):
    args, named = given(recorded, INPUTS[name])
    value = losses.get(name)().of(*args, **named)
    assert value.shape == ()
    assert value.isfinite()
    (gradient,) = torch.autograd.grad(value, recorded["images"], retain_graph=True)
    assert gradient.isfinite().all()
    assert torch.equal(losses.get(name)().of(*args, **named), value), "asked twice, it is the same"


@pytest.mark.parametrize(("name", "left_out"), [(n, i) for n in INPUTS for i in INPUTS[n] if i not in OPTIONAL])
def test_a_missing_input_is_named_in_one_line(recorded, name, left_out):
    if (name, left_out) == ("total_variation", "draws"):
        loss, (args, named) = TotalVariationLoss(target=(1.0, 2.0)), given(recorded, [])
    else:
        loss, (args, named) = losses.get(name)(), given(recorded, [i for i in INPUTS[name] if i != left_out])
    expected = "attention holds no " if left_out == "record" else f"got no {left_out}; "
    assert one_line(lambda: loss.of(*args, **named)).startswith(f"{name}: {expected}")


# random draws


def test_every_image_block_and_head_has_a_map_of_its_own(recorded):
    for source in (generator(0), Draws()):
        maps = draw_priors(recorded["record"], GaussianMixturePrior(), source)
        assert [block.shape for block in maps] == [row.shape for row in recorded["record"].class_attention]
        flat = torch.cat([block.flatten(0, 1) for block in maps])
        assert len(flat.unique(dim=0)) == len(flat) == 2 * 2 * 2
        assert torch.allclose(flat.sum(-1), torch.ones(len(flat)), atol=1e-5)


def test_another_group_draws_other_maps_and_the_same_group_the_same(recorded):
    drawn = [draw_priors(recorded["record"], LaplacePrior(), draws) for draws in (Draws(), Draws(), Draws(group=1))]
    assert all(torch.equal(*pair) for pair in zip(drawn[0], drawn[1], strict=True))
    for first, other in zip(drawn[0], drawn[2], strict=True):
        assert (first - other).abs().amax(-1).min() > 1e-3
    source = generator(0)
    one, two = (draw_priors(recorded["record"], LaplacePrior(), source)[0] for _ in range(2))
    assert (one - two).abs().amax(-1).min() > 1e-3
    values = [
        AttentionPriorLoss().of(recorded["images"], recorded["record"], draws=Draws(group=group)).item()
        for group in (0, 1, 0)
    ]
    assert values[0] == values[2] != values[1]


def test_draws_are_those_of_a_run():
    from spdfq.runtime import Runtime

    expected = Runtime(seed=5).generator("group", 3, "attention_prior", "prior", 2)
    assert torch.equal(Draws(5, 3).scoped("attention_prior").generator("prior", 2).get_state(), expected.get_state())


def test_priors_before_the_start_are_empty_and_not_read(recorded):
    record = recorded["record"]
    last = len(record.class_attention) - 1
    priors = draw_priors(record, GaussianMixturePrior(), Draws(), start=last)
    assert [prior.numel() > 0 for prior in priors] == [index == last for index in range(last + 1)]
    assert attention_prior_loss(record.class_attention, priors, last).isfinite()


def test_two_losses_do_not_share_draws_and_draws_do_not_serve_two_batches(recorded):
    images, record, draws = recorded["images"], recorded["record"], Draws()
    AttentionPriorLoss().of(images, record, draws=draws)
    other = AttentionPriorLoss(prior=LaplacePrior())
    assert "another attention_prior has these draws" in one_line(lambda: other.of(images, record, draws=draws))
    assert other.of(images, record, draws=draws.scoped("second")).isfinite()
    smaller = AttentionRecord(
        names=record.names, grids=record.grids, class_attention=[row[:1] for row in record.class_attention]
    )
    message = one_line(lambda: AttentionPriorLoss().of(images[:1], smaller, draws=draws))
    assert "these draws are those of 2 images" in message


# mistakes


def test_a_record_of_crops_too_is_refused(model):
    images = pictures(2)
    for name, crops in (("vit", 1), ("vit", 2), ("swin", 3)):
        network = model if name == "vit" else build(name)
        with record_attention(network, HeadSimilarityLoss.needs) as record:
            logits = network(torch.cat([images, pictures(crops)]))
        message = one_line(lambda record=record, logits=logits: HeadSimilarityLoss().of(images, record, logits=logits))
        assert "give rows=2 to record_attention" in message


def test_windows_count_as_windows():
    network, images = build("swin"), pictures(2)
    with record_attention(network, HeadSimilarityLoss.needs) as record:
        logits = network(images)
    assert len(record.queries[0]) > 2
    assert HeadSimilarityLoss().of(images, record, logits=logits).isfinite()


def of(loss, **changed):
    """A call of a loss with the inputs, some of them changed."""

    def call(known):
        args, named = given(known, [name for name in INPUTS[losses.label(loss)] if name not in changed])
        args = (changed.get("images", args[0]), *(changed.get("record", arg) for arg in args[1:]))
        return loss.of(*args, **named, **{key: value for key, value in changed.items() if key not in ("images",)})

    return call


LOGITS = torch.zeros(2, 10)
MISTAKES = {
    "give the images first": lambda known: AttentionPriorLoss().of(known["record"], known["images"]),
    "a generator forgets what it drew": of(AttentionPriorLoss(), generator=generator(0)),
    "draws: expected a Draws, got a Generator": of(AttentionPriorLoss(), draws=generator(0)),
    "forward: expected a Callable, got 3": of(FrequencyConsistencyLoss(), forward=3),
    "logit: unknown key; did you mean 'logits'": of(SoftCrossEntropyLoss(), logit=LOGITS),
    "images: expected a Tensor, got a ndarray": of(TotalVariationLoss(), images=LOGITS.numpy()),
    r"images must be \[B, C, h, w\], got \[3, 32, 32\]": of(TotalVariationLoss(), images=torch.zeros(3, 32, 32)),
    r"logits must be \[B, K\], got \[2, 5, 10\]": of(CrossEntropyLoss(), logits=torch.zeros(2, 5, 10)),
    r"label_mask\) must be \[B, K\], got \[2\]": of(CrossEntropyLoss(), labels=torch.tensor([1, 2])),
    r"targets and logits must both be \[B, K\], got \[2, 9\]": of(SoftCrossEntropyLoss(), targets=torch.zeros(2, 9)),
    "student_logits and logits of the images must both be": of(
        TeacherStudentDiscrepancyLoss(), student_logits=LOGITS[:, :1]
    ),
    "iteration is 9, but there are 9": of(FrequencyConsistencyLoss(), iteration=9),
    "5 logits of 2 images, but no view_weights": lambda known: SoftCrossEntropyLoss().of(
        known["images"], logits=torch.zeros(5, 10), targets=torch.zeros(5, 10)
    ),
    "prior must be a prior such as .*, got 3": lambda known: draw_priors(known["record"], 3, Draws()),
    "got the class LaplacePrior": lambda known: draw_priors(known["record"], LaplacePrior, Draws()),
    "generator must be a torch.Generator, .* got 3": lambda known: draw_priors(known["record"], LaplacePrior(), 3),
    "no class_attention in the record": lambda known: draw_priors(AttentionRecord(), LaplacePrior(), Draws()),
    "attention and prior must be lists": lambda known: attention_prior_loss(known["record"], [], 0),
    r"block 0 must be \[B, heads, K\], got \[2, 10\]": lambda _: attention_prior_loss([LOGITS], [LOGITS], 0),
    "scale must be one of": lambda _: attention_prior_loss([], [], 0, "mean"),
    "count must be a whole number from 1 up, got 0": lambda _: LaplacePrior().sample(0, (4, 4), generator(0)),
    r"grid must be \(height, width\), .* got 4": lambda _: LaplacePrior().sample(1, 4, generator(0)),
    "generator must be .* got None": lambda _: LaplacePrior().sample(1, (4, 4), None),
    "rows must be": lambda _: functional.attention_entropy(LOGITS),
    "target and logits must both be": lambda _: functional.soft_cross_entropy(LOGITS, LOGITS[:1]),
    "labels must be 2 class indices of 0 to 9": lambda _: functional.cross_entropy(LOGITS, torch.tensor([1, 10])),
    "scores must be": lambda _: functional.head_similarity(LOGITS),
    "features must be": lambda _: functional.patch_similarity_entropy(LOGITS),
    "grid must be": lambda _: functional.patch_contrast(torch.zeros(1, 9, 2), 3),
    "expected 1 to 7 positives": lambda _: functional.patch_contrast(torch.zeros(1, 9, 2), (3, 3), 8),
    "radius must be a finite number": lambda _: functional.frequency_split(torch.zeros(1, 1, 4, 4), "low"),
    "high and low must both be": lambda _: functional.frequency_consistency(LOGITS, LOGITS[:1]),
    "teacher and mask must both be": lambda _: functional.masked_attention_distance(LOGITS, LOGITS, LOGITS[:1]),
    "diagonal must be a finite number": lambda _: functional.total_variation(torch.zeros(1, 1, 4, 4), None),
}


@pytest.mark.parametrize("message", MISTAKES)
def test_a_mistake_is_one_line(recorded, message):
    assert re.search(message, one_line(lambda: MISTAKES[message](recorded)))
