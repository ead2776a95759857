"""Components by their registered names, for the tests that hold everything registered to its contract."""

import attrs
import pytest
import torch

from spdfq.losses import CrossEntropyLoss
from spdfq.registry import registry
from spdfq.runtime import Runtime

RUNTIME = Runtime(seed=3)


def made(kind, name, **given):
    """The component with its defaults; required parts are filled in.

    Skips the test if a required field is no component: only the component's own tests can fill it.
    """
    cls = registry(kind).get(name)
    for part in attrs.fields(cls):
        required = part.default is attrs.NOTHING and "kind" in part.metadata
        if part.metadata.get("many") is dict:
            given.setdefault(part.name, {"cross_entropy": CrossEntropyLoss()})
        elif required:
            given.setdefault(part.name, _any(part.metadata["kind"]))
        elif part.default is attrs.NOTHING and part.name not in given:
            pytest.skip(f"{kind} {name} needs a value for {part.name}")
    return cls(**given)


def _any(kind):
    """A component of this kind that can be made without arguments."""
    for name in registry(kind).names():
        cls = registry(kind).get(name)
        if all(part.default is not attrs.NOTHING for part in attrs.fields(cls)):
            return cls()
    raise AssertionError(f"no {kind} can be made without arguments")


def every(kind):
    return pytest.mark.parametrize("name", registry(kind).names())


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def twice(draw):
    """The same draw under two states of the global generator."""
    results = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        results.append(draw())
    return results
