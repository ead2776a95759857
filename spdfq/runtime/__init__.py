"""What every stage is given: device, precision, seeds, progress, the processes of a run, and atomic writes of files."""

from spdfq.runtime.runtime import (
    Advance,
    Runtime,
    generator,
    make_runtime,
    own_threads,
    pick_device,
    pick_precision,
    rich_progress,
    silent,
)

__all__ = [
    "Advance",
    "Runtime",
    "generator",
    "make_runtime",
    "own_threads",
    "pick_device",
    "pick_precision",
    "rich_progress",
    "silent",
]
