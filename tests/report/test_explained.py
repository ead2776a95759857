"""The explanations of names, components and recipe keys on the page."""

import json

import pytest

from spdfq.errors import DataError
from spdfq.report.explained import EXPLAINED_FILE, Explained


def test_a_name_opens_its_explanation_and_a_text_without_one_is_escaped():
    names = Explained({"repq": "Step: <reparameterise>."})
    shown = names.name("repq")
    assert 'popovertarget="term0" title="Step: &lt;reparameterise&gt;."' in shown
    assert names.name("a < b") == "a &lt; b"
    assert [note.name for note in names.used.values()] == ["repq"]


def test_each_part_of_a_list_opens_its_own():
    names = Explained({"repq": "one", "ridge": "two"})
    shown = names.name("repq, mine, ridge")
    assert shown.count("<button") == 2
    assert ", mine, " in shown


def test_general_terms_are_known_in_either_case():
    names = Explained()
    assert names.name("Back-end").startswith("<button")
    assert "3 bits for weights and 8 bits for activations" in names.name("W3A8 (2.0 % in float)")


def test_a_name_that_is_used_twice_is_explained_once():
    names = Explained({"repq": "one"})
    names.name("repq"), names.name("repq")
    assert len(names.used) == 1


def test_stages_of_controls_are_explained():
    assert Explained().stage("noise: evaluate").startswith("noise: <button")


def test_the_tables_of_a_recipe_open_the_meaning_of_their_keys():
    keys = {"model.name": "which <model>", "steps.0.type": "first", "steps.1.type": "second", "seed": "of the run"}
    names = Explained({}, keys)
    lines = ["seed = 0", "", "[model]", 'name = "x"', "[[steps]]", "[[steps]]", 'type = "y"', "[other]"]
    shown = list(names.recipe(lines))
    assert 'title="of the run">seed</span> = 0' in shown[0]
    assert 'title="which &lt;model&gt;">name</span>' in shown[3]
    assert 'title="second">type</span>' in shown[6]
    assert shown[7] == "<b>[other]</b>"
    assert [note.text for note in names.used.values()] == ["name: which <model>", "type: first", "type: second"]


@pytest.mark.parametrize("text", ["{", "[]", '{"names": {}}', '{"names": 1, "keys": {}}'])
def test_a_damaged_file_is_refused(tmp_path, text):
    (tmp_path / EXPLAINED_FILE).write_text(text)
    with pytest.raises(DataError, match=r"explained\.json: (damaged|lacks 'keys')"):
        Explained.of(tmp_path)


def test_a_folder_without_the_file_has_general_terms_only(tmp_path):
    assert Explained.of(tmp_path) == Explained()
    (tmp_path / EXPLAINED_FILE).write_text(json.dumps({"names": {"a": "b"}, "keys": {}}))
    assert Explained.of(tmp_path).names == {"a": "b"}
