"""How much memory a synthesis will need, from a few images; and how many groups fit into a pass."""

import math

from attrs import frozen
from torch import Tensor

from spdfq.runtime import Draws, Runtime
from spdfq.runtime.peak_memory import TensorMemory, free_memory
from spdfq.synth.crops import CropPlan
from spdfq.synth.group import Group
from spdfq.synth.loop import step
from spdfq.synth.settings import SynthesisSettings
from spdfq.teacher import Teacher

# losses work in chunks, so the memory of a few small images does not grow in proportion to them; above so many bytes,
# that no longer matters
_ENOUGH_CPU, _ENOUGH = 2**25, 2**30
# the prediction may be wrong by a fifth
_SHARE = 0.8
# more images in a pass are no faster on a thread of a CPU (benchmarks/synthesis_overhead.py)
_IMAGES_CPU = 64


@frozen
class MemoryForecast:
    """What a synthesis will need at its peak, in bytes of tensors on its device.

    Args:
        weights: the teacher's parameters and buffers.
        images: all images, which stay in the memory of the CPU; 0 if the device is another one.
        fixed: what a pass needs for any number of groups.
        group: what each group of the pass adds beside ``images``.
    """

    weights: int
    images: int
    fixed: float
    group: float

    def needed(self, groups: int) -> int:
        """With this many groups in a pass. At the end, the images are joined, so they are there twice."""
        return round(self.weights + self.images + max(self.fixed + self.group * groups, self.images))

    def fitting(self, free: int) -> int:
        """How many groups fit into a pass, at least one.

        Args:
            free: bytes that are free while the teacher is loaded.
        """
        return max(1, math.floor((_SHARE * free - self.images - self.fixed) / self.group))


def forecast(spec: SynthesisSettings, teacher: Teacher, runtime: Runtime) -> MemoryForecast:
    """Measure the first iteration of a few images, and extrapolate linearly in views, which are images and crops.

    Nothing is pruned in the first iteration, its crops are due, and automatic weights are measured: no later iteration
    needs more. A student is not included.

    Args:
        spec: without a student.
        teacher: frozen, on the runtime's device.
        runtime: device, precision and seed.
    """
    tensors = [*teacher.module.parameters(), *teacher.module.buffers()]
    weights = sum(tensor.nbytes for tensor in {tensor.untyped_storage()._cdata: tensor for tensor in tensors}.values())
    size = min(spec.group, spec.images)
    enough = _ENOUGH_CPU if runtime.device.type == "cpu" else _ENOUGH
    measured: list[tuple[int, int]] = []
    count = 1
    while count <= size and (len(measured) < 2 or measured[-1][1] < enough):
        measured.append(_measured(spec, teacher, runtime, count, tensors))
        count *= 2
    fixed, view = _line(measured[-2:])
    image = math.prod(teacher.input_size) * 4 if runtime.device.type == "cpu" else 0
    draws = Draws(runtime.seed, 0).generator("sampler")
    plan = spec.sampler.sample(size, teacher.input_size[1:], teacher.num_classes, draws)
    return MemoryForecast(weights, image * spec.images, fixed, view * _views(plan, size) - image * size)


def _measured(
    spec: SynthesisSettings, teacher: Teacher, runtime: Runtime, count: int, known: list[Tensor]
) -> tuple[int, int]:
    """The views of a group of this many images, and the peak of its first iteration."""
    with TensorMemory(runtime.device, known) as memory:
        group = Group(spec, teacher, runtime, 0, count)
        step([group], 0)
    return _views(group.plan, count), memory.peak


def _views(plan: CropPlan, count: int) -> int:
    """How many images and crops the teacher sees of a group at most."""
    return count + (len(plan.boxes) if plan.due(0) else 0)


def _line(points: list[tuple[int, int]]) -> tuple[float, float]:
    """Intercept and slope of the line through two points; through zero and one point if there is only one."""
    (x, y), (right, above) = points[0], points[-1]
    slope = (above - y) / (right - x) if len(points) == 2 else y / x
    return max(0.0, y - slope * x), slope


def groups_together(spec: SynthesisSettings, teacher: Teacher, runtime: Runtime) -> int:
    """How many groups a pass takes; also announces the memory that this needs, unless there is a student.

    The number is that of the settings, or for ``auto`` what the free memory allows.

    Args:
        spec: the settings.
        teacher: frozen, on the runtime's device.
        runtime: device, precision and seed, and who is told.
    """
    wanted = spec.groups_per_pass
    if spec.student or (wanted != "auto" and not runtime.announce):
        return 1 if wanted == "auto" else wanted
    found = forecast(spec, teacher, runtime)
    own = math.ceil(math.ceil(spec.images / spec.group) / runtime.ranks.count)  # groups of this process at most
    groups = min(_fitting(spec, found, runtime) if wanted == "auto" else wanted, own)
    if runtime.announce:
        together = f", {groups} groups in each pass" if groups > 1 else ""
        runtime.announce(f"synthesis: about {_size(found.needed(groups))} of memory for tensors{together}")
    return groups


def _fitting(spec: SynthesisSettings, found: MemoryForecast, runtime: Runtime) -> int:
    free = free_memory(runtime.device)
    if free is None:
        return 1
    if runtime.device.type == "cpu":  # which all processes share
        return min(found.fitting(free // runtime.ranks.count), max(1, _IMAGES_CPU // spec.group))
    return found.fitting(free)


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"
