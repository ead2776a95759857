"""Bits for every site within a budget: what quantizing one site alone does to the output, measured on the images."""

from collections.abc import Iterable
from pathlib import Path

import torch
from attrs import define, evolve, field, frozen
from torch import Tensor

from spdfq.backends.base import Calibration
from spdfq.backends.budget.budget import Sensitivity, allocated, check_budget
from spdfq.backends.calibrate import Calibrate
from spdfq.backends.learning.divergence import divergence
from spdfq.errors import NonFiniteError
from spdfq.quantized.model import QuantizedModel
from spdfq.quantized.place import overridden, place
from spdfq.recipe import Budget, Quantization
from spdfq.runtime import Runtime
from spdfq.runtime.files import read_tensors, write_tensors
from spdfq.teacher import Teacher


@torch.no_grad()
def bits_within(
    budget: Budget, teacher: Teacher, images: Tensor, spec: Quantization, runtime: Runtime, folder: Path | None = None
) -> dict[str, int]:
    """The bits of every site that has a choice, of least total sensitivity within the budget.

    The sensitivity of a site is the `divergence` from the teacher's output when it alone is quantized. Those of all
    sites are taken to add up.

    Args:
        budget: the recipe's.
        teacher: the float model.
        images: ``[n, C, H, W]``, normalised.
        spec: the recipe's quantization section; its first ``calibrate`` step says how ranges are chosen.
        runtime: progress.
        folder: where what was measured is kept, so that a killed run goes on.

    Raises:
        RecipeError: the budget cannot be reached.
        NonFiniteError: the output is not finite.
    """
    plain = place(teacher, spec)
    fixed = overridden(teacher, spec, plain.sites)
    found = check_budget(plain, budget, fixed, images[:1])
    sites = [site for item in found for site in item.sites if site not in fixed]
    measured = _Measured(folder / "sensitivity.safetensors" if folder else None)
    calibration = Calibration(teacher=teacher, images=images, runtime=runtime)
    with runtime.progress("measuring sensitivity", len(sites) * len(budget.choices)) as advance:
        for bits in budget.choices:
            missing = [site for site in sites if (site, bits) not in measured.found]
            advance(len(sites) - len(missing))
            if missing:
                model = place(teacher, spec, dict.fromkeys(sites, bits))
                _calibrated(spec, budget).run(model, calibration)
                for site, value in _divergences(model, missing, calibration, budget.images):
                    measured.add(site, bits, value)
                    advance()
    return allocated(found, budget, fixed, measured.found)


def _calibrated(spec: Quantization, budget: Budget) -> Calibrate:
    step = next((step for step in spec.steps if isinstance(step, Calibrate)), Calibrate())
    return evolve(step, sites="all" if budget.weights is None else "weights")


def _divergences(
    model: QuantizedModel, sites: Iterable[str], calibration: Calibration, count: int
) -> Iterable[tuple[str, float]]:
    images, batch = calibration.images[:count], Calibrate().batch
    with calibration.teacher.frozen() as network:
        wanted = torch.cat([network(part) for part in images.split(batch)])
    for site in sites:
        with model.visiting(_Only(model, site)):
            logits = torch.cat([model.network(part) for part in images.split(batch)])
        value = float(divergence(logits, wanted, calibration.teacher.headless).mean())
        if not value < float("inf"):
            raise NonFiniteError(f"{site}: quantized alone, the output is not finite; check the images")
        yield site, max(value, 0.0)


@frozen(eq=False)
class _Only:
    """Quantizes one site."""

    model: QuantizedModel
    site: str

    def __call__(self, name: str, kind: str, tensor: Tensor) -> Tensor:
        return self.model.quantized(name, kind, tensor) if name == self.site else tensor


@define(eq=False)
class _Measured:
    """What was measured, in memory and in a file."""

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
                f"{name} {width}": torch.tensor(one, dtype=torch.float64) for (name, width), one in self.found.items()
            }
            write_tensors(self.path, stored)
