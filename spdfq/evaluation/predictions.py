"""A model's predictions on a dataset, and the batches that an interrupted evaluation has already finished."""

import json
import time
from collections.abc import Iterable
from pathlib import Path

import torch
from attrs import define, field, frozen
from torch import Tensor

from spdfq.runtime.files import read_tensors, write_tensors

SAVE_SECONDS = 5.0
REMEDY = "delete it, or use --fresh"


@frozen(eq=False)
class Predictions:
    """A model's predictions for the readable images of a dataset.

    Args:
        logits: float32 ``[n, K]``, on the CPU.
        labels: int64 ``[n]``.
        damaged: the images that cannot be read, with reasons; they are not among the ``n``.
    """

    logits: Tensor
    labels: Tensor
    damaged: tuple[str, ...] = ()

    def save(self, path: Path) -> None:
        """Write one safetensors file."""
        tensors = {"logits": self.logits, "labels": self.labels}
        write_tensors(path, tensors, {"damaged": json.dumps(self.damaged)})

    @classmethod
    def load(cls, path: Path) -> "Predictions":
        """Read what `save` wrote.

        Raises:
            DataError: the file is damaged or missing.
        """
        tensors, metadata = read_tensors(path, REMEDY)
        return cls(tensors["logits"], tensors["labels"], tuple(json.loads(metadata["damaged"])))

    @classmethod
    def joined(cls, parts: Iterable["Predictions"]) -> "Predictions":
        """Concatenate the predictions of several batches."""
        parts = list(parts)
        damaged = tuple(name for part in parts for name in part.damaged)
        full = [part for part in parts if len(part.labels)] or parts  # an empty batch has no class count
        return cls(torch.cat([part.logits for part in full]), torch.cat([part.labels for part in full]), damaged)


@define(eq=False)
class FinishedBatches:
    """Predictions of finished batches, by the position of each batch's first image.

    New batches are written together every `SAVE_SECONDS` seconds, as one file.

    Args:
        folder: where the files are written; without it, nothing is written.
        batches: the predictions of each batch.
    """

    folder: Path | None = None
    batches: dict[int, Predictions] = field(factory=dict)
    _unsaved: dict[int, Predictions] = field(factory=dict, init=False)
    _saved_at: float = field(factory=lambda: time.monotonic(), init=False)

    @classmethod
    def found(cls, folder: Path | None) -> "FinishedBatches":
        """Read the batches that an earlier, interrupted call wrote.

        Raises:
            DataError: one of its files is damaged.
        """
        batches: dict[int, Predictions] = {}
        for path in sorted(folder.glob("*.safetensors")) if folder else ():
            tensors, metadata = read_tensors(path, REMEDY)
            for start, damaged in json.loads(metadata["damaged"]).items():
                batches[int(start)] = Predictions(
                    tensors[f"{start}.logits"], tensors[f"{start}.labels"], tuple(damaged)
                )
        return cls(folder, batches)

    def add(self, start: int, predictions: Predictions) -> None:
        """Add a batch, and write all unwritten batches if enough time has passed."""
        self.batches[start] = self._unsaved[start] = predictions
        if time.monotonic() - self._saved_at >= SAVE_SECONDS:
            self.save()

    def save(self) -> None:
        """Write the batches that have not been written yet."""
        if self.folder and self._unsaved:
            self.folder.mkdir(parents=True, exist_ok=True)
            tensors = {f"{start}.logits": part.logits for start, part in self._unsaved.items()}
            tensors |= {f"{start}.labels": part.labels for start, part in self._unsaved.items()}
            damaged = json.dumps({start: part.damaged for start, part in self._unsaved.items()})
            # ranks share the folder; each batch is computed once, so its position is a unique file name
            write_tensors(self.folder / f"{min(self._unsaved):09d}.safetensors", tensors, {"damaged": damaged})
        self._unsaved = {}
        self._saved_at = time.monotonic()
