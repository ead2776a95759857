"""Calibration: chooses every quantizer's range from one pass over the images."""

from collections.abc import Iterable
from typing import Any, Literal

import torch
from attrs import define, field, validators
from torch import Tensor

from spdfq.backends.base import BOTH, Calibration, Step
from spdfq.errors import DataError, ModelError, NonFiniteError
from spdfq.quantized.model import QuantizedModel
from spdfq.quantized.sites import WEIGHT
from spdfq.quantized.visiting import unchanged
from spdfq.quantizers import GridMseObserver, Observer, PercentileMseObserver, Product
from spdfq.recipe.structure import component
from spdfq.registry import steps


@steps.register("calibrate")
@define(kw_only=True)
class Calibrate(Step):
    """Choose the ranges: of weights from their values, of activations from one float pass over the images.

    Observers that try several ranges compare them by the error of the values, or by the error of the output of the
    layer or attention product that the values go into (AdaLog, arXiv:2407.12951). The output is computed in float, for
    the first few images and again for each candidate, so it takes much longer. Values that go into no product are
    always judged by themselves.

    Args:
        sites: which ranges are chosen: those of ``all`` sites, of ``weights`` alone or of ``activations`` alone.
        observer: chooses the ranges of activations.
        weight_observer: chooses the ranges of weights.
        batch: images per forward pass.
        judged_by: how candidates are compared, by the error of the ``values`` or of the product's ``output``.
        judged_images: number of images that the output is computed for.
    """

    sites: Literal["all", "weights", "activations"] = "all"
    observer: Any = component("observer", default=PercentileMseObserver)
    weight_observer: Any = component("observer", default=GridMseObserver)
    batch: int = field(default=32, validator=validators.ge(1))
    judged_by: Literal["values", "output"] = "values"
    judged_images: int = field(default=4, validator=validators.ge(1))

    @property
    def calibrates(self) -> frozenset[str]:
        """What ``sites`` says."""
        return BOTH if self.sites == "all" else frozenset({self.sites})

    @torch.no_grad()
    def run(self, model: QuantizedModel, calibration: Calibration) -> None:
        """Observes values and freezes the quantizers of the model.

        Raises:
            ModelError: no image reaches a site.
            NonFiniteError: a site saw NaN or infinity; the message names it.
            DataError: a site saw values that its quantizer does not accept.
        """
        weights = [] if self.sites == "activations" else model.weight_names()
        if self.judged_by == "values":
            fit_weights(model, self.weight_observer, weights)
            weights = []
        unfrozen = dict.fromkeys(weights)
        if self.sites != "weights":
            activations = [name for name in model.quantizers if model.sites[name].kind != WEIGHT]
            observe_activations(model, calibration, activations, self.batch)
            unfrozen |= dict.fromkeys(activations)
        if self.judged_by == "output":
            self._freeze_by_output(model, calibration, unfrozen)
        for name in unfrozen:
            self._freeze(model, name)

    def _freeze(self, model: QuantizedModel, name: str, product: Product | None = None) -> None:
        is_weight = model.sites[name].kind == WEIGHT
        if is_weight:
            _observe(model, name, model.weight(name))
        model.quantizers[name].freeze(self.weight_observer if is_weight else self.observer, product)

    def _freeze_by_output(self, model: QuantizedModel, calibration: Calibration, unfrozen: dict[str, None]) -> None:
        """Freezes the quantizer of each operand at its first product, and removes it from ``unfrozen``."""

        def on_product(name: str, product: Product) -> None:
            if name in unfrozen:
                self._freeze(model, name, product)
                del unfrozen[name]
                advance(1)

        with (
            calibration.runtime.progress("judging ranges by their output", len(unfrozen)) as advance,
            model.visiting(unchanged, on_product),
        ):
            model.network(calibration.images[: self.judged_images])


def observe_activations(model: QuantizedModel, calibration: Calibration, names: Iterable[str], batch: int) -> None:
    """Shows the quantizers of these sites the values of one float pass over the images.

    Raises:
        ModelError: no image reaches a site.
        NonFiniteError: a site saw NaN or infinity; the message names it.
        DataError: a site saw values that its quantizer does not accept.
    """
    missing = dict.fromkeys(names)
    wanted = set(missing)

    def observe(name: str, _: str, tensor: Tensor) -> Tensor:
        if name in wanted:
            _observe(model, name, tensor)
            missing.pop(name, None)
        return tensor

    progress = calibration.runtime.progress("calibrating", len(calibration.images))
    with model.visiting(observe), progress as advance:
        for images in calibration.images.split(batch):
            model.network(images)
            advance(len(images))
    if missing:
        raise ModelError(
            f"calibrate: {next(iter(missing))} took part in no forward pass of the images; leave it in float"
        )


def fit_weights(model: QuantizedModel, observer: Observer, names: Iterable[str]) -> None:
    """Chooses the ranges of these weights from their values."""
    for name in names:
        _observe(model, name, model.weight(name))
        model.quantizers[name].freeze(observer)


def _observe(model: QuantizedModel, name: str, tensor: Tensor) -> None:
    try:
        model.quantizers[name].observe(tensor)
    except (DataError, NonFiniteError) as error:
        raise type(error)(f"calibrate: {name}: {error}") from None
