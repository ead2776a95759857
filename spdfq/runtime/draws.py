"""The random draws of one group of images."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from attrs import define, evolve, field, frozen, validators
from torch import Tensor

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
        repeated: what is drawn in each iteration; see `each`.
    """

    seed: int = 0
    group: int = field(default=0, validator=validators.ge(0))
    scope: tuple[str, ...] = field(default=(), kw_only=True)
    kept: dict = field(factory=dict, kw_only=True, repr=False)
    repeated: dict = field(factory=dict, kw_only=True, repr=False)

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

    def each(
        self,
        purpose: tuple[str | int, ...],
        iteration: int,
        draw: Callable[..., Tensor],
        *sizes: int,
        device: torch.device,
    ) -> Tensor:
        """What ``draw(generator(*purpose, iteration), iteration, *sizes)`` returns, on a device.

        A run draws it ahead from the second time on, which needs no copy in the iteration itself; see `draw_ahead`.

        Args:
            purpose: of the draw, without the iteration.
            iteration: counted from 0.
            draw: returns a tensor on the CPU, of the same dtype in each iteration. It must depend on its arguments
                alone, and be the same function for the same purpose.
            sizes: numbers that the draw depends on.
            device: where the tensor is needed.
        """
        key = (self.scope, purpose)
        found = self.repeated.get(key)
        if found is None or found.sizes != sizes or found.device != device:
            found = self.repeated[key] = _Repeated(self, purpose, draw, sizes, device)
        if iteration not in found.ahead:
            found.draw_ahead([iteration])
        drawn: Tensor = found.ahead[iteration]
        return drawn

    def draw_ahead(self, iterations: Sequence[int]) -> None:
        """Draw for these iterations what `each` was asked for so far, and copy it to its device."""
        for found in self.repeated.values():
            found.draw_ahead(iterations)


@define(eq=False)
class _Repeated:
    """A draw that is made in each iteration, and its results for the next ones."""

    draws: Draws
    purpose: tuple[str | int, ...]
    draw: Callable[..., Tensor]
    sizes: tuple[int, ...]
    device: torch.device
    ahead: dict[int, Tensor] = field(factory=dict, init=False)

    def draw_ahead(self, iterations: Sequence[int]) -> None:
        drawn = [self.draw(self.draws.generator(*self.purpose, each), each, *self.sizes) for each in iterations]
        together = torch.cat([tensor.reshape(-1) for tensor in drawn]).to(self.device)
        parts = together.split([tensor.numel() for tensor in drawn])
        self.ahead = {
            each: part.view(tensor.shape) for each, part, tensor in zip(iterations, parts, drawn, strict=True)
        }
