"""Errors whose message tells a user what to do; the command line prints only the message and exits with 2."""

import csv
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

AGAIN = "run the recipe again with --fresh"
"""What to do about a damaged file of a run."""
_WRONG_CONTENTS = (
    *(ValueError, TypeError, AttributeError, LookupError, ArithmeticError, csv.Error),
    RecursionError,  # of brackets nested too deeply
)


class SpdfqError(Exception):
    """An error whose message names the place and the remedy."""


class RecipeError(SpdfqError):
    """A recipe that cannot be run; ``problems`` has one line for each mistake."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


class ComponentError(SpdfqError, ValueError, TypeError):
    """A component made from wrong values, or a class that lacks a method; also a ValueError and a TypeError."""


class ModelError(SpdfqError):
    """A model that cannot be loaded, or that a component cannot work with."""


class DataError(SpdfqError):
    """Images, weights or checkpoints that are missing, damaged or of the wrong type."""


class MissingDataError(DataError):
    """A file or folder of images or labels that does not exist."""


class NonFiniteError(SpdfqError):
    """A loss, gradient or observed value that is NaN or infinite."""


def is_out_of_memory(error: Exception) -> bool:
    """Whether memory ran out, on the machine or on its accelerator; torch has no exception type for the former."""
    torch = sys.modules.get("torch")
    full = (MemoryError, torch.OutOfMemoryError) if torch else (MemoryError,)
    return isinstance(error, full) or "DefaultCPUAllocator" in str(error) or "CUDA error: out of memory" in str(error)


def shown(value: Any) -> str:
    """A wrong argument in a few words, for an error message: a short value itself, otherwise its type."""
    text = repr(value)
    if isinstance(value, type):
        return f"the class {value.__name__}"
    return text if len(text) <= 40 and "\n" not in text else type(value).__name__


def first_line(error: Exception) -> str:
    """An error of another library, in one line."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:160]}"


@contextmanager
def writing(place: Path, remedy: str = "make room there, make it writable, or choose another folder") -> Iterator[None]:
    """Turn a refusal of the operating system to write into one line.

    Raises:
        DataError: it refused; the message names the place, the reason and the remedy.
    """
    try:
        yield
    except OSError as error:
        reason = "it is a file" if isinstance(error, FileExistsError) else error.strerror or error
        raise DataError(f"{place}: cannot be written ({reason}); {remedy}") from None


@contextmanager
def reading(place: Path, remedy: str = AGAIN) -> Iterator[None]:
    """Turn what a missing or damaged file makes its reader raise into one line.

    Raises:
        DataError: the file cannot be read, or its contents are wrong; the message names the place, the reason and the
            remedy.
    """
    try:
        yield
    except SpdfqError:  # some are a ValueError too
        raise
    except KeyError as error:
        raise DataError(f"{place}: lacks {error}; {remedy}") from None
    except OSError as error:
        what = "cannot be read" if error.errno else "damaged"  # Pillow's errors have no number
        raise DataError(f"{error.filename or place}: {what} ({error.strerror or error}); {remedy}") from None
    except _WRONG_CONTENTS as error:
        raise DataError(f"{place}: damaged ({first_line(error)}); {remedy}") from error  # it may be a fault of ours
