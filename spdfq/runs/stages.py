"""The stages of a run. Each says what its result depends on, how the result is made, and how it is read back."""

import json
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, ClassVar

import torch
from attrs import define, evolve, field

from spdfq.api import make_images
from spdfq.backends import quantize
from spdfq.backends.quantized_student import student_section
from spdfq.backends.site_noise import site_noise
from spdfq.errors import reading
from spdfq.evaluation.evaluator import Evaluator, evaluator_for
from spdfq.quantized.checkpoint import load_checkpoint, save_quantized, verified
from spdfq.recipe import Recipe, digest
from spdfq.recipe.structure import unstructure
from spdfq.report.images import CLASSES_FILE
from spdfq.report.json_file import read_json
from spdfq.report.site_noise import NOISE_FILE
from spdfq.runs.image_classes import image_classes
from spdfq.runs.provenance import code_digests, data_fingerprints, versions
from spdfq.runs.store import STATE
from spdfq.runtime import Runtime
from spdfq.runtime.files import write_text
from spdfq.runtime.runtime import ALONE
from spdfq.synth import SyntheticImages
from spdfq.teacher import Teacher, load_teacher

# sections that the quantized model does not depend on
_NO_PART_IN_THE_MODEL = ("evaluation", "runtime", "published", "controls")


@define
class Work:
    """What the stages of a run share.

    Args:
        recipe: what is run.
        teacher: the recipe's model, on the runtime's device.
        runtime: device, precision, seed streams and progress.
        fingerprint: hash of the teacher.
        keys: the key of each finished stage, by its name.
        results: the result of each finished stage, by its name.
    """

    recipe: Recipe
    teacher: Teacher
    runtime: Runtime
    fingerprint: str
    keys: dict[str, str] = field(factory=dict)
    results: dict[str, Any] = field(factory=dict)

    @property
    def evaluator(self) -> Evaluator:
        """What measures models like this teacher."""
        return evaluator_for(self.teacher)

    def key(self, *parts: Any) -> str:
        """A hash of the teacher, the versions and further parts."""
        return stage_key(self.fingerprint, *parts)

    def control(self, source: Any) -> "Work":
        """The same work with images of another source; the teacher's stage is shared."""
        return evolve(
            self,
            recipe=evolve(self.recipe, synthesis=source, controls={}, published=None),
            keys={TeacherStage.name: self.keys[TeacherStage.name]},
            results={TeacherStage.name: self.results[TeacherStage.name]},
        )


def stage_key(fingerprint: str, *parts: Any) -> str:
    """A hash of a teacher's fingerprint, the versions of torch and timm, and further parts."""
    return digest(fingerprint, versions()["torch"], versions()["timm"], *parts)


def evaluation_key(recipe: Recipe) -> str:
    """A hash of a recipe's evaluation section, the data it reads and the code that measures."""
    spec = recipe.evaluation
    read = {name: getattr(spec, name) for name in ("dataset", "bank")}
    # the number of decoding processes does not change the images
    spec = evolve(spec, **{name: evolve(one, workers=0) for name, one in read.items() if hasattr(one, "workers")})
    return digest(unstructure(spec), data_fingerprints(spec), code_digests(recipe)[EvaluateStage.name])


class Stage(ABC):
    """Base class of stages: a result, what it depends on, how it is made and how it is read back."""

    name: ClassVar[str]

    @abstractmethod
    def key(self, work: Work) -> str:
        """A hash of everything that the result depends on."""

    @abstractmethod
    def make(self, work: Work, folder: Path) -> None:
        """Make the result and write it into the folder. Every process calls this; the first one writes."""

    @abstractmethod
    def load(self, work: Work, folder: Path) -> Any:
        """Read the result from the folder."""


class TeacherStage(Stage):
    """Measure the full-precision model. Result: its predictions."""

    name = "teacher"

    def key(self, work: Work) -> str:
        """Depends on the evaluation section and its data."""
        return work.key(evaluation_key(work.recipe))

    def make(self, work: Work, folder: Path) -> None:
        """Write ``reference.safetensors``."""
        found = work.evaluator.reference(work.teacher, work.recipe.evaluation, work.runtime, folder / STATE)
        if work.runtime.ranks.leads:
            found.save(folder / "reference.safetensors")

    def load(self, work: Work, folder: Path) -> Any:
        """Read the predictions."""
        return work.evaluator.load_reference(folder / "reference.safetensors")


class ImagesStage(Stage):
    """Make the calibration images. Result: `SyntheticImages`."""

    name = "images"

    def key(self, work: Work) -> str:
        """Depends on the synthesis section, its data, seed, precision and compilation; on the back-end of a student."""
        recipe: Any = work.recipe
        spec, code = recipe.synthesis, code_digests(recipe)[self.name]
        student = unstructure(student_section(recipe.quantization)) if spec.needs_student else None
        parts = unstructure(spec, "source"), data_fingerprints(spec), recipe.seed, work.runtime.precision
        compiled = ["compiled"] if work.runtime.compile else []
        return work.key(*parts, code, student, *compiled)

    def make(self, work: Work, folder: Path) -> None:
        """Write ``synthetic.safetensors``."""
        images = make_images(work.recipe, work.teacher, work.runtime, folder / STATE)
        if work.runtime.ranks.leads:
            images.save(folder / "synthetic.safetensors")

    def load(self, work: Work, folder: Path) -> SyntheticImages:
        """Read the images."""
        return SyntheticImages.load(folder / "synthetic.safetensors")


class QuantizeStage(Stage):
    """Quantize the model on the images. Result: the folder of the saved model and of its list of sites."""

    name = "quantize"

    def key(self, work: Work) -> str:
        """Depends on the quantization section, the images, seed and precision."""
        recipe, code = work.recipe, code_digests(work.recipe)[self.name]
        images, precision = work.keys[ImagesStage.name], work.runtime.precision
        return work.key(unstructure(recipe.quantization), images, recipe.seed, precision, code)

    def make(self, work: Work, folder: Path) -> None:
        """Write ``quantized/``, ``sites.json``, and what the report shows of both."""
        shared, leads = any(step.shared for step in work.recipe.quantization.steps), work.runtime.ranks.leads
        if not (shared or leads):
            return
        given = work.results[ImagesStage.name]
        images, runtime = given.images, work.runtime if shared else evolve(work.runtime, ranks=ALONE)
        model = quantize(work.teacher, images, work.recipe.quantization, runtime, folder / STATE)
        if not leads:
            return
        parts = {key: value for key, value in work.recipe.to_dict().items() if key not in _NO_PART_IN_THE_MODEL}
        save_quantized(model, folder / "quantized", work.teacher, parts)
        write_text(folder / "sites.json", json.dumps(model.site_table(), indent=1) + "\n")
        shown: dict[str, Any] = {NOISE_FILE: site_noise(model, images, work.runtime)}
        if not work.teacher.headless:
            shown[CLASSES_FILE] = image_classes(given, work.teacher, work.runtime)
        for name, content in shown.items():
            write_text(folder / name, json.dumps(content) + "\n")

    def load(self, work: Work, folder: Path) -> Path:
        """Check the saved model and its list of sites."""
        verified(folder / "quantized")
        percent_in_float(folder / "sites.json")
        return folder


def percent_in_float(sites: Path) -> float:
    """The share of the multiplications with an operand in float, from a ``sites.json``.

    Raises:
        DataError: the file is missing or damaged.
    """
    with reading(sites):
        return float(read_json(sites)["multiplications"]["percent_in_float"])


class EvaluateStage(Stage):
    """Measure the saved model. Result: the metrics as plain data."""

    name = "evaluate"

    def key(self, work: Work) -> str:
        """Depends on the saved model and on what the teacher's measurement depends on."""
        return work.key(work.keys[QuantizeStage.name], work.keys[TeacherStage.name])

    def make(self, work: Work, folder: Path) -> None:
        """Write ``metrics.json``."""
        model = load_checkpoint(work.results[QuantizeStage.name] / "quantized", self._architecture(work))[0]
        fp = work.results[TeacherStage.name]
        metrics = work.evaluator.measure(
            model.to(work.runtime.device), work.teacher, work.recipe.evaluation, work.runtime, fp, folder / STATE
        )
        if work.runtime.ranks.leads:
            write_text(folder / "metrics.json", json.dumps(metrics, indent=1) + "\n")

    def _architecture(self, work: Work) -> torch.nn.Module:
        return load_teacher(work.recipe.model, weights=False).module

    def load(self, work: Work, folder: Path) -> dict[str, Any]:
        """Read the metrics."""
        return read_json(folder / "metrics.json")


STAGES: tuple[Stage, ...] = (TeacherStage(), ImagesStage(), QuantizeStage(), EvaluateStage())
