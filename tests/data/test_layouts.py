"""The same images in every layout on disk: the same batches, subsets and damage."""

import io
import os
import tarfile

import pytest
import torch
from support.data import encoded, names, shade, shades, teacher, write

from spdfq.data import ImageFolder, ImageList, Parquet, WebDataset
from spdfq.errors import DataError
from spdfq.registry import datasets

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

LABELS = [0, 0, 0, 1, 1, 2, 2]
NUMBERS = [10, 20, 30, 40, 50, 60, 70]


def folder(root, items, **options):
    for index, (number, label) in enumerate(items):
        write(root, {f"c{label}": {f"{index}.png": None if number is None else shade(number)}})
    return ImageFolder(root=str(root), **options)


def flat(root, items, **options):
    write(root, {"val": {f"{index}.png": None if n is None else shade(n) for index, (n, _) in enumerate(items)}})
    (root / "val.txt").write_text("".join(f"{index}.png {label}\n" for index, (_, label) in enumerate(items)))
    return ImageList(root=str(root / "val"), labels=str(root / "val.txt"), **options)


def halves(items):
    return items[:4], items[4:]


def row(number, label):
    return {"image": {"bytes": encoded(None if number is None else shade(number)), "path": "x.png"}, "label": label}


def parquet(root, items, **options):
    for index, half in enumerate(halves(items)):
        table = pa.Table.from_pylist([row(*item) for item in half])
        pq.write_table(table, root / f"val-{index}.parquet", row_group_size=3)
    return Parquet(files=str(root / "val-*.parquet"), **options)


def add(tar, name, data):
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def web(root, items, **options):
    for index, half in enumerate(halves(items)):
        with tarfile.open(root / f"val-{index}.tar", "w") as tar:
            for place, (number, label) in enumerate(half):
                add(tar, f"part.{index}/{place}.cls", b"%d" % label)
                add(tar, f"part.{index}/{place}.png", encoded(None if number is None else shade(number)))
                add(tar, f"part.{index}/{place}.json", b"{}")
    return WebDataset(files=str(root / "val-*.tar"), **options)


NAMES = {folder: "c1/4.png", flat: "4.png", parquet: "val-1.parquet row 0", web: "val-1.tar/part.1/0.png"}
layouts = pytest.mark.parametrize("layout", NAMES)


def images(numbers=NUMBERS, labels=LABELS):
    return list(zip(numbers, labels, strict=True))


def read(dataset, batch=3, indices=None):
    """Numbers, labels and damaged of each batch."""
    batches = dataset.batches(teacher(3), batch, indices)
    return [(shades(found.images), found.labels.tolist(), names(found.damaged)) for found in batches]


@layouts
def test_images_come_in_order_with_their_labels(layout, tmp_path):
    dataset = layout(tmp_path, images())
    assert len(dataset) == 7
    assert read(dataset) == [
        ([10, 20, 30], [0, 0, 0], ()),
        ([40, 50, 60], [1, 1, 2], ()),
        ([70], [2], ()),
    ]
    dataset.check_classes(teacher(3))


@layouts
def test_chosen_images_come_in_the_order_asked_for(layout, tmp_path):
    assert read(layout(tmp_path, images()), 4, [6, 0, 5, 1, 3]) == [
        ([70, 10, 60, 20], [2, 0, 2, 0], ()),
        ([40], [1], ()),
    ]


@layouts
def test_a_limit_takes_the_same_subset_of_every_layout_in_order(layout, tmp_path):
    dataset = layout(tmp_path, images(), limit=4, subset_seed=3)
    chosen = dataset.chosen(7)
    assert len(chosen) == len(dataset) == 4
    assert read(dataset, 4) == [([NUMBERS[i] for i in chosen], [LABELS[i] for i in chosen], ())]
    assert read(dataset, 4, [2]) == [([NUMBERS[chosen[2]]], [LABELS[chosen[2]]], ())]


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@layouts
def test_a_worker_process_changes_nothing(layout, tmp_path):
    dataset = layout(tmp_path, images([10, 20, None, 40, 50, 60, 70]), workers=2)
    alone = layout(tmp_path, images([10, 20, None, 40, 50, 60, 70]))
    assert read(dataset) == read(alone)
    assert dataset.fingerprint() == alone.fingerprint()


@layouts
def test_a_damaged_image_is_left_out_and_named(layout, tmp_path):
    dataset = layout(tmp_path, images([10, 20, 30, 40, None, 60, 70]))
    assert len(dataset) == 7
    assert read(dataset) == [
        ([10, 20, 30], [0, 0, 0], ()),
        ([40, 60], [1, 2], (NAMES[layout],)),
        ([70], [2], ()),
    ]


@layouts
def test_a_batch_of_damaged_images_alone_is_empty(layout, tmp_path):
    dataset = layout(tmp_path, images([10, 20, 30, 40, None, 60, 70]))
    ((found, labels, damaged),) = dataset.batches(teacher(3), 1, [4])
    assert (tuple(found.shape), tuple(labels.shape), len(damaged)) == ((0, 3, 8, 8), (0,), 1)


@pytest.mark.parametrize("workers", [0, 1])
@layouts
def test_a_damaged_image_is_refused_in_one_line_where_it_is_asked_for(layout, tmp_path, workers):
    dataset = layout(tmp_path, images([10, 20, 30, 40, None, 60, 70]), damaged="refuse", workers=workers)
    with pytest.raises(DataError) as raised:
        read(dataset)
    assert "\n" not in str(raised.value)
    assert str(raised.value).startswith(f"{datasets.name_of(type(dataset))}: {NAMES[layout]}: not a readable image (")
    assert str(raised.value).endswith("replace it, or set damaged = 'skip'")


@layouts
def test_the_fingerprint_follows_labels_pixels_and_subset(layout, tmp_path):
    def fingerprint(name, *items, **options):
        (tmp_path / name).mkdir()
        dataset = layout(tmp_path / name, images(*items), **options)
        for path in tmp_path.rglob("*.*"):
            os.utime(path, (1, 1))
        return dataset.fingerprint()

    same = [fingerprint("a"), fingerprint("b", workers=1), fingerprint("c", damaged="refuse")]
    others = [
        fingerprint("d", NUMBERS, [0, 0, 0, 1, 1, 1, 2]),
        fingerprint("e", [10, 20, 30, 40, None, 60, 70]),
        fingerprint("f", limit=4),
    ]
    assert len(set(same)) == 1
    assert len({*same, *others}) == 4


@layouts
def test_the_fingerprint_follows_the_time_of_a_replaced_file(layout, tmp_path):
    dataset = layout(tmp_path, images())
    before = dataset.fingerprint()
    location = dataset.entries()[-1].location
    os.utime(location[0] if isinstance(location, tuple) else location, (1, 1))
    assert dataset.fingerprint() != before


@layouts
def test_a_model_of_other_classes_is_refused(layout, tmp_path):
    dataset = layout(tmp_path, images())
    with pytest.raises(DataError, match=r"^evaluation\.dataset: .*labels are positions in the"):
        dataset.check_classes(teacher(2))


# what only shards can get wrong


@pytest.mark.parametrize("kind", [Parquet, WebDataset])
def test_a_pattern_that_matches_nothing_is_one_clear_line(kind, tmp_path):
    with pytest.raises(DataError, match=r"nothing-\*: no such file; give files = "):
        len(kind(files=str(tmp_path / "nothing-*")))


def test_without_pyarrow_the_extra_is_named(tmp_path, monkeypatch):
    dataset = parquet(tmp_path, images())
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(DataError) as raised:
        len(dataset)
    message = "parquet: needs pyarrow, which is not installed: pip install pyarrow"
    assert str(raised.value) == message


def test_class_names_of_hugging_face_say_how_many_classes_there_are(tmp_path):
    names = '{"info": {"features": {"label": {"names": ["a", "b", "c", "d"], "_type": "ClassLabel"}}}}'
    table = pa.Table.from_pylist([row(10, 0)]).replace_schema_metadata({"huggingface": names})
    pq.write_table(table, tmp_path / "a.parquet")
    dataset = Parquet(files=str(tmp_path / "a.parquet"))
    assert dataset.classes == 4
    with pytest.raises(DataError, match="has 4 classes, Means knows 5"):
        dataset.check_classes(teacher(5))
    pq.write_table(pa.Table.from_pylist([row(10, 0)]), tmp_path / "b.parquet")
    with pytest.raises(DataError, match="the shards belong to several datasets"):
        Parquet(files=str(tmp_path / "*.parquet")).check_classes(teacher(4))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"img": {"bytes": b"", "path": ""}, "label": 1}], r"needs a column image .* it has img \(struct"),
        ([{"image": b"", "label": 1}], r"it has image \(binary\), label \(int64\)"),
        ([{"image": {"path": "x.png"}, "label": 1}], "needs a column image of {bytes, path}"),
        ([{"image": {"bytes": b"", "path": ""}, "label": "cat"}], "a column label of whole numbers"),
        ([row(10, -1)], "has rows without a label, as test splits do"),
        ([row(10, 1), row(10, None)], "has rows without a label"),
    ],
)
def test_parquet_of_another_layout_is_one_clear_line(tmp_path, rows, message):
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=rf"^parquet: .*a\.parquet: .*{message}"):
        len(Parquet(files=str(tmp_path / "a.parquet")))


def test_parquet_without_rows_or_with_a_column_twice_is_one_clear_line(tmp_path):
    table = pa.Table.from_pylist([row(10, 1)])
    pq.write_table(table.slice(0, 0), tmp_path / "none.parquet")
    pq.write_table(table.append_column("label", table.column("label")), tmp_path / "twice.parquet")
    for name, message in (("none", "holds no rows"), ("twice", "has 2 columns label; leave one")):
        with pytest.raises(DataError, match=rf"^parquet: .*{name}\.parquet: {message}"):
            len(Parquet(files=str(tmp_path / f"{name}.parquet")))


def test_an_image_without_bytes_is_a_damaged_one(tmp_path):
    rows = [row(10, 0), {"image": {"bytes": None, "path": "elsewhere.png"}, "label": 1}, {"image": None, "label": 1}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    found = read(Parquet(files=str(tmp_path / "a.parquet")))
    assert found == [([10], [0], ("a.parquet row 1", "a.parquet row 2"))]


@pytest.mark.parametrize(("layout", "name"), [(parquet, "val-1.parquet"), (web, "val-1.tar")])
def test_a_truncated_shard_is_one_clear_line(layout, name, tmp_path):
    dataset = layout(tmp_path, images())
    assert len(dataset) == 7
    data = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(data[:700])
    with pytest.raises(DataError, match=rf"{name}: damaged, or no.* fetch it again"):
        len(dataset)


@pytest.mark.parametrize(
    "damage",
    [
        lambda data, at: data[:at] + bytes(len(data) - at),
        lambda data, at: data[:at] + bytes(512) + data[at + 512 :],
        lambda data, at: data[: at + 5] + b"?" + data[at + 6 :],
        lambda data, at: data[:at],
        lambda data, at: data[: at + 300],
        lambda data, at: data[:-10240],
    ],
    ids=["zeros from a header on", "a header of zeros", "a flipped byte", "cut before", "cut inside", "no end"],
)
def test_a_tar_file_that_ends_between_two_images_is_one_clear_line(tmp_path, damage):
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as tar:
        for index in range(14):
            add(tar, f"{index}.png", encoded(shade(index)))
            add(tar, f"{index}.cls", b"1")
    data = path.read_bytes()
    assert (len(data), len(WebDataset(files=str(path)))) == (30720, 14)
    path.write_bytes(damage(data, 8192))
    with pytest.raises(DataError, match=r"^webdataset: .*a\.tar: damaged, or not .* fetch it again$"):
        len(WebDataset(files=str(path)))


@pytest.mark.parametrize("record", [512, 10240, 32768, 2**20])
def test_a_whole_tar_file_is_taken_whatever_its_record_size(tmp_path, monkeypatch, record):
    monkeypatch.setattr(tarfile, "RECORDSIZE", record)
    dataset = web(tmp_path, images())
    monkeypatch.undo()
    assert (tmp_path / "val-0.tar").stat().st_size % record == 0
    assert len(dataset) == 7


@pytest.mark.parametrize("label", [2**31, 2**63])
def test_a_class_beyond_any_models_is_one_clear_line(tmp_path, label):
    table = pa.table({"image": [row(1, 0)["image"]] * 2, "label": pa.array([0, label], pa.uint64())})
    pq.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(DataError, match=rf"^parquet: .*a\.parquet: row 1 has label {label}, larger than any model's"):
        len(Parquet(files=str(tmp_path / "a.parquet")))


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"a.png": b"", "b.png": b"", "b.cls": b"1"}, "a lacks an image or a class"),
        ({"a.png": b"", "a.cls": b"1", "c.cls": b"1"}, "c lacks an image or a class"),
        ({"notes.txt": b"x", "a.cls": b"1"}, "holds no images; expected KEY.jpg and KEY.cls for each"),
        ({"a.png": b"", "a.jpg": b"", "a.cls": b"1"}, r"a has several images, \.jpg and another"),
        ({"a.png": b"", "a.cls": b"2147483648"}, "a.cls holds 2147483648, which is larger than any model's"),
        ({"a.png": b"", "a.cls": b"9" * 5000}, "a.cls holds 99999999999999999999, which is larger than any model's"),
        ({"a.png": b"", "a.cls": b"n01440764"}, "a.cls holds 'n01440764', which is not the number of a class"),
    ],
)
def test_a_tar_file_of_another_layout_is_one_clear_line(tmp_path, members, message):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, data in members.items():
            add(tar, name, data)
    with pytest.raises(DataError, match=rf"^webdataset: .*a\.tar: {message}"):
        len(WebDataset(files=str(tmp_path / "a.tar")))


def test_a_row_group_is_read_once_for_the_rows_that_follow_each_other(tmp_path, monkeypatch):
    dataset = parquet(tmp_path, images())
    opened = []
    file = pq.ParquetFile
    monkeypatch.setattr(pq, "ParquetFile", lambda path: opened.append(path.name) or file(path))
    assert torch.cat([batch.labels for batch in dataset.batches(teacher(3), 1)]).tolist() == LABELS
    # two to describe the shards; groups of 3 and 1 rows, then one of 3
    assert opened == ["val-0.parquet", "val-1.parquet", *["val-0.parquet"] * 2, "val-1.parquet"]
