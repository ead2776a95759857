"""Measures how much the output changes when a single site is quantized, for each site and bit-width."""

from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from attrs import define, evolve, field, frozen
from torch import Tensor

from spdfq.backends.base import Calibration
from spdfq.backends.calibrate import Calibrate
from spdfq.backends.divergence import divergence
from spdfq.errors import NonFiniteError
from spdfq.quantized.model import QuantizedModel
from spdfq.quantized.place import place
from spdfq.recipe import Budget, Quantization
from spdfq.runtime.files import read_tensors, write_tensors

Sensitivity = dict[tuple[str, int], float]
"""The change of the output when one site alone is quantized, by site and bits."""


@torch.no_grad()
def measured_sensitivity(
    sites: Sequence[str], spec: Quantization, budget: Budget, calibration: Calibration, folder: Path | None
) -> Sensitivity:
    """The mean `divergence` from the teacher's output when one site alone is quantized, for all choices of bits.

    Args:
        sites: names of the sites.
        spec: the recipe's quantization section; its first ``calibrate`` step says how ranges are chosen.
        budget: the recipe's, with the choices of bits and the number of images.
        calibration: teacher, images and runtime.
        folder: where measurements are stored, so that a killed run can continue.

    Raises:
        NonFiniteError: the output is not finite.
    """
    measured = _Measured(folder / "sensitivity.safetensors" if folder else None)
    total = len(sites) * len(budget.choices)
    with calibration.runtime.progress("measuring sensitivity", total) as advance:
        for bits in budget.choices:
            missing = [site for site in sites if (site, bits) not in measured.found]
            advance(len(sites) - len(missing))
            if missing:
                model = place(calibration.teacher, spec, dict.fromkeys(sites, bits))
                for step in spec.steps:
                    if step.in_float:
                        step.run(model, calibration)
                _calibrate_step(spec, budget).run(model, calibration)
                for site, value in _divergences(model, missing, calibration, budget.images):
                    measured.add(site, bits, value)
                    advance()
    return measured.found


def _calibrate_step(spec: Quantization, budget: Budget) -> Calibrate:
    """The recipe's first ``calibrate`` step, for the sites that the budget counts."""
    step = next((step for step in spec.steps if isinstance(step, Calibrate)), Calibrate())
    return evolve(step, sites="all" if budget.weights is None else "weights")


def _divergences(
    model: QuantizedModel, sites: Iterable[str], calibration: Calibration, count: int
) -> Iterable[tuple[str, float]]:
    images, batch = calibration.images[:count], Calibrate().batch
    with calibration.teacher.frozen() as network:
        wanted = torch.cat([network(part) for part in images.split(batch)])
    for site in sites:
        with model.visiting(_QuantizeOne(model, site)):
            logits = torch.cat([model.network(part) for part in images.split(batch)])
        value = float(divergence(logits, wanted, calibration.teacher.headless).mean())
        if not value < float("inf"):
            raise NonFiniteError(f"{site}: the output is not finite with this site quantized; check the images")
        yield site, max(value, 0.0)


@frozen(eq=False)
class _QuantizeOne:
    """A `Visit` that quantizes a single site."""

    model: QuantizedModel
    site: str

    def __call__(self, name: str, kind: str, tensor: Tensor) -> Tensor:
        return self.model.quantized(name, kind, tensor) if name == self.site else tensor


@define(eq=False)
class _Measured:
    """Measurements, in memory and in a file."""

    path: Path | None
    found: Sensitivity = field(factory=dict, init=False)

    def __attrs_post_init__(self) -> None:
        if self.path and self.path.exists():
            stored = read_tensors(self.path, "delete it, or use --fresh")[0]
            keys = {key: key.rpartition(" ") for key in stored}
            self.found = {(site, int(bits)): float(stored[key]) for key, (site, _, bits) in keys.items()}

    def add(self, site: str, bits: int, value: float) -> None:
        self.found[site, bits] = value
        if self.path:
            stored = {
                f"{name} {width}": torch.tensor(one, dtype=torch.float64, device="cpu")
                for (name, width), one in self.found.items()
            }
            write_tensors(self.path, stored)
