"""Samplers: positions, pixels and gradients of the crops."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from spdfq.errors import SpdfqError
from spdfq.synth import CropPlan, MultiSemanticSampler, WholeImageSampler

few = settings(deadline=None, max_examples=30)
SAMPLERS = st.builds(
    MultiSemanticSampler,
    st.integers(1, 4),
    layout=st.sampled_from(["cells", "split"]),
    jitter=st.floats(0.0, 0.3),
)
sizes = st.tuples(st.integers(4, 40), st.integers(4, 40))
seeds = st.integers(0, 2**32)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def random(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=seeded(seed), dtype=dtype)


def mask_of(box, size):
    mask = torch.zeros(size, dtype=torch.bool)
    top, left, height, width = box.tolist()
    mask[top : top + height, left : left + width] = True
    return mask


def slices(plan, images, size):
    """Each region by `interpolate`, one at a time."""
    for (top, left, height, width), owner in zip(plan.boxes.tolist(), plan.owners.tolist(), strict=True):
        region = images[owner : owner + 1, :, top : top + height, left : left + width]
        yield F.interpolate(region, size, mode="bilinear", align_corners=False)[0]


@few
@given(sampler=SAMPLERS, size=sizes, seed=seeds)
def test_boxes_lie_inside_and_apart_one_to_max_patches_to_an_image(sampler, size, seed):
    plan = sampler.sample(6, size, 10, seeded(seed))
    assert (plan.boxes[:, :2] >= 0).all()
    assert (plan.boxes[:, 2:] >= 1).all()
    assert (plan.boxes[:, :2] + plan.boxes[:, 2:] <= torch.tensor(size)).all()
    patches = torch.bincount(plan.owners, minlength=6)
    assert len(patches) == 6
    assert ((patches >= 1) & (patches <= sampler.max_patches)).all()
    for image in range(6):
        covered = sum(mask_of(box, size).int() for box in plan.boxes[plan.owners == image])
        assert covered.max() == 1
    assert plan.labels.shape == plan.owners.shape
    assert ((plan.labels >= 0) & (plan.labels < 10)).all()


@few
@given(sampler=SAMPLERS, size=sizes, seed=seeds)
def test_split_patches_tile_the_image(sampler, size, seed):
    plan = MultiSemanticSampler(sampler.max_patches, layout="split", jitter=sampler.jitter).sample(
        3, size, 10, seeded(seed)
    )
    areas = torch.zeros(3, dtype=torch.long).index_add_(0, plan.owners, plan.boxes[:, 2] * plan.boxes[:, 3])
    assert areas.tolist() == [size[0] * size[1]] * 3


@few
@given(size=sizes, seed=seeds, low=st.floats(0.1, 1.0), factor=st.floats(0.1, 1.0))
def test_boxes_have_the_area_and_aspect_that_were_asked_for(size, seed, low, factor):
    area = (low * factor, low)
    sampler = MultiSemanticSampler(layout="boxes", area=area)
    plan = sampler.sample(4, size, 10, seeded(seed))
    assert (plan.boxes[:, :2] >= 0).all()
    assert (plan.boxes[:, :2] + plan.boxes[:, 2:] <= torch.tensor(size)).all()
    sides = torch.tensor(size) * torch.tensor(area).sqrt()[:, None]
    assert (plan.boxes[:, 2:] >= (sides[0] - 0.51).clamp(min=1)).all()
    assert (plan.boxes[:, 2:] <= (sides[1] + 0.51).clamp(min=1)).all()
    again = sampler.redrawn(plan, size, seeded(seed + 1))
    assert torch.equal(again.owners, plan.owners)


@pytest.mark.parametrize("wrong", [{"layout": "boxes"}, {"area": (0.4, 0.7)}])
def test_boxes_need_an_area_and_nothing_else_takes_one(wrong):
    with pytest.raises(ValueError, match="give both, for example area"):
        MultiSemanticSampler(**wrong)


def test_the_weight_of_crops_reaches_the_plan():
    plan = MultiSemanticSampler(crop_loss="sum").sample(5, (12, 12), 10, seeded())
    assert plan.view_weights(5).tolist() == pytest.approx([0.2] * (5 + len(plan.owners)))


@pytest.mark.parametrize("layout", ["cells", "split"])
def test_every_number_of_patches_and_every_class_comes_up(layout):
    plan = MultiSemanticSampler(layout=layout).sample(400, (28, 28), 10, seeded())
    shares = torch.bincount(torch.bincount(plan.owners)) / 400
    assert ((shares[1:] > 0.17) & (shares[1:] < 0.33)).all()
    assert len(plan.labels.unique()) == 10


@pytest.mark.parametrize(
    "sampler", [MultiSemanticSampler(), WholeImageSampler()], ids=["multi_semantic", "whole_image"]
)
def test_the_generator_alone_decides(sampler):
    torch.manual_seed(1)
    first = sampler.sample(5, (12, 20), 7, seeded(2))
    torch.manual_seed(2)
    again, other = sampler.sample(5, (12, 20), 7, seeded(2)), sampler.sample(5, (12, 20), 7, seeded(3))
    for name in ("boxes", "owners", "labels"):
        assert torch.equal(getattr(first, name), getattr(again, name))
    assert not torch.equal(first.labels, other.labels)


@few
@given(sampler=SAMPLERS, size=sizes, out=st.tuples(st.integers(1, 40), st.integers(1, 40)), seed=seeds)
def test_views_equal_interpolating_each_slice(sampler, size, out, seed):
    plan = sampler.sample(3, size, 10, seeded(seed))
    images = random(3, 2, *size, seed=seed)
    views = plan.views(images, out)
    assert views.shape == (len(plan.boxes), 2, *out)
    for view, expected in zip(views, slices(plan, images, out), strict=True):
        assert torch.allclose(view, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("side", [28, 224])
def test_views_in_float32_are_within_a_millionth(side):
    plan = MultiSemanticSampler(jitter=0.3).sample(4, (side, side), 10, seeded())
    images = random(4, 1, side, side, dtype=torch.float32)
    for view, expected in zip(plan.views(images, (side, side)), slices(plan, images, (side, side)), strict=True):
        assert view.dtype == torch.float32
        assert torch.allclose(view, expected, rtol=0, atol=1e-6)


@few
@given(sampler=SAMPLERS, size=sizes, seed=seeds, data=st.data())
def test_the_gradient_of_a_crop_is_exactly_zero_outside_its_box(sampler, size, seed, data):
    plan = sampler.sample(3, size, 10, seeded(seed))
    crop = data.draw(st.integers(0, len(plan.boxes) - 1))
    images = random(3, 2, *size, dtype=torch.float32).requires_grad_()
    plan.views(images, (24, 24))[crop].square().sum().backward()
    inside = torch.zeros(images.shape, dtype=torch.bool)
    inside[plan.owners[crop]] = mask_of(plan.boxes[crop], size)
    assert (images.grad[~inside] == 0).all()
    assert images.grad[inside].abs().sum() > 0


def test_the_gradient_of_all_crops_is_that_of_interpolating_each_slice():
    plan = MultiSemanticSampler().sample(4, (16, 24), 10, seeded())
    images = random(4, 3, 16, 24).requires_grad_()
    weights = random(len(plan.boxes), 3, 8, 8, seed=1)
    (gradient,) = torch.autograd.grad((plan.views(images, (8, 8)) * weights).sum(), images)
    expected = torch.autograd.grad((torch.stack([*slices(plan, images, (8, 8))]) * weights).sum(), images)[0]
    assert torch.allclose(gradient, expected, atol=1e-12)


def test_views_have_the_size_asked_for_and_the_dtype_of_the_images():
    plan = WholeImageSampler().sample(2, (8, 8), 10, seeded())
    for images, out in ((random(2, 1, 8, 8), (8, 8)), (random(2, 1, 8, 8, dtype=torch.float32), (4, 6))):
        views = plan.views(images, out)
        assert views.dtype == images.dtype
        assert views.shape == (2, 1, *out)
        assert torch.equal(plan.views(images, (8, 8)), images)


def test_whole_images_are_never_forwarded_twice():
    plan = WholeImageSampler().sample(3, (6, 9), 10, seeded())
    assert plan.boxes.tolist() == [[0, 0, 6, 9]] * 3
    assert plan.owners.tolist() == [0, 1, 2]
    assert not any(plan.due(iteration) for iteration in range(10))


def test_crops_are_due_every_so_many_iterations():
    plan = MultiSemanticSampler(every=3).sample(1, (8, 8), 10, seeded())
    assert [iteration for iteration in range(8) if plan.due(iteration)] == [0, 3, 6]


@pytest.mark.parametrize("layout", ["cells", "split"])
def test_boxes_redrawn_keep_the_number_of_crops_and_their_classes(layout):
    sampler = MultiSemanticSampler(layout=layout, every=2, redraw=3)
    plan = sampler.sample(8, (12, 20), 7, seeded(2))
    again, same = (sampler.redrawn(plan, (12, 20), seeded(seed)) for seed in (3, 3))
    assert torch.equal(again.owners, plan.owners)
    assert torch.equal(again.labels, plan.labels)
    assert (again.every, again.redraw) == (2, 3)
    assert torch.equal(again.boxes, same.boxes)
    assert not torch.equal(again.boxes, plan.boxes)
    images = random(8, 3, 12, 20)
    plan.views(images, (8, 8))
    expected = torch.stack(list(slices(again, images, (8, 8))))
    assert torch.allclose(again.views(images, (8, 8)), expected), "no map of the old boxes is left"


@pytest.mark.parametrize("kind", [WholeImageSampler, MultiSemanticSampler])
def test_balanced_classes_come_up_equally_often_in_an_order_of_the_seed(kind):
    plans = [kind(classes="balanced").sample(32, (28, 28), 10, torch.Generator().manual_seed(s)) for s in (0, 0, 1)]
    counts = torch.bincount(plans[0].labels, minlength=10)
    assert counts.max() - counts.min() == 1
    assert torch.equal(plans[0].labels, plans[1].labels)
    assert not torch.equal(plans[0].labels[:10], plans[2].labels[:10])
    few = kind(classes="balanced").sample(4, (28, 28), 1000, torch.Generator().manual_seed(0)).labels
    assert len(few.unique()) == len(few)


def test_an_image_shows_the_classes_of_all_its_crops():
    plan = CropPlan(
        boxes=torch.tensor([[0, 0, 2, 2]] * 4), owners=torch.tensor([0, 0, 0, 2]), labels=torch.tensor([1, 3, 1, 0])
    )
    assert plan.view_classes(3) == [[1, 3], [], [0], [1], [3], [1], [0]]


def test_images_too_small_to_cut_are_refused():
    with pytest.raises(SpdfqError, match="3x9 are too small; use whole_image"):
        MultiSemanticSampler().sample(1, (3, 9), 10, seeded())


@pytest.mark.parametrize(
    "wrong",
    [{"max_patches": 0}, {"max_patches": 5}, {"layout": "free"}, {"jitter": 0.4}, {"every": 0}, {"redraw": -1}],
    ids=str,
)
def test_impossible_settings_are_refused(wrong):
    with pytest.raises(ValueError, match=r"must be|expected"):
        MultiSemanticSampler(**wrong)
