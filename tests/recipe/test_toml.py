"""Written TOML reads back exactly, with its tables in the same order."""

import tomllib
from datetime import date

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spdfq.recipe import load_recipe, to_toml, toml


def test_toml_reads_back_with_tables_in_their_order():
    data = {
        "text": 'é "quoted"\n\x7f',
        "numbers": [1, -2.5, 1e-05, True],
        "empty": {},
        "a table": {"z": {"inner": {"x": 1}}, "a": {"y": 2}, "plain": 3},
        "list": [{"t": {"u": [{"v": "w"}]}}, {}],
        "nothing": [],
    }
    read = tomllib.loads(toml.dumps(data))
    assert read == data
    assert [key for key in read["a table"] if key != "plain"] == ["z", "a"]


def test_toml_writes_small_tables_on_one_line_unless_that_changes_their_order():
    assert toml.dumps({"q": {"w": {"bits": 4}, "a": {"bits": 8}}}) == "[q]\nw = { bits = 4 }\na = { bits = 8 }\n"
    assert "[q.a]\nbits = 8" in toml.dumps({"q": {"w": {"deep": {"bits": 4}}, "a": {"bits": 8}}})


keys = st.text(st.characters(exclude_categories=["Cs"]), max_size=6)
scalars = (
    st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats(allow_nan=False)
    | st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
)
data = st.dictionaries(
    keys,
    st.recursive(
        scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=3), max_leaves=12
    ),
    max_size=4,
)


def typed(value):
    """The value with the types of its numbers, for 1 == 1.0 == True."""
    if isinstance(value, dict):
        return {key: typed(item) for key, item in value.items()}
    return [typed(item) for item in value] if isinstance(value, list) else (type(value), value)


@settings(deadline=None, max_examples=60)
@given(data)
def test_written_toml_reads_back_exactly(written):
    assert typed(tomllib.loads(to_toml(written))) == typed(written)


def test_a_byte_order_mark_is_not_part_of_a_recipe(tmp_path):
    path = tmp_path / "windows.toml"
    path.write_text('extends = ["quickstart"]\nseed = 3\n', encoding="utf-8-sig")
    assert load_recipe(path).seed == 3


def test_a_value_that_recipes_do_not_have_is_refused():
    with pytest.raises(TypeError, match="a date is not a recipe value"):
        toml.value([date(2026, 1, 1)])
