"""The random draws of one group of images."""

from collections.abc import Callable
from typing import Any

import torch
from attrs import evolve, field, frozen, validators

from spdfq.recipe.structure import Checked
from spdfq.runtime.runtime import generator


@frozen(eq=False)
class Draws(Checked):
    """The random draws of one group of images: the same seed, group and purpose always draw the same.

    It also keeps what is drawn once for a group, such as attention priors. So a group needs one object in all its
    iterations, and another group needs another one. A run with the same seed draws the same for its groups.

    Args:
        seed: of the run.
        group: number of the group, counted from 0.
        scope: names that keep the draws of two losses apart; see `scoped`.
        kept: what was kept so far; see `keep`.
    """

    seed: int = 0
    group: int = field(default=0, validator=validators.ge(0))
    scope: tuple[str, ...] = field(default=(), kw_only=True)
    kept: dict = field(factory=dict, kw_only=True, repr=False)

    def generator(self, *purpose: str | int) -> torch.Generator:
        """A fresh CPU generator for a purpose, for example ``generator("noise")``; see `spdfq.runtime.generator`."""
        return generator(self.seed, "group", self.group, *self.scope, *purpose)

    def scoped(self, name: str) -> "Draws":
        """The draws of the same group for a loss of that name. What it draws and keeps is separate from others'."""
        return evolve(self, scope=(*self.scope, name), kept=self.kept.setdefault(name, {}))

    def keep(self, key: Any, make: Callable[[], Any]) -> Any:
        """Return ``make()``, computed the first time that this key is asked for.

        A resumed run calls ``make`` again, so it must depend on `generator` and on shapes, but not on the images.
        """
        if key not in self.kept:
            self.kept[key] = make()
        return self.kept[key]
