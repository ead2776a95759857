"""What every stage is given: device, precision, seeds, progress, the processes of a run, and atomic writes of files."""

from spdfq.runtime.draws import Draws
from spdfq.runtime.progress import Advance, Progress, RichProgress, pick_progress, silent
from spdfq.runtime.runtime import Runtime, generator, make_runtime, own_threads, pick_device, pick_precision

__all__ = [
    "Advance",
    "Draws",
    "Progress",
    "RichProgress",
    "Runtime",
    "generator",
    "make_runtime",
    "own_threads",
    "pick_device",
    "pick_precision",
    "pick_progress",
    "silent",
]
