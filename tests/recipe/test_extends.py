"""Recipes that extend others: how parents are found and merged."""

import copy

import pytest
from support.recipes import problems_of

from spdfq.errors import RecipeError
from spdfq.recipe import load_recipe, locate, merge, resolve

WHOLE = ["models/vit_fmnist", "images/psaq_vit", "backends/minmax"]
SPDFQ = ["images/spdfq", "backends/plus"]


@pytest.fixture
def folder(tmp_path):
    def write(name, text):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True, parents=True)
        path.write_text(text, encoding="utf-8")
        return path

    return write


def test_parents_merge_from_left_to_right_and_the_file_wins(folder):
    folder("a.toml", "seed = 1\n[model]\nname = 'a'\nimg_size = 16\n[evaluation]\nbatch = 5")
    folder("parts/b.toml", "[model]\nname = 'b'\nnum_classes = 4\n[evaluation]\nbatch = 6")
    child = folder("c.toml", "extends = ['a.toml', 'parts/b.toml']\n[evaluation]\nbatch = 7")
    assert resolve(child) == {
        "seed": 1,
        "model": {"name": "b", "img_size": 16, "num_classes": 4},
        "evaluation": {"batch": 7},
    }


def test_parents_are_found_beside_the_file_that_names_them(folder):
    folder("parts/deep/one.toml", "seed = 1")
    folder("parts/two.toml", "extends = ['deep/one.toml']")
    assert resolve(folder("three.toml", "extends = ['parts/two.toml']")) == {"seed": 1}


def test_a_part_may_be_extended_twice_but_not_by_itself(folder):
    folder("part.toml", "seed = 1")
    folder("left.toml", "extends = ['part.toml']")
    folder("right.toml", "extends = ['part.toml']")
    assert resolve(folder("both.toml", "extends = ['left.toml', 'right.toml']")) == {"seed": 1}
    folder("circle.toml", "extends = ['round.toml']")
    (problem,) = problems_of(folder("round.toml", "extends = ['circle.toml']"))
    assert problem == "round.toml: extends itself through round -> circle"


@pytest.mark.parametrize(
    ("parent", "child", "merged"),
    [
        ({"a": 1, "b": 2}, {"b": 3, "c": 4}, {"a": 1, "b": 3, "c": 4}),
        ({"t": {"type": "x", "p": 1}}, {"t": {"q": 2}}, {"t": {"type": "x", "p": 1, "q": 2}}),
        ({"t": {"type": "x", "p": 1}}, {"t": {"type": "x", "q": 2}}, {"t": {"type": "x", "p": 1, "q": 2}}),
        ({"t": {"type": "x", "p": 1}}, {"t": {"type": "y", "q": 2}}, {"t": {"type": "y", "q": 2}}),
        ({"t": {"type": "x", "p": 1}}, {"t": "y"}, {"t": {"type": "y"}}),
        ({"t": "x"}, {"t": {"q": 2}}, {"t": {"type": "x", "q": 2}}),
        ({"t": "x"}, {"t": {"type": "y", "q": 2}}, {"t": {"type": "y", "q": 2}}),
        ({"losses": {"x": {"p": 1}}}, {"losses": {"x": {"type": "x"}}}, {"losses": {"x": {"type": "x", "p": 1}}}),
        ({"losses": {"x": {"p": 1}}}, {"losses": {"x": {"type": "y"}}}, {"losses": {"x": {"type": "y"}}}),
        ({"t": "x"}, {"t": "y"}, {"t": "y"}),
        ({"steps": [{"type": "a"}, {"type": "b"}]}, {"steps": [{"type": "c"}]}, {"steps": [{"type": "c"}]}),
        ({"deep": {"er": {"a": 1}}}, {"deep": {"er": {"b": 2}}}, {"deep": {"er": {"a": 1, "b": 2}}}),
    ],
)
def test_merging(parent, child, merged):
    before = copy.deepcopy((parent, child))
    found = merge(parent, child)
    assert found == merged
    assert (parent, child) == before


def test_a_complete_source_or_back_end_replaces_that_of_earlier_parents():
    alone, over = (load_recipe({"extends": parents}) for parents in (WHOLE, [*SPDFQ, *WHOLE]))
    assert over.to_dict() == alone.to_dict()


def test_a_name_alone_is_a_complete_source_and_a_wrong_section_is_one_line(folder):
    bare = folder("bare.toml", "synthesis = 'optimize'\n")
    assert resolve({"extends": ["quickstart", "images/psaq_vit", str(bare)]})["synthesis"] == "optimize"
    with pytest.raises(RecipeError, match="synthesis: expected"):
        load_recipe({"extends": ["quickstart", str(folder("number.toml", "synthesis = 3\n"))]})


def test_an_incomplete_section_is_merged(folder):
    few = folder("few.toml", "[synthesis]\nimages = 8\n")
    found = load_recipe({"extends": ["quickstart", str(few), "bits/w3a3"]})
    assert found.synthesis.images == 8
    assert found.synthesis.losses == load_recipe("quickstart").synthesis.losses
    assert (found.quantization.label, len(found.quantization.steps)) == ("W3A3", 3)


def test_a_merged_recipe_shares_nothing_with_its_parts():
    parent, child = {"a": {"b": {"c": 1}}}, {"d": {"e": [1]}}
    found = merge(parent, child)
    found["a"]["b"]["c"] = 2
    found["d"]["e"].append(2)
    assert (parent, child) == ({"a": {"b": {"c": 1}}}, {"d": {"e": [1]}})


@pytest.mark.parametrize("extends", ["'images/spdfq'", "[1]", "{ a = 1 }"])
def test_extends_is_an_array_of_names(folder, extends):
    (problem,) = problems_of(folder("r.toml", f"extends = {extends}"))
    assert "r.toml: extends: expected an array of recipe names" in problem


def test_a_name_that_ends_in_toml_is_a_file_and_any_other_a_shipped_recipe(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "quickstart").write_text("seed = 1")
    assert locate("quickstart").suffix == ".toml"
    assert problems_of("quickstart.toml") == [
        "quickstart.toml: no such file; to run a shipped recipe leave out '.toml'"
    ]
    (problem,) = problems_of("quikstart")
    assert problem.startswith("quikstart: no shipped recipe of that name; did you mean 'quickstart'? (shipped: ")


def test_a_file_that_is_not_toml_is_one_clear_line(folder):
    path = folder("bad.toml", "seed = \n")
    (problem,) = problems_of(path)
    assert problem.startswith(f"{path}: not valid TOML: Invalid value (at line 1")
    path = folder("deep.toml", f"a = {'[' * 10_000}")
    assert problems_of(path) == [f"{path}: not valid TOML: brackets nested too deeply"]
