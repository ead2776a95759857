"""The page on components without recipes: its examples run in order, and its loop makes the images of the engine."""

import re

import pytest
import torch
from support.docs import DOCS, blocks, text

from spdfq.registry import losses

PAGE = DOCS / "components-without-recipes.md"
EXAMPLES = blocks(PAGE, "python")


@pytest.fixture(scope="module")
def seen():
    """The names that all examples of the page define, run one after the other; weights are drawn from a fixed seed."""
    names = {}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for code in EXAMPLES[:2]:
            exec(code, names)
        names["first"] = names["images"].detach().clone()
        for code in EXAMPLES[2:]:
            exec(code, names)
    return names


def test_the_loop_has_at_most_thirty_lines():
    lines = EXAMPLES[0].splitlines()
    assert len([line for line in lines if line]) <= 30
    assert max(map(len, lines)) <= 120


def test_the_loop_makes_the_images_of_the_engine(seen):
    assert "range(3)" in EXAMPLES[0]
    assert "iterations=3" in EXAMPLES[1]
    start = torch.randn(4, 3, 32, 32, generator=seen["draws"].generator("noise"))
    assert (seen["first"] - start).abs().mean() > 0.1
    torch.testing.assert_close(seen["first"], seen["same"], rtol=0, atol=1e-5)


def test_every_example_gives_what_its_comment_says(seen):
    assert seen["maps"].shape == (6, 16)
    assert torch.allclose(seen["maps"].sum(-1), torch.ones(6))
    assert seen["probabilities"].shape == (4, 10)
    assert seen["mirrored"].shape == seen["moved"].shape == seen["coloured"].shape == (4, 3, 32, 32)
    assert torch.equal(seen["quantizer"].decode(seen["codes"]), seen["rounded"])
    assert all(seen[name].isfinite() for name in ("value", "hard", "frequencies", "contrast"))
    assert blocks(PAGE, "text") == [seen["message"] + "\n"]


def test_the_functional_form_gives_the_loss_of_the_component(seen):
    from spdfq.losses import AttentionPriorLoss, attention_prior_loss, draw_priors

    loss, draws = AttentionPriorLoss(), seen["draws"]
    priors = draw_priors(seen["record"], loss.prior, draws.scoped("attention_prior"))
    value = attention_prior_loss(seen["record"].class_attention, priors, start=1, scale="mass")
    assert torch.equal(value, loss.of(seen["images"], seen["record"], draws=draws))


def test_the_page_lists_the_inputs_of_every_built_in_loss():
    built_in = [name for name in losses.names() if losses.entry(name).module.startswith("spdfq.")]
    assert re.findall(r"^\| `(\w+)` \|", text(PAGE), re.MULTILINE) == built_in
