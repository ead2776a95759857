"""The commands list, show and init: every component and recipe, with an explanation of each key."""

import re
import tomllib

import attrs
import pytest
from support.commands import small_recipe, spdfq
from support.docs import built_in

from spdfq.recipe import load_recipe, shipped
from spdfq.recipe.commented import commented
from spdfq.recipe.describe import arguments, body, describe, plain, recipe_summary
from spdfq.recipe.files import is_complete
from spdfq.registry import REGISTRIES, losses

COMPLETE = [name for name in shipped() if is_complete(name)]


def test_list_names_every_component_and_every_shipped_recipe():
    listed = spdfq("list").output.split("\n\n")
    blocks = {block.split("\n")[0]: re.findall(r"^  (\S+)", block, re.MULTILINE) for block in listed}
    assert {kind: blocks[kind] for kind in REGISTRIES} == {kind: r.names() for kind, r in REGISTRIES.items()}
    assert blocks["recipe"] == shipped()
    assert "quickstart" in blocks["recipe"]


def test_list_of_a_kind_gives_summary_and_paper():
    entry = losses.entry("attention_prior")
    assert f"  attention_prior {entry.summary} [arXiv:2412.16553] " in unwrapped(spdfq("list", "loss").output)


def unwrapped(listing):
    """The text with single spaces, two before each name."""
    return "".join(f"  {' '.join(part.split())} " for part in re.split(r"^  (?=\S)", listing, flags=re.MULTILINE))


@pytest.mark.parametrize("columns", [70, 80, 200])
def test_list_wraps_summaries_to_the_terminal_and_cuts_none_off(columns, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(columns))
    for kind, known in REGISTRIES.items():
        listing = spdfq("list", kind).output
        assert max(map(len, listing.splitlines())) <= columns
        assert [
            name for name in known.names() if f"  {name} {plain(known.entry(name).summary)}" not in unwrapped(listing)
        ] == []
    listing = spdfq("list", "recipe").output
    indents = {len(line) - len(line.lstrip()) for line in listing.splitlines()}
    assert indents <= {2, 4 + max(map(len, shipped()))}


def test_a_summary_is_the_whole_first_sentence_of_a_recipes_comment():
    summaries = {name: recipe_summary(name) for name in shipped()}
    assert [name for name, summary in summaries.items() if not summary.endswith((".", ")"))] == []
    assert "\n" not in "".join(summaries.values())


def test_show_gives_keys_defaults_types_meaning_paper_and_place():
    shown = spdfq("show", "prior", "gaussian_mixture").output
    assert "  max_components = 5    whole number\n      largest number of Gaussians in one map" in shown
    assert '  combine = "sum"    "sum" or "max"\n' in shown
    assert "paper   arXiv:2412.16553\nsource  spdfq.losses.priors:" in shown


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, r in REGISTRIES.items() for name in built_in(r)])
def test_every_key_of_every_component_is_documented(kind, name):
    fields = describe(REGISTRIES[kind].get(name))
    assert [field.name for field in fields if not field.doc] == []
    assert spdfq("show", kind, name).exit_code == 0


@pytest.mark.parametrize("name", shipped())
def test_show_recipe_prints_toml(name):
    shown = tomllib.loads(spdfq("show", "recipe", name).stdout)
    assert shown == load_recipe(name).to_dict() if name in COMPLETE else shown


@pytest.mark.parametrize(
    ("name", "kind"),
    [("quickstart", "recipe"), ("images/spdfq", "recipe"), ("repq", "step"), ("attention_prior", "loss")],
)
def test_show_needs_no_kind_for_a_name_that_only_one_kind_has(name, kind):
    assert spdfq("show", name).stdout == spdfq("show", kind, name).stdout


def test_show_takes_the_path_of_a_recipe(small):
    assert spdfq("show", small).stdout == spdfq("show", "recipe", small).stdout


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "qickstart",
            "qickstart: no component or recipe of that name; did you mean 'quickstart'? ('spdfq list' shows all)",
        ),
        ("real", "real: is the name of a source and of a recipe; give the kind before the name"),
        ("loss", "loss: is a kind; give a NAME after it ('spdfq list loss' shows its names)"),
    ],
)
def test_a_name_that_show_does_not_know_or_knows_twice_is_one_line(name, message):
    shown = spdfq("show", name)
    assert (shown.stderr, shown.stdout, shown.exit_code) == (f"error: {message}\n", "", 2)


@pytest.mark.parametrize("name", COMPLETE)
def test_init_prints_a_recipe_that_checks_and_says_the_same(name, tmp_path):
    path = tmp_path / "my.toml"
    path.write_text(spdfq("init", name).stdout)
    assert load_recipe(str(path)).to_dict() == load_recipe(name).to_dict()
    if load_recipe(name).model.bundled:  # the others are too big to be built here
        assert spdfq("check", path).output.endswith("ok\n")


@pytest.fixture
def small(tmp_path):
    return small_recipe(tmp_path)


def test_a_commented_recipe_says_what_every_key_means(small):
    text = commented(load_recipe(small))
    assert load_recipe(tomllib.loads(text)).to_dict() == load_recipe(small).to_dict()
    assert "# optimizer steps of each group. (whole number)\niterations = " in text
    others = ", ".join(name for name in REGISTRIES["target"].names() if name != "one_hot")
    assert f'[synthesis.target]\ntype = "one_hot"  # or {others}\n' in text
    assert (
        "# number of classes of the head, if it differs from the architecture's default; 0 removes the head.\n"
        "# (whole number)\n# num_classes =\n" in text
    )
    bits = "# bit-widths that a site can have. ([whole number, ...])\n# choices = [2, 3, 4, 5, 6, 8]\n"
    assert "# [quantization.budget]\n" in text
    assert bits in text


@attrs.frozen
class Documented:
    """One line.

    More on ``it``.

    Args:
        first: what it
            means.
        second: other.

    Returns:
        Nothing.
    """

    first: int
    second: tuple[float, ...] | None = None


def test_docstrings_are_taken_apart():
    assert arguments(Documented.__doc__) == {"first": "what it means.", "second": "other."}
    assert body(Documented) == "More on `it`.\n\nReturns:\n    Nothing."
    assert [(field.type, field.default) for field in describe(Documented)] == [
        ("whole number", "required"),
        ("[number, ...]", "none"),
    ]
