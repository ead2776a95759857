"""Result rows: one line of JSON for each measured model, with everything that a comparison needs to know."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import attrs
from attrs import field, frozen, validators

from spdfq.errors import DataError, first_line, reading
from spdfq.recipe.structure import structure
from spdfq.runtime.files import write_text

SCHEMA = 1
_PERCENT = validators.optional([validators.ge(0), validators.le(100)])
_COUNT = validators.optional(validators.ge(0))


@frozen(kw_only=True)
class Model:
    """The model before quantization.

    Args:
        name: as in ``model.name`` of a recipe.
        fingerprint: a hash of architecture, weights and description of the input.
    """

    name: str
    fingerprint: str | None = None


@frozen(kw_only=True)
class Images:
    """The calibration images.

    Args:
        type: the registered source.
        count: how many there are.
        damaged: those of a dataset that could not be read, with reasons.
        digest: a hash of the recipe's section ``synthesis``.
    """

    type: str | None = None
    count: int | None = field(default=None, validator=_COUNT)
    damaged: tuple[str, ...] | None = None
    digest: str | None = None


@frozen(kw_only=True)
class Backend:
    """How the model was quantized.

    Args:
        label: the bits in short: ``W3A3``.
        placement: which tensors are quantized.
        steps: that calibrated and repaired the model.
        percent_in_float: share of the multiplications with an operand in float.
        digest: a hash of the recipe's section ``quantization``.
    """

    label: str | None = None
    placement: str | None = None
    steps: tuple[str, ...] | None = None
    percent_in_float: float | None = field(default=None, validator=_PERCENT)
    digest: str | None = None


@frozen(kw_only=True)
class Accuracy:
    """Accuracy in percent.

    Args:
        top1: the first class is right.
        top5: one of the first five classes is right; not for five classes or fewer.
    """

    top1: float | None = field(default=None, validator=_PERCENT)
    top5: float | None = field(default=None, validator=_PERCENT)


@frozen(kw_only=True)
class Correct:
    """Which test images are classified correctly: one bit for each, the first in the highest bit, in Base64.

    Args:
        fp: by the full-precision model.
        quantized: by the quantized model.
    """

    fp: str | None = None
    quantized: str | None = None


@frozen(kw_only=True)
class IntegerFile:
    """A file that was measured in an integer runtime.

    Args:
        runtime: that measured it.
        version: of the runtime.
        size: of the file, in bytes.
        products: number of matrix products in the file.
        integer_products: of these, computed with integers.
        float_products: names of those that were not meant to be in float and are.
        agreement: share of the test images that the file and the simulation put in the same class, in percent.
    """

    runtime: str
    version: str
    size: int = field(validator=validators.ge(0))
    products: int = field(validator=validators.ge(0))
    integer_products: int = field(validator=validators.ge(0))
    float_products: tuple[str, ...] = ()
    agreement: float = field(validator=[validators.ge(0), validators.le(100)])


@frozen(kw_only=True)
class Metrics:
    """What was measured on the test images.

    Args:
        images: number of test images that could be read.
        test_images: a hash of these images and of their order.
        damaged: those that could not be read, with reasons.
        measure: ``top-1``, or ``k-NN top-1`` of a model without a head.
        bank: number of labelled images among which neighbours are sought, without those that could not be read.
        bank_images: a hash of these images and of their order.
        bank_damaged: those that could not be read, with reasons.
        fp: accuracy of the full-precision model.
        quantized: accuracy of the quantized model.
        agreement: share of the test images that both put in the same class, in percent.
        similarity: mean cosine of the features of both, for a model without a head.
        divergence: Kullback-Leibler divergence of the predictions from those of the full-precision model, in nats.
        simulated: true if quantization was computed in float, false if a runtime computed with integers.
        precision: of the forward passes on the test images.
        correct: which images each model classifies correctly.
    """

    images: int = field(validator=validators.ge(1))
    test_images: str | None = None
    damaged: tuple[str, ...] | None = None
    measure: str = "top-1"
    bank: int | None = field(default=None, validator=_COUNT)
    bank_images: str | None = None
    bank_damaged: tuple[str, ...] | None = None
    fp: Accuracy
    quantized: Accuracy
    agreement: float | None = field(default=None, validator=_PERCENT)
    similarity: float | None = None
    divergence: float | None = None
    simulated: bool
    precision: str | None = None
    correct: Correct | None = None


@frozen(kw_only=True)
class Row:
    """One measured model. What is not known is null.

    Device, threads, versions and commit are those of the process that wrote the row. A stage that it reused from the
    store may have been made with others; ``stages`` says which ones were reused.

    Args:
        schema: version of this format.
        axes: what distinguishes the row from others of its file, by name.
        seed: of every random draw.
        folder: of the run, in the folder of the bench.
        key: a hash of everything that the result depends on.
        error: why there is no result; null if there is one.
        model: before quantization.
        images: that it was calibrated on.
        backend: that quantized it.
        metrics: what was measured; null only after an error.
        integer_file: the file that was measured, if the model ran in an integer runtime.
        seconds: of the whole run; a reused stage counts with the time to load it.
        stages: seconds, key, and whether it was reused, of each stage.
        peak_memory: in bytes, while the run worked: of the process, or of what torch allocated on the accelerator.
        device: ``cpu`` or ``cuda``.
        device_name: the processor and its number of cores, or the accelerator.
        threads: of the CPU.
        precision: of the forward passes in synthesis and reconstruction.
        versions: of spdfq, Python, torch and timm.
        git_commit: of spdfq.
        recipe_digest: a hash of the recipe.
    """

    schema: int = field(default=SCHEMA, validator=validators.in_((SCHEMA,)))
    axes: dict = field(factory=dict)
    seed: int = field(validator=validators.ge(0))
    folder: str | None = None
    key: str | None = None
    error: str | None = None
    model: Model
    images: Images = field(factory=Images)
    backend: Backend = field(factory=Backend)
    metrics: Metrics | None = None
    integer_file: IntegerFile | None = None
    seconds: float | None = field(default=None, validator=_COUNT)
    stages: dict | None = None
    peak_memory: int | None = field(default=None, validator=_COUNT)
    device: str | None = None
    device_name: str | None = None
    threads: int | None = field(default=None, validator=_COUNT)
    precision: str | None = None
    versions: dict | None = None
    git_commit: str | None = None
    recipe_digest: str | None = None

    def __attrs_post_init__(self) -> None:
        if (self.metrics is None) == (self.error is None):
            raise ValueError("a row has either metrics or an error")
        for name, stage in (self.stages or {}).items():
            known = stage if isinstance(stage, dict) else {}
            if not (isinstance(known.get("seconds"), (int, float)) and isinstance(known.get("reused"), bool)):
                raise ValueError(f"stages.{name}: expected its seconds and whether it was reused")

    @property
    def measured(self) -> Metrics:
        """The metrics of a row without an error."""
        if self.metrics is None:
            raise DataError(f"{self.folder}: failed ({self.error}); it has no metrics")
        return self.metrics

    @property
    def top1(self) -> float:
        """Top-1 of the quantized model in percent.

        Raises:
            DataError: the row has no such number.
        """
        if (found := self.measured.quantized.top1) is None:
            raise DataError(f"{self.folder or self.axes}: has no top-1")
        return found

    def to_dict(self) -> dict[str, Any]:
        """Plain data; what is not known is ``None``."""
        return attrs.asdict(
            self, value_serializer=lambda _, __, value: list(value) if isinstance(value, tuple) else value
        )


def row_of_run(record: dict[str, Any], **identity: Any) -> Row:
    """The row of a finished run.

    Args:
        record: contents of its ``run.json``.
        identity: ``axes``, ``folder`` and ``key`` of the row, as far as there are any.

    Raises:
        DataError: the record is damaged, or was written by an older version.
    """
    try:
        data = {
            **identity,
            "seed": record["seed"],
            "model": {key: record["model"][key] for key in ("name", "fingerprint")},
            "seconds": round(sum(stage["seconds"] for name, stage in record["stages"].items() if ": " not in name), 3),
            **{key: record[key] for key in ("images", "backend", "metrics", "stages", "peak_memory", "device")},
            **{key: record[key] for key in ("device_name", "threads", "precision", "versions", "git_commit")},
            "recipe_digest": record["recipe_digest"],
        }
    except KeyError as error:
        raise DataError(f"run.json: has no {error}; run the recipe again with this version") from None
    except (TypeError, AttributeError) as error:
        raise DataError(f"run.json: damaged ({first_line(error)}); run the recipe again with this version") from None
    return checked_row(data, "run.json")


def checked_row(data: Any, place: str) -> Row:
    """A row from plain data.

    Raises:
        DataError: with the first problem, and how many more there are.
    """
    problems: list[str] = []
    row = structure(Row, _known(data), "", problems)
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise DataError(f"{place}: {problems[0].removeprefix('recipe: ')}{more}; docs/results-schema.md has the fields")
    assert isinstance(row, Row)
    return row


def read_rows(path: Path) -> list[Row]:
    """The rows of a ``.jsonl`` file.

    Raises:
        DataError: it is missing or damaged, or was written by an older version.
    """
    with reading(path, "give a file of result rows"):
        lines = path.read_text(encoding="utf-8").splitlines()
    return [_row(path, number, line) for number, line in enumerate(lines, 1)]


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    """Write a ``.jsonl`` file of rows."""
    write_text(path, "".join(json.dumps(row.to_dict()) + "\n" for row in rows))


def _row(path: Path, number: int, line: str) -> Row:
    place = f"{path}, line {number}"
    try:
        data = json.loads(line)
    except (ValueError, RecursionError):
        raise DataError(f"{place}: not JSON; remove the line, or the file") from None
    if isinstance(data, dict) and "schema" not in data:
        raise OldRowError(f"{place}: a row of an older version; python tools/convert_rows.py {path} converts it")
    return checked_row(data, place)


class OldRowError(DataError):
    """A row that was written before rows had a schema."""


def _known(data: Any) -> Any:
    """Plain data without what is null."""
    if isinstance(data, dict):
        return {key: _known(value) for key, value in data.items() if value is not None}
    return [_known(item) for item in data] if isinstance(data, list) else data
