"""Names and plugins, and the contract of every built-in component: it can be written as data and read back."""

import subprocess
import sys
import typing
from pathlib import Path
from types import ModuleType

import attrs
import pytest
from support.docs import built_in

import spdfq.registry
from spdfq.errors import SpdfqError
from spdfq.recipe.structure import structure, unstructure
from spdfq.registry import REGISTRIES, Registry, losses, plugin_failures, registry

EVERYTHING = [
    pytest.param(kind, name, id=f"{kind}:{name}") for kind, known in REGISTRIES.items() for name in built_in(known)
]


def required_keys(component):
    """Recipe data with a value for every key that has no default."""
    hints, data = typing.get_type_hints(component), {}
    for field in attrs.fields(component):
        kind = field.metadata.get("kind")
        if field.metadata.get("many") is dict:  # optional, but an optimisation needs a loss
            data[field.name] = {built_in(registry(kind))[0]: {}}
        elif field.init and field.default is attrs.NOTHING and kind:
            name = built_in(registry(kind))[0]
            data[field.name] = {"type": name, **required_keys(registry(kind).get(name))}
        elif field.init and field.default is attrs.NOTHING:
            data[field.name] = {str: "text", int: 1, float: 1.0}[hints[field.name]]
    return data


@pytest.fixture
def things():
    """A registry for one test."""
    return Registry("thing", "spdfq.losses")


SUMMARY = "First sentence, which goes on in a second line."


def add(things, name):
    @things.register(name, paper="arXiv:0000.00000")
    class Component:
        """First sentence, which goes on
        in a second line.

        The rest.
        """

    return Component


class Plugin:
    """A stand-in for an entry point of `importlib.metadata`."""

    def __init__(self, name, load):
        self.name, self.value, self._load, self.loads = name, f"{name}.module", load, 0

    def load(self):
        self.loads += 1
        return self._load()


@pytest.fixture
def plugins(monkeypatch):
    """``plugins(...)`` installs fake plugins; everything they register is removed after the test."""

    def install(*installed):
        monkeypatch.setattr(
            spdfq.registry, "entry_points", lambda group: installed if group == "spdfq.components" else ()
        )
        monkeypatch.setattr(spdfq.registry, "_plugins_loaded", False)

    for known in REGISTRIES.values():
        monkeypatch.setattr(known, "_entries", dict(known._entries))
    failures = dict(plugin_failures)
    yield install
    plugin_failures.clear()
    plugin_failures.update(failures)


def failing(error):
    def load():
        raise error

    return load


# names


def test_a_registered_class_is_returned_unchanged_and_found_by_name(things):
    component = add(things, "first")
    assert things.get("first") is component
    assert things.name_of(component) == "first"
    assert things.names() == ["first"]


def test_a_registration_says_where_the_component_comes_from(things):
    entry = things.entry("first") if add(things, "first") else None
    assert (entry.kind, entry.name, entry.paper, entry.summary) == ("thing", "first", "arXiv:0000.00000", SUMMARY)
    assert entry.module == __name__
    source = Path(__file__).read_text(encoding="utf-8").splitlines()
    assert source[entry.line - 1].strip() == '@things.register(name, paper="arXiv:0000.00000")'


def test_names_are_sorted(things):
    for name in ("b", "c", "a"):
        add(things, name)
    assert things.names() == ["a", "b", "c"]


def test_a_duplicate_name_is_refused_with_the_owner(things):
    add(things, "first")
    owner = things.entry("first")
    with pytest.raises(SpdfqError, match=f"thing 'first' is already registered by {owner.module}:{owner.line}"):
        add(things, "first")


def test_a_notebooks_cell_that_is_run_again_defines_its_component_anew(things, monkeypatch):
    monkeypatch.setitem(sys.modules, "__main__", ModuleType("__main__"))

    def cell(name, module="__main__"):
        return things.register("mine")(type(name, (), {"__module__": module, "__doc__": "A thing."}))

    cell("Mine")
    latest = cell("Mine")
    assert things.get("mine") is latest
    for other in (("Other",), ("Mine", "elsewhere")):
        with pytest.raises(SpdfqError, match="thing 'mine' is already registered by __main__"):
            cell(*other)
    sys.modules["__main__"].__file__ = "script.py"  # a script defines nothing twice
    with pytest.raises(SpdfqError, match="already registered"):
        cell("Mine")


def test_an_unknown_name_lists_the_known_ones_and_the_nearest(things):
    add(things, "gaussian")
    add(things, "laplace")
    with pytest.raises(SpdfqError) as caught:
        things.get("gausian")
    assert str(caught.value) == "unknown thing 'gausian'; did you mean 'gaussian'? (known: gaussian, laplace)"
    with pytest.raises(SpdfqError, match=r"^unknown thing 'zzz' \(known: gaussian, laplace\)$"):
        things.get("zzz")


def test_a_class_that_is_not_registered_has_no_name(things):
    with pytest.raises(SpdfqError, match="Plugin is not a registered thing; register it first"):
        things.name_of(Plugin)


def test_an_unknown_kind_suggests_the_nearest():
    with pytest.raises(SpdfqError, match=r"unknown kind 'los'; did you mean 'loss'\? \(kinds: loss, prior, "):
        registry("los")


# plugins


def test_a_plugin_registers_by_being_loaded_once(plugins):
    plugin = Plugin("good", lambda: add(losses, "from_a_plugin"))
    plugins(plugin)
    assert losses.entry("from_a_plugin").summary == SUMMARY
    assert "from_a_plugin" in losses.names()
    assert plugin.loads == 1


def test_a_broken_plugin_is_named_with_its_reason_where_a_name_is_unknown(plugins):
    plugins(Plugin("broken", failing(ImportError("no module named 'missing'\nand more"))), Plugin("good", lambda: None))
    assert "soft_cross_entropy" in losses.names()
    with pytest.raises(SpdfqError) as caught:
        losses.get("of_the_broken_plugin")
    assert str(caught.value).endswith("; plugin 'broken' failed to import: ImportError: no module named 'missing'")
    assert "good" not in plugin_failures


def test_a_plugin_that_takes_a_built_in_name_is_the_one_to_blame(plugins):
    plugins(Plugin("greedy", lambda: add(losses, "total_variation")))
    assert losses.entry("total_variation").module == "spdfq.losses.total_variation"
    assert "loss 'total_variation' is already registered by spdfq.losses" in plugin_failures["greedy"]


def test_a_plugin_may_look_names_up_while_it_is_imported(plugins):
    plugin = Plugin("curious", lambda: losses.names())
    plugins(plugin)
    assert "soft_cross_entropy" in losses.names()
    assert plugin.loads == 1
    assert "curious" not in plugin_failures


GREEDY = """
import spdfq.registry as r

class Plugin:
    name = "greedy"
    def load(self):
        r.datasets.register("fashion_mnist")(type("Other", (), {"__doc__": "Other."}))

r.entry_points = lambda group: [Plugin()]
r.losses.names()
print(r.datasets.entry("fashion_mnist").module, r.plugin_failures["greedy"].partition(" (")[0])
"""


def test_plugins_come_after_the_built_in_components_of_every_kind():
    done = subprocess.run([sys.executable, "-c", GREEDY], capture_output=True, text=True, check=True, timeout=120)
    taken = "dataset 'fashion_mnist' is already registered by spdfq.data.fashion_mnist:"
    assert done.stdout.startswith(f"spdfq.data.fashion_mnist SpdfqError: {taken}")


# contracts: every built-in component


def test_every_kind_has_components():
    assert {kind for kind, known in REGISTRIES.items() if not known.names()} == set()


@pytest.mark.parametrize(("kind", "name"), EVERYTHING)
def test_every_component_is_an_attrs_class_with_a_one_line_summary(kind, name):
    entry = registry(kind).entry(name)
    assert attrs.has(entry.component)
    assert entry.summary.endswith((".", ":", ")"))
    assert entry.line > 0


@pytest.mark.parametrize(("kind", "name"), EVERYTHING)
def test_every_component_reads_back_from_its_own_data(kind, name):
    component, problems = registry(kind).get(name), []
    first = structure(component, required_keys(component), name, problems)
    assert problems == []
    data = unstructure(first, kind)
    assert data.pop("type") == name
    second = structure(component, data, name, problems)
    assert problems == []
    assert unstructure(second, kind) == {"type": name, **data}


@pytest.mark.parametrize(("kind", "name"), EVERYTHING)
def test_a_field_that_may_be_none_is_none_by_default(kind, name):
    """TOML has no null, so a resolved recipe leaves such a field out."""
    for field in attrs.fields(registry(kind).get(name)):
        if field.init and "None" in str(field.type):
            assert field.default is None, field.name
