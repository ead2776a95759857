"""Names of components: one registry for each kind, filled by decorators and by installed plugins."""

import difflib
import inspect
import sys
import threading
from collections.abc import Callable
from importlib import import_module
from importlib.metadata import entry_points
from typing import Generic, TypeVar

from attrs import frozen

from spdfq.errors import SpdfqError

T = TypeVar("T")
Component = TypeVar("Component", bound=type)
ENTRY_POINTS = "spdfq.components"


@frozen
class Registration(Generic[T]):
    """What is known about a component without importing anything else.

    Args:
        kind: of the registry.
        name: in recipes.
        component: the registered class.
        paper: where it comes from, for example an arXiv id.
        summary: the first paragraph of its docstring, on one line.
        module: where it is registered.
        line: of that module.
    """

    kind: str
    name: str
    component: type[T]
    paper: str | None
    summary: str
    module: str
    line: int


def _again(first: type, second: type) -> bool:
    """Whether a cell of a notebook, or a line of an interpreter, defines its class once more."""
    interactive = not hasattr(sys.modules["__main__"], "__file__")
    same = first.__qualname__ == second.__qualname__
    return interactive and same and first.__module__ == second.__module__ == "__main__"


class Registry(Generic[T]):
    """The components of one kind, by name.

    Args:
        kind: name of the kind in the singular, as users read it, for example ``"loss"``.
        package: importing it registers the built-in components of this kind.
        base: name of the kind's base class in that package; ``None`` if the kind has none.
    """

    def __init__(self, kind: str, package: str, base: str | None = None) -> None:
        self.kind = kind
        self.package = package
        self._base = base
        self._entries: dict[str, Registration[T]] = {}

    def register(self, name: str, *, paper: str | None = None) -> Callable[[Component], Component]:
        """Class decorator that registers a component under a name, and returns the class unchanged."""
        line = sys._getframe(1).f_lineno  # of the decorator; much faster than reading the class's source

        def add(component: Component) -> Component:
            owner = self._entries.get(name)
            if owner and not _again(owner.component, component):
                raise SpdfqError(
                    f"{self.kind} {name!r} is already registered by {owner.module}:{owner.line}; choose another name"
                )
            found: Registration[T] = Registration(
                self.kind, name, component, paper, first_paragraph(component), component.__module__, line
            )
            self._entries[name] = found
            return component

        return add

    def get(self, name: str) -> type[T]:
        """The class that is registered under a name.

        Raises:
            SpdfqError: the name is unknown; the message lists the known names and the nearest one.
        """
        return self.entry(name).component

    def entry(self, name: str) -> Registration[T]:
        """The registration of a name; errors as in `get`."""
        self._load()
        if name not in self._entries:
            raise SpdfqError(self._unknown(name))
        return self._entries[name]

    def names(self) -> list[str]:
        """All names, sorted."""
        self._load()
        return sorted(self._entries)

    def name_of(self, component: type) -> str:
        """The name that a class is registered under.

        Raises:
            SpdfqError: the class is not registered.
        """
        self._load()
        for name, entry in self._entries.items():
            if entry.component is component:
                return name
        raise SpdfqError(f"{component.__qualname__} is not a registered {self.kind}; register it first")

    def label(self, component: object) -> str:
        """The name that a component's class is registered under; the name of the class if it is not registered."""
        try:
            return self.name_of(type(component))
        except SpdfqError:
            return type(component).__name__

    def has(self, component: object) -> bool:
        """Whether an object is a component of this kind, registered or not; a class is none."""
        if self._base:
            return isinstance(component, getattr(import_module(self.package), self._base))
        self._load()
        return any(type(component) is entry.component for entry in self._entries.values())

    def _load(self) -> None:
        import_module(self.package)
        load_plugins()

    def _unknown(self, name: str) -> str:
        near = difflib.get_close_matches(name, self._entries, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        failed = "".join(f"; plugin {plugin!r} failed to import: {why}" for plugin, why in plugin_failures.items())
        return f"unknown {self.kind} {name!r}{hint} (known: {', '.join(sorted(self._entries))}){failed}"


def first_paragraph(component: type) -> str:
    """The first paragraph of a class's docstring, on one line."""
    return " ".join((inspect.getdoc(component) or "").partition("\n\n")[0].split())


plugin_failures: dict[str, str] = {}
_plugins_loaded = False
_loading = threading.RLock()


def load_plugins() -> None:
    """Import the plugins, once: modules that installed packages list under the entry point ``spdfq.components``.

    The error of a plugin that fails to import is kept in `plugin_failures`, and shown when a name is not found.
    """
    global _plugins_loaded
    with _loading:  # another thread waits for all names
        if _plugins_loaded:
            return
        _plugins_loaded = True  # before the loop, because a plugin may look up names while it is imported
        for built_in in REGISTRIES.values():
            import_module(built_in.package)  # before the plugins, so that a duplicate name is reported for the plugin
        for plugin in entry_points(group=ENTRY_POINTS):
            try:
                plugin.load()
            except Exception as error:  # a broken plugin must not break the library
                plugin_failures[plugin.name] = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"


REGISTRIES: dict[str, Registry] = {}
"""Every registry by its kind."""


def _of_kind(kind: str, package: str, base: str | None = None) -> Registry:
    REGISTRIES[kind] = Registry(kind, package, base)
    return REGISTRIES[kind]


losses = _of_kind("loss", "spdfq.losses", "Loss")
priors = _of_kind("prior", "spdfq.losses", "Prior")
sources = _of_kind("source", "spdfq.synth", "Source")
samplers = _of_kind("sampler", "spdfq.synth", "Sampler")
targets = _of_kind("target", "spdfq.synth", "Target")
augmentations = _of_kind("augmentation", "spdfq.synth", "Augmentation")
optimizers = _of_kind("optimizer", "spdfq.synth", "Optimizer")
schedules = _of_kind("schedule", "spdfq.synth", "Schedule")
quantizers = _of_kind("quantizer", "spdfq.quantizers", "Quantizer")
observers = _of_kind("observer", "spdfq.quantizers", "Observer")
placements = _of_kind("placement", "spdfq.quantized")
steps = _of_kind("step", "spdfq.backends", "Step")
datasets = _of_kind("dataset", "spdfq.data", "LabelledImages")
exporters = _of_kind("exporter", "spdfq.exporters", "Exporter")
trackers = _of_kind("tracker", "spdfq.trackers", "Tracker")


def registry(kind: str) -> Registry:
    """The registry of a kind.

    Raises:
        SpdfqError: the kind is unknown; the message lists the known kinds and the nearest one.
    """
    if kind not in REGISTRIES:
        near = difflib.get_close_matches(kind, REGISTRIES, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise SpdfqError(f"unknown kind {kind!r}{hint} (kinds: {', '.join(REGISTRIES)})")
    return REGISTRIES[kind]
