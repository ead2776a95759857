"""Names for components: one registry per kind, filled by decorators and by installed plugins."""

import difflib
import inspect
import sys
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
    """What is known of a component from its registration alone."""

    kind: str
    name: str
    component: type[T]
    paper: str | None
    summary: str
    module: str
    line: int


class Registry(Generic[T]):
    """The components of one kind, by name.

    Args:
        kind: singular name of the kind, as users read it, for example ``"loss"``.
        package: the package whose import registers the built-in components of this kind.
    """

    def __init__(self, kind: str, package: str) -> None:
        self.kind = kind
        self.package = package
        self._entries: dict[str, Registration[T]] = {}

    def register(self, name: str, *, paper: str | None = None) -> Callable[[Component], Component]:
        """Class decorator that gives a component its name; the class itself is returned unchanged."""

        line = sys._getframe(1).f_lineno  # of the decorator; reading the class's source would cost far more

        def add(component: Component) -> Component:
            if name in self._entries:
                owner = self._entries[name]
                raise SpdfqError(
                    f"{self.kind} {name!r} is already registered by {owner.module}:{owner.line}; choose another name"
                )
            summary = (inspect.getdoc(component) or "").partition("\n")[0]
            self._entries[name] = Registration(self.kind, name, component, paper, summary, component.__module__, line)
            return component

        return add

    def get(self, name: str) -> type[T]:
        """The class registered under a name.

        Raises:
            SpdfqError: the name is unknown; the message lists the known names and the nearest one.
        """
        return self.entry(name).component

    def entry(self, name: str) -> Registration[T]:
        """The registration of a name; raises like `get`."""
        self._load()
        if name not in self._entries:
            raise SpdfqError(self._unknown(name))
        return self._entries[name]

    def names(self) -> list[str]:
        """All names, sorted."""
        self._load()
        return sorted(self._entries)

    def name_of(self, component: type) -> str:
        """The name a class is registered under."""
        self._load()
        for name, entry in self._entries.items():
            if entry.component is component:
                return name
        raise SpdfqError(f"{component.__qualname__} is not a registered {self.kind}; register it first")

    def _load(self) -> None:
        import_module(self.package)
        load_plugins()

    def _unknown(self, name: str) -> str:
        near = difflib.get_close_matches(name, self._entries, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        failed = "".join(f"; plugin {plugin!r} failed to import: {why}" for plugin, why in plugin_failures.items())
        return f"unknown {self.kind} {name!r}{hint} (known: {', '.join(sorted(self._entries))}){failed}"


plugin_failures: dict[str, str] = {}
_plugins_loaded = False


def load_plugins() -> None:
    """Import what installed packages announce under the entry-point group ``spdfq.components``, once.

    A plugin that fails to import is kept in `plugin_failures` and named when a look-up fails.
    """
    global _plugins_loaded
    if _plugins_loaded:
        return
    _plugins_loaded = True  # at once: a plugin may look names up while it is imported
    for built_in in REGISTRIES.values():
        import_module(built_in.package)  # before the plugins: a duplicate name is then the plugin's mistake
    for plugin in entry_points(group=ENTRY_POINTS):
        try:
            plugin.load()
        except Exception as error:  # a broken plugin must not take the library down with it
            plugin_failures[plugin.name] = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"


losses: Registry = Registry("loss", "spdfq.losses")
priors: Registry = Registry("prior", "spdfq.losses")
sources: Registry = Registry("source", "spdfq.synth")
samplers: Registry = Registry("sampler", "spdfq.synth")
targets: Registry = Registry("target", "spdfq.synth")
augmentations: Registry = Registry("augmentation", "spdfq.synth")
optimizers: Registry = Registry("optimizer", "spdfq.synth")
schedules: Registry = Registry("schedule", "spdfq.synth")
quantizers: Registry = Registry("quantizer", "spdfq.quantizers")
observers: Registry = Registry("observer", "spdfq.quantizers")
placements: Registry = Registry("placement", "spdfq.quantized")
steps: Registry = Registry("step", "spdfq.backends")
datasets: Registry = Registry("dataset", "spdfq.data")

REGISTRIES: dict[str, Registry] = {
    registry.kind: registry
    for registry in (
        losses,
        priors,
        sources,
        samplers,
        targets,
        augmentations,
        optimizers,
        schedules,
        quantizers,
        observers,
        placements,
        steps,
        datasets,
    )
}


def registry(kind: str) -> Registry:
    """The registry of a kind; an unknown kind raises with the list of kinds."""
    if kind not in REGISTRIES:
        near = difflib.get_close_matches(kind, REGISTRIES, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise SpdfqError(f"unknown kind {kind!r}{hint} (kinds: {', '.join(REGISTRIES)})")
    return REGISTRIES[kind]
