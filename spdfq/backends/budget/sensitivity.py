"""Measures how much the output changes when a single site is quantized, for each site and bit-width."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal

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
from spdfq.runtime.state_key import check_state_key, state_key

Sensitivity = dict[tuple[str, int], float]
"""The change of the output when one site alone is quantized, by site and bits."""


@torch.no_grad()
def measured_sensitivity(
    sites: Sequence[str], spec: Quantization, budget: Budget, calibration: Calibration
) -> Sensitivity:
    """The mean `divergence` from the teacher's output when one site alone is quantized, for all choices of bits.

    Args:
        sites: names of the sites.
        spec: the recipe's quantization section. The last ``calibrate`` step that covers weights says how their ranges
            are chosen, and the last one that covers activations how theirs are.
        budget: the recipe's, with the choices of bits and the number of images.
        calibration: teacher, images, runtime, and the folder where measurements are stored, so that a killed run can
            continue.

    Raises:
        NonFiniteError: the output is not finite.
        DataError: the folder holds the measurements of other work.
    """
    measured = _Measured.of(spec, budget, calibration)
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
                for calibrate in _calibrate_steps(spec, budget):
                    calibrate.run(model, calibration)
                for site, value in _divergences(model, missing, calibration, budget.images):
                    measured.add(site, bits, value)
                    advance()
    return measured.found


def _calibrate_steps(spec: Quantization, budget: Budget) -> list[Calibrate]:
    """For each kind of site that the budget counts, the recipe's last ``calibrate`` step that covers it."""
    counted: list[Literal["weights", "activations"]] = ["weights", "activations"]
    if budget.weights is not None:
        counted.remove("activations")
    steps = [step for step in reversed(spec.steps) if isinstance(step, Calibrate)]
    last = (next((step for step in steps if kind in step.calibrates), Calibrate()) for kind in counted)
    return [evolve(step, sites=kind) for kind, step in zip(counted, last, strict=True)]


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
    """Measurements, in memory and in a file that holds the key of what they depend on."""

    path: Path | None = None
    key: str = ""
    found: Sensitivity = field(factory=dict, init=False)

    @classmethod
    def of(cls, spec: Quantization, budget: Budget, calibration: Calibration) -> "_Measured":
        if not calibration.folder:
            return cls()
        # the choices of bits and the limit change no measurement
        key = state_key(calibration.inputs.digest, evolve(spec, budget=None), budget.images)
        return cls(calibration.folder / "sensitivity.safetensors", key)

    def __attrs_post_init__(self) -> None:
        if self.path and self.path.exists():
            stored, metadata = read_tensors(self.path, "delete it, or use --fresh")
            check_state_key(self.path, metadata, self.key)
            names = {name: name.rpartition(" ") for name in stored}
            self.found = {(site, int(bits)): float(stored[name]) for name, (site, _, bits) in names.items()}

    def add(self, site: str, bits: int, value: float) -> None:
        self.found[site, bits] = value
        if self.path:
            stored = {
                f"{name} {width}": torch.tensor(one, dtype=torch.float64, device="cpu")
                for (name, width), one in self.found.items()
            }
            write_tensors(self.path, stored, {"key": self.key})
