"""Calibration: choose every quantizer's range from one pass over the images."""

from collections.abc import Iterable
from typing import Any, Literal

import torch
from attrs import define, field, validators
from torch import Tensor

from spdfq.backends.base import Calibration, Step
from spdfq.backends.model import QuantizedModel
from spdfq.backends.products import WEIGHT
from spdfq.errors import DataError, ModelError, NonFiniteError
from spdfq.quantizers import GridMseObserver, Observer, PercentileMseObserver
from spdfq.registry import steps
from spdfq.structure import component


@steps.register("calibrate")
@define(kw_only=True)
class Calibrate(Step):
    """Choose the ranges: of weights by their values, of activations by one float pass over the images.

    Args:
        sites: which ranges are chosen: those of ``all`` sites, of ``weights`` alone or of ``activations`` alone.
        observer: chooses the ranges of activations.
        weight_observer: chooses the ranges of weights.
        batch: images per forward pass.
    """

    sites: Literal["all", "weights", "activations"] = "all"
    observer: Any = component("observer", default=PercentileMseObserver)
    weight_observer: Any = component("observer", default=GridMseObserver)
    batch: int = field(default=32, validator=validators.ge(1))

    @torch.no_grad()
    def run(self, model: QuantizedModel, calibration: Calibration) -> None:
        """Observe and freeze every quantizer of the model.

        Raises:
            ModelError: a site the images never reach.
            NonFiniteError: a site saw NaN or infinity; the message names it.
            DataError: a site saw values that its quantizer does not take.
        """
        if self.sites != "activations":
            fit_weights(model, self.weight_observer, model.weight_names())
        if self.sites == "weights":
            return
        self._observe_activations(model, calibration)
        for name, quantizer in model.quantizers.items():
            if model.sites[name].kind != WEIGHT:
                quantizer.freeze(self.observer)

    def _observe_activations(self, model: QuantizedModel, calibration: Calibration) -> None:
        reached = set()

        def observe(name: str, kind: str, tensor: Tensor) -> Tensor:
            if kind != WEIGHT and name in model.quantizers:
                _observe(model, name, tensor)
                reached.add(name)
            return tensor

        with (
            model.visiting(observe),
            calibration.runtime.progress("calibrating", len(calibration.images)) as advance,
        ):
            for images in calibration.images.split(self.batch):
                model.network(images)
                advance(len(images))
        missing = [name for name in model.quantizers if model.sites[name].kind != WEIGHT and name not in reached]
        if missing:
            raise ModelError(f"calibrate: {missing[0]} took part in no forward pass of the images; leave it in float")


def fit_weights(model: QuantizedModel, observer: Observer, names: Iterable[str]) -> None:
    """Choose the ranges of these weights by their values."""
    for name in names:
        _observe(model, name, model.weight(name))
        model.quantizers[name].freeze(observer)


def _observe(model: QuantizedModel, name: str, tensor: Tensor) -> None:
    try:
        model.quantizers[name].observe(tensor)
    except (DataError, NonFiniteError) as error:
        raise type(error)(f"calibrate: {name}: {error}") from None
