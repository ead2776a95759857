"""Parquet shards as Hugging Face writes them; needs pyarrow, an optional dependency."""

import json
from collections.abc import Callable, Sequence
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import Any

from attrs import field, frozen

from spdfq.data.base import MOST_CLASSES
from spdfq.data.classes import ClassOrder, numbered
from spdfq.data.decoded import DecodedImages, Entry
from spdfq.data.shards import matching_files, stamp
from spdfq.errors import DataError
from spdfq.registry import datasets

_IMAGE, _LABEL = "image", "label"


@datasets.register("parquet")
@frozen(kw_only=True)
class Parquet(DecodedImages):
    """Parquet shards as Hugging Face stores images: a column ``image`` of ``{bytes, path}``, and a column ``label``.

    Needs pyarrow: ``pip install pyarrow``. Images come file by file in alphabetical order. They are resized, cropped
    and normalised as timm does when it evaluates the model.

    Args:
        files: path of the shards, with ``*`` for any text, for example ``"imagenet-1k/data/validation-*.parquet"``.
        class_order: the shards' names of classes in the order of the model's classes, if it is another one: an array,
            or a text file with one name on each line.
        workers: number of processes that decode images.
        damaged: what to do with an image that cannot be read: ``skip`` leaves it out and names it in the result;
            ``refuse`` stops with an error.
        limit: number of images to use; all of them by default.
        subset_seed: seed of the random draw that picks them; they keep the dataset's order.
        skip: number of images to draw first and not use, so that another part of the same draw is used.
    """

    files: str
    class_order: ClassOrder = None

    @property
    def classes(self) -> int | None:
        """Number of classes; ``None`` if the shards do not say."""
        return len(self.label_names) or None

    @property
    def label_names(self) -> Sequence[str]:
        """The names that Hugging Face writes, in the order of the labels; empty if the shards have none."""
        names = self._names()
        return names if self.class_order is None else numbered(names, self.class_order, "parquet")

    def entries(self) -> list[Entry]:
        """Every row of every shard."""
        position = {name: index for index, name in enumerate(self.label_names)}
        moved = {label: position[name] for label, name in enumerate(self._names())}
        return [
            Entry(f"{shard.path.name} row {row}", moved.get(label, label), location)
            for shard in self._shards()
            for row, (label, location) in enumerate(zip(shard.labels, shard.locations(), strict=True))
        ]

    def _names(self) -> tuple[str, ...]:
        """The names of the classes in the order of the stored labels."""
        found = {shard.names for shard in self._shards()}
        if len(found) > 1:
            raise DataError(f"parquet: {self.files}: the shards belong to several datasets; give a narrower pattern")
        names = found.pop()
        if self.class_order is not None and not names:
            raise DataError(f"parquet: {self.files}: has no names of classes; leave out class_order")
        return names

    def reader(self) -> Callable[[Any], Path | BytesIO]:
        """Reads the image of a row, and keeps the row group of the last image in memory."""
        return _Rows()

    def stamp(self, entry: Entry) -> tuple[int, ...]:
        """Size and modification time of the shard."""
        return stamp(entry.location[0])

    def _shards(self) -> list["_Shard"]:
        return [_shard(path, stamp(path)) for path in matching_files("parquet", self.files)]


@frozen
class _Shard:
    path: Path
    labels: list[int]
    groups: list[int]
    names: tuple[str, ...]

    def locations(self) -> list[tuple[Path, int, int]]:
        """File, row group and row in the group, for each row."""
        return [(self.path, group, row) for group, rows in enumerate(self.groups) for row in range(rows)]


def _pyarrow() -> Any:
    try:
        import pyarrow.parquet
    except ImportError:
        raise DataError("parquet: needs pyarrow, which is not installed: pip install pyarrow") from None
    return pyarrow


@cache
def _shard(path: Path, stamp: Any) -> _Shard:
    pyarrow = _pyarrow()
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            _check(path, file.schema_arrow, pyarrow)
            labels = file.read([_LABEL], use_threads=False).column(_LABEL).to_pylist()
            groups = [file.metadata.row_group(index).num_rows for index in range(file.num_row_groups)]
            names = _names(file.schema_arrow.metadata or {})
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"parquet: {path}: damaged, or not a Parquet file ({error}); fetch it again") from None
    if not labels:
        raise DataError(f"parquet: {path}: holds no rows; leave it out of the pattern")
    if any(label is None or label < 0 for label in labels):
        raise DataError(f"parquet: {path}: has rows without a label, as test splits do; give another split")
    if (most := max(labels)) >= MOST_CLASSES:
        raise DataError(
            f"parquet: {path}: row {labels.index(most)} has label {most}, larger than any model's; labels must "
            "be positions in the model's list of classes; give shards with such labels"
        )
    if names and most >= len(names):
        raise DataError(
            f"parquet: {path}: row {labels.index(most)} has label {most}, but the file names {len(names)} classes; "
            "fetch it again"
        )
    return _Shard(path, labels, groups, names)


def _check(path: Path, schema: Any, pyarrow: Any) -> None:
    if twice := [name for name in (_IMAGE, _LABEL) if schema.names.count(name) > 1]:
        raise DataError(f"parquet: {path}: has {schema.names.count(twice[0])} columns {twice[0]}; leave one")
    types: dict[str, Any] = dict(zip(schema.names, schema.types, strict=True))
    image, label = types.get(_IMAGE), types.get(_LABEL)
    parts = {part.name: part.type for part in image} if image is not None and pyarrow.types.is_struct(image) else {}
    encoded = parts.get("bytes") in (pyarrow.binary(), pyarrow.large_binary())
    if not (encoded and label is not None and pyarrow.types.is_integer(label)):
        columns = ", ".join(f"{name} ({kind})" for name, kind in types.items())
        raise DataError(
            f"parquet: {path}: needs a column image of {{bytes, path}} and a column label of whole numbers; it has "
            f"{columns}; give shards with these columns"
        )


def _names(metadata: dict[bytes, bytes]) -> tuple[str, ...]:
    """The names of the classes in the metadata that Hugging Face writes; empty if there are none."""
    try:
        return tuple(map(str, json.loads(metadata[b"huggingface"])["info"]["features"][_LABEL]["names"]))
    except (KeyError, TypeError, ValueError):
        return ()


@frozen
class _Rows:
    """Reads rows. It opens files in the reading process and without threads, because that process may be a fork."""

    kept: dict[tuple[Path, int], Any] = field(factory=dict)

    def __call__(self, location: tuple[Path, int, int]) -> BytesIO:
        path, group, row = location
        if (path, group) not in self.kept:
            self.kept.clear()
            with _pyarrow().parquet.ParquetFile(path) as file:
                table = file.read_row_group(group, [f"{_IMAGE}.bytes"], use_threads=False)
            self.kept[path, group] = table.column(_IMAGE)
        return BytesIO(self.kept[path, group][row]["bytes"].as_py())
