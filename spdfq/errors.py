"""What can go wrong, in words a user can act on: the command line prints the message alone and exits with 2."""

import sys


class SpdfqError(Exception):
    """Any error whose message names the place and the remedy."""


class RecipeError(SpdfqError):
    """A recipe that cannot be run; ``problems`` holds one line for each mistake found."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


class ModelError(SpdfqError):
    """A model that cannot be loaded, or whose structure a component cannot work with."""


class DataError(SpdfqError):
    """Images, weights or checkpoints that are missing, damaged or of the wrong kind."""


class NonFiniteError(SpdfqError):
    """A loss, a gradient or an observed value that is NaN or infinite."""


def is_out_of_memory(error: Exception) -> bool:
    """Whether the machine or its accelerator is full; torch has no exception of its own for the former."""
    torch = sys.modules.get("torch")
    full = (MemoryError, torch.OutOfMemoryError) if torch else (MemoryError,)
    return isinstance(error, full) or "DefaultCPUAllocator" in str(error) or "CUDA error: out of memory" in str(error)
