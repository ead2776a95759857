"""A model that gives images labels with probabilities."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from attrs import frozen
from numpy.typing import NDArray

from spdfq.errors import DataError, NonFiniteError, SpdfqError, shown
from spdfq.inference.image_files import read_image
from spdfq.inference.preprocessing import Preprocessing

TOP = 5
_BATCH = 32


@frozen
class Prediction:
    """One class of an image.

    Args:
        label: name of the class; its number as text if the model has no names.
        probability: from 0 to 1.
        index: of the class in the logits.
    """

    label: str
    probability: float
    index: int


@frozen
class Classified:
    """An image file and its classes.

    Args:
        image: the file.
        predictions: the most probable first; empty if the file cannot be read.
        problem: why it cannot be read; empty if it can.
    """

    image: Path
    predictions: Sequence[Prediction] = ()
    problem: str = ""


@frozen(kw_only=True)
class Classifier:
    """A model with the preprocessing of its images and the names of its classes.

    Args:
        source: the file or folder that it comes from.
        computed: how it computes: ``simulated``, or a runtime with its version.
        preprocessing: of an image.
        num_classes: number of logits.
        class_names: in the order of the logits; empty if they are not known.
        logits: float32 ``[B, num_classes]`` of preprocessed images, float32 ``[B, C, H, W]``.
    """

    source: str
    computed: str
    preprocessing: Preprocessing
    num_classes: int
    class_names: Sequence[str]
    logits: Callable[[NDArray[np.float32]], NDArray[np.float32]]

    def __attrs_post_init__(self) -> None:
        if self.num_classes == 0:
            raise SpdfqError(f"{self.source}: has no head, so it gives features and no labels; use a model with a head")
        if self.class_names and len(self.class_names) != self.num_classes:
            raise DataError(
                f"{self.source}: {len(self.class_names)} class names for {self.num_classes} classes; give one for each"
            )

    def __call__(self, image: Any, top: int | None = None) -> list[Prediction]:
        """The most probable classes of an image.

        Args:
            image: a PIL image, or the path of a file.
            top: how many classes; by default 5, or all of them if there are fewer.

        Raises:
            DataError: not an image, or one that the model cannot take.
            NonFiniteError: a logit is NaN or infinite.
            SpdfqError: ``top`` is not a number of classes.
        """
        top = self.checked_top(top)
        if isinstance(image, (str, Path)):
            (found,) = self.classify([Path(image)], top)
            if found.problem:
                raise DataError(f"{image}: {found.problem}")
            return list(found.predictions)
        (row,) = self._probabilities(self.preprocessing(image)[None])
        return self._best(row, top)

    def classify(self, files: Sequence[Path], top: int | None = None) -> Iterator[Classified]:
        """The most probable classes of image files, in their order; those that cannot be read have a reason instead.

        Args:
            files: the paths; `image_files` finds those of folders.
            top: as in a call.
        """
        top = self.checked_top(top)
        for start in range(0, len(files), _BATCH):
            yield from self._batch(files[start : start + _BATCH], top)

    def checked_top(self, top: int | None) -> int:
        """How many classes to give.

        Raises:
            SpdfqError: not a whole number from 1 to the number of classes.
        """
        if top is None:
            return min(TOP, self.num_classes)
        if type(top) is not int or top < 1:
            raise SpdfqError(f"top: expected a whole number from 1 to {self.num_classes}, got {shown(top)}")
        if top > self.num_classes:
            raise SpdfqError(f"top: {top} is more than the {self.num_classes} classes of {self.source}; lower it")
        return top

    def _batch(self, files: Sequence[Path], top: int) -> Iterator[Classified]:
        pixels: dict[Path, NDArray[np.float32]] = {}
        problems: dict[Path, str] = {}
        for file in files:
            try:
                pixels[file] = read_image(partial(Path, file), self.preprocessing)
            except DataError as error:
                problems[file] = f"{error}; replace it, or leave it out"
        rows = iter(self._probabilities(np.stack(list(pixels.values()))) if pixels else ())
        best = {file: self._best(next(rows), top) for file in pixels}
        for file in files:
            yield Classified(file, best.get(file, ()), problems.get(file, ""))

    def _probabilities(self, images: NDArray[np.float32]) -> NDArray[np.float64]:
        """The softmax of the logits, float64 ``[B, num_classes]``."""
        logits = self.logits(images).astype(np.float64)
        if logits.shape[1:] != (self.num_classes,):
            given = " x ".join(map(str, logits.shape[1:]))
            said = f"gives {given} logits, but its metadata say {self.num_classes} classes"
            raise DataError(f"{self.source}: {said}; export the model again")
        if not np.isfinite(logits).all():
            raise NonFiniteError(f"{self.source}: a logit is NaN or infinite; measure the model with spdfq evaluate")
        powers = np.exp(logits - logits.max(1, keepdims=True))
        probabilities: NDArray[np.float64] = powers / powers.sum(1, keepdims=True)
        return probabilities

    def _best(self, probabilities: NDArray[np.float64], top: int) -> list[Prediction]:
        order = np.argsort(-probabilities, kind="stable")[:top].tolist()
        names = self.class_names or list(map(str, range(self.num_classes)))
        return [Prediction(names[index], float(probabilities[index]), index) for index in order]
