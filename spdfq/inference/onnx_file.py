"""Exported ONNX files in onnxruntime."""

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from attrs import fields, frozen
from numpy.typing import NDArray

from spdfq.errors import DataError, MissingDataError, ModelError, SpdfqError, first_line, shown
from spdfq.inference.classifier import Classifier
from spdfq.inference.preprocessing import Preprocessing
from spdfq.inference.session import cpu_session

REQUIRED = ("class_names", "num_classes", *(each.name for each in fields(Preprocessing)))
"""The entries of a file's metadata that its images and labels need."""
_REMEDY = "export the model with spdfq export, or add it to metadata_props"


@frozen
class OnnxFile:
    """An ONNX file that is open in onnxruntime on the CPU.

    Args:
        path: of the file.
        metadata: what the file says about itself, by key.
        version: of onnxruntime.
        session: of onnxruntime.
    """

    path: Path
    metadata: dict[str, Any]
    version: str
    session: Any

    @classmethod
    def opened(cls, path: str | Path) -> "OnnxFile":
        """Open a file, and read its metadata.

        Raises:
            SpdfqError: onnxruntime is not installed.
            MissingDataError: the file does not exist.
            DataError: not an ONNX file, or one without the metadata that `REQUIRED` lists.
        """
        if not isinstance(path, (str, Path)):
            raise DataError(f"path: expected the path of an ONNX file, got {shown(path)}")
        path = Path(path)
        if not path.is_file():
            what = "is a folder" if path.is_dir() else "no such file"
            raise MissingDataError(f"{path}: {what}; give an ONNX file that spdfq export wrote")
        if find_spec("onnxruntime") is None:
            raise SpdfqError(f"{path}: needs onnxruntime, which is not installed: pip install onnxruntime")
        import onnxruntime

        try:
            session = cpu_session(str(path))
        except Exception as error:  # onnxruntime has an exception type for each reason
            why = f"not an ONNX file that onnxruntime reads ({first_line(error)})"
            raise DataError(f"{path}: {why}; give one that spdfq export wrote") from None
        found = session.get_modelmeta().custom_metadata_map
        if missing := [key for key in REQUIRED if key not in found]:
            raise DataError(f"{path}: its metadata lack {', '.join(missing)}; {_REMEDY}")
        return cls(
            path, {key: _value(path, key, text) for key, text in found.items()}, onnxruntime.__version__, session
        )

    def classifier(self) -> Classifier:
        """The file as a classifier.

        Raises:
            DataError: an entry of the metadata cannot be right.
            SpdfqError: the file has no head.
        """
        try:
            given = {each.name: self.metadata[each.name] for each in fields(Preprocessing)}
            given |= {key: tuple(value) for key, value in given.items() if isinstance(value, list)}
            preprocessing = Preprocessing(**given)
            names, classes = self.metadata["class_names"], self.metadata["num_classes"]
            if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
                raise DataError(f"class_names: expected a list of names, got {shown(names)}")
            if type(classes) is not int or classes < 0:
                raise DataError(f"num_classes: expected a whole number, got {shown(classes)}")
        except DataError as error:
            raise DataError(f"{self.path}: metadata: {error}; correct it, or export the model again") from None
        self._check_input(preprocessing)
        return Classifier(
            source=str(self.path),
            computed=f"onnxruntime {self.version}",
            preprocessing=preprocessing,
            num_classes=classes,
            class_names=names,
            logits=self.logits,
        )

    def logits(self, images: NDArray[np.float32]) -> NDArray[np.float32]:
        """Float32 ``[B, K]`` of preprocessed images, float32 ``[B, C, H, W]``.

        Raises:
            ModelError: onnxruntime cannot run the file.
        """
        try:
            found: NDArray[np.float32] = self.session.run(None, {self.session.get_inputs()[0].name: images})[0]
        except Exception as error:  # as above
            raise ModelError(f"{self.path}: onnxruntime cannot run it ({first_line(error)}); export it again") from None
        return found

    def _check_input(self, preprocessing: Preprocessing) -> None:
        said = [preprocessing.channels, *preprocessing.size]
        taken = self.session.get_inputs()[0].shape[1:]
        if taken != said:
            raise DataError(
                f"{self.path}: takes images {taken}, but its metadata say {said} (channels, height, width); correct "
                "them, or export the model again"
            )


def _value(path: Path, key: str, text: str) -> Any:
    """An entry of the metadata; other software's entries need not be JSON."""
    try:
        return json.loads(text)
    except ValueError:
        if key in REQUIRED:
            raise DataError(f"{path}: metadata: {key} is not JSON, got {shown(text)}; {_REMEDY}") from None
        return text


def load(path: str | Path) -> Classifier:
    """Open an exported ONNX file, to classify images with onnxruntime, NumPy and Pillow.

    Args:
        path: of a file that ``spdfq export`` or `spdfq.export` wrote.

    Raises:
        SpdfqError: onnxruntime is not installed, or the model has no head.
        MissingDataError: the file does not exist.
        DataError: not an ONNX file, or its metadata are incomplete or wrong.
    """
    return OnnxFile.opened(path).classifier()
