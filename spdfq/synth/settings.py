"""Settings of the synthesis loop: the recipe keys of ``type = "optimize"`` and the rules between them."""

from typing import Any, Literal

from attrs import define, field, validators

from spdfq.recipe.structure import component, component_list, components
from spdfq.synth.base import Source
from spdfq.synth.optimizers import Adam
from spdfq.synth.pruning import TokenPruning
from spdfq.synth.samplers import WholeImageSampler
from spdfq.synth.schedules import WarmupCosine
from spdfq.synth.student_training import StudentTraining
from spdfq.synth.targets import OneHotTarget

LOOP_COLUMNS = ("total", "gradient")
_RESERVED = {*LOOP_COLUMNS, "steps"}


def _groups(_: Any, __: Any, value: Any) -> None:
    if value != "auto" and value < 1:
        raise ValueError(f"must be at least 1, or 'auto', got {value!r}")


@define(kw_only=True)
class SynthesisSettings(Source):
    """What the loop reads from the recipe.

    Args:
        images: number of images.
        group: number of images optimised together; losses over a batch are computed over each group.
        groups_per_pass: number of groups that share each forward pass of the teacher; each keeps its own losses and
            optimizer. More need more memory and can be faster, and change the last digits. ``auto`` takes what fits
            into the free memory.
        iterations: optimizer steps of each group.
        losses: what is minimised; the key is the name of the loss.
        sampler: which classes an image shows, and where.
        target: distribution that the outputs are pulled towards.
        augmentations: applied in order to the whole images in every iteration; crops are not augmented.
        optimizer: of the pixels.
        schedule: of the learning rate.
        pruning: leaves patches out of the forward passes during the run; all patches stay if the section is missing.
        student: a quantized model that is trained along with the images, for losses that compare the teacher with it;
            there is none if the section is missing.
    """

    group: int = field(default=32, validator=validators.ge(1))
    groups_per_pass: int | Literal["auto"] = field(default=1, validator=_groups)
    iterations: int = field(default=1000, validator=validators.ge(1))
    losses: dict[str, Any] = components("loss")
    sampler: Any = component("sampler", default=WholeImageSampler)
    target: Any = component("target", default=OneHotTarget)
    augmentations: tuple[Any, ...] = component_list("augmentation")
    optimizer: Any = component("optimizer", default=Adam)
    schedule: Any = component("schedule", default=WarmupCosine)
    pruning: TokenPruning | None = None
    student: StudentTraining | None = None

    def __attrs_post_init__(self) -> None:
        if not self.losses:
            raise ValueError("has no losses; add one, for example [synthesis.losses.soft_cross_entropy]")
        if taken := _RESERVED & set(self.losses):
            raise ValueError(f"losses.{min(taken)}: is the name of a column of losses.csv; choose another name")
        automatic = [name for name, loss in self.losses.items() if loss.weight == "auto"]
        label_weights = {name: loss.weight for name, loss in self.losses.items() if loss.label_loss}
        if wrong := [name for name in automatic if name in label_weights]:
            raise ValueError(f"losses.{wrong[0]}: a label loss cannot have weight 'auto'; give it a number")
        if label_weights and not self.target.gives_labels:
            raise ValueError(
                f"losses.{min(label_weights)}: needs labels, but the target gives none; set target = 'one_hot'"
            )
        comparing = [name for name, loss in self.losses.items() if loss.needs_student]
        if comparing and not self.student:
            raise ValueError(f"losses.{comparing[0]}: compares with a student; add an empty [synthesis.student]")
        if self.student and not comparing:
            raise ValueError("student: no loss compares with it; add teacher_student_discrepancy, or leave it out")
        if self.student and self.groups_per_pass not in (1, "auto"):
            raise ValueError("groups_per_pass: each group trains a student of its own; leave it at 1")
        if automatic and not any(weight > 0 for weight in label_weights.values()):
            raise ValueError("weight = 'auto' balances against a label loss; add soft_cross_entropy or cross_entropy")

    @property
    def needs(self) -> frozenset[str]:
        """What must be recorded of the teacher, for all losses."""
        return frozenset().union(*(loss.needs for loss in self.losses.values()))

    @property
    def student_needs(self) -> frozenset[str]:
        """What must be recorded of the student, for the losses that need one."""
        return frozenset().union(*(loss.needs for loss in self.losses.values() if loss.needs_student))

    @property
    def needs_student(self) -> bool:
        """Whether a quantized student is trained along with the images."""
        return self.student is not None
