"""The base class of exporters: from a quantized model to a file that other software runs."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

from attrs import field, frozen

from spdfq.exporters.runtime_models import RuntimeModel
from spdfq.extras import require
from spdfq.quantized.model import QuantizedModel
from spdfq.recipe.structure import Checked
from spdfq.teacher import Teacher


@frozen
class Written:
    """What an exporter says about a file that it wrote.

    Args:
        notes: a line for everything that the file does not compute as the quantized model does.
        constant_products: names of products that do not depend on the images and were computed once, for the file.
    """

    notes: list[str]
    constant_products: list[str] = field(factory=list)


class Exporter(Checked, ABC):
    """Base class: writes a quantized model in one file format.

    A child class defines `write` and these class variables:

    * ``suffix``: of the file, with the dot.
    * ``extra``: the optional dependencies of spdfq that it needs; empty if none.
    * ``packages``: their modules.
    """

    suffix: ClassVar[str]
    extra: ClassVar[str] = ""
    packages: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def write(self, model: QuantizedModel, teacher: Teacher, path: Path, metadata: dict[str, str]) -> Written:
        """Write the file, completely or not at all.

        Args:
            model: calibrated; it does not change.
            teacher: describes the input.
            path: of the file; its folder exists.
            metadata: what the file says about itself, by key: JSON texts.

        Raises:
            ModelError: the model cannot be written in this format; the message names the module.
        """

    def runtimes(self) -> Sequence[type[RuntimeModel]]:
        """The installed runtimes that run such files; each opens one by its path. None for files that are not run."""
        return ()

    def check(self) -> None:
        """Raises SpdfqError if a package is missing."""
        require(f"format {self.suffix[1:]!r}", self.packages, self.extra)
