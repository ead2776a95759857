"""Atomic writes: a reader sees the old file or the new one, never a part."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from spdfq.errors import DataError, writing


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Let ``write`` fill a temporary file, flush it to disk, and move it into place.

    Raises:
        DataError: the folder cannot be written.
    """
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")  # shards of a bench write the same file
    with writing(path):
        try:
            write(temporary)
            temporary.chmod(0o666 & ~_umask())  # safetensors keeps others from reading
            with open(temporary, "rb") as handle:
                os.fsync(handle.fileno())
            os.replace(temporary, path)
        finally:
            if temporary.parent.is_dir():
                temporary.unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically, in UTF-8."""
    replace_file(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def copy_file(source: Path, path: Path) -> None:
    """Copy a file atomically."""
    replace_file(path, lambda temporary: shutil.copyfile(source, temporary))


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file atomically. The same tensors and metadata give the same bytes.

    Raises:
        DataError: the folder cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    stored = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}

    def write(temporary: Path) -> None:
        try:
            save_file(stored, temporary, metadata=metadata)
        except SafetensorError as error:
            raise OSError(str(error).partition(" at path")[0]) from None
        _sort_metadata(temporary)

    replace_file(path, write)


def _sort_metadata(path: Path) -> None:
    """Sort the metadata in the header of a safetensors file, which writes them in random order."""
    with open(path, "r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        if "__metadata__" in header:
            header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
            file.seek(8)
            file.write(json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode().ljust(size))


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
