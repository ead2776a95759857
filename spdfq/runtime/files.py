"""Atomic writes: a reader sees the old file or the new one, never a part."""

import os
from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from spdfq.errors import DataError


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Let ``write`` fill a temporary file, flush it to disk, and move it into place."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        write(temporary)
        temporary.chmod(0o666 & ~_umask())  # safetensors keeps others from reading
        with open(temporary, "rb") as handle:
            os.fsync(handle.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically, in UTF-8."""
    replace_file(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file atomically.

    Raises:
        DataError: there is no room for it.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    stored = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    try:
        replace_file(path, lambda temporary: save_file(stored, temporary, metadata=metadata))
    except SafetensorError as error:
        raise DataError(f"{path}: could not be written ({error}); is there room for it?") from None


def read_tensors(path: Path, remedy: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of what `write_tensors` wrote.

    Raises:
        DataError: the file is damaged or missing; the message ends in ``remedy``.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as stored:
            return {name: stored.get_tensor(name) for name in stored.keys()}, stored.metadata() or {}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise DataError(f"{path}: damaged or missing ({error}); {remedy}") from None
