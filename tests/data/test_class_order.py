"""The order of class folders: natural, stated or refused, and compared with what timm knows about the model."""

import json

import pytest
from support.data import RED, shade, shades, teacher, write
from timm.data import ImageNetInfo
from timm.data.readers.reader_image_folder import find_images_and_targets

import spdfq
from spdfq.data import ImageFolder, ImageList, Parquet
from spdfq.data.classes import natural_order
from spdfq.errors import DataError

THOUSAND = ImageNetInfo("imagenet-1k")
SYNSETS = THOUSAND.label_names()
WORDS = [text.partition(",")[0] for text in THOUSAND.label_descriptions()]
DIFFERENT = [f"{word} {index}" if WORDS.index(word) < index else word for index, word in enumerate(WORDS)]  # two cranes
TENCH, GOLDFISH = "n01440764 (tench)", "n01443537 (goldfish)"


@pytest.fixture
def folders(tmp_path):
    """``folders(names)`` is a dataset with a folder for each name and one image in the first of them."""

    def make(names, **options):
        write(tmp_path / "val", {name: {"1.png": RED} if index == 0 else {} for index, name in enumerate(names)})
        return ImageFolder(root=str(tmp_path / "val"), **options)

    return make


def numbers(first, last):
    return [str(number) for number in range(first, last + 1)]


def knowing(*names, **configured):
    """A teacher whose configuration names its classes, as those of models that timm saved do."""
    model = teacher(len(names))
    model.module.pretrained_cfg = {"label_names": list(names), **configured}
    return model


def told(dataset, model):
    """The warnings of a dataset whose classes are accepted."""
    dataset.check_classes(model)
    return dataset.class_warnings(model)


def refused(dataset, model):
    with pytest.raises(DataError, match=r"^evaluation\.dataset: ") as raised:
        dataset.check_classes(model)
    assert "\n" not in str(raised.value)
    return str(raised.value).removeprefix("evaluation.dataset: ")


# natural order


@pytest.mark.parametrize(
    ("names", "order"),
    [
        (["10", "9", "0", "1"], ["0", "1", "9", "10"]),
        (["c10", "C2", "c1"], ["c1", "C2", "c10"]),
        (["Cat", "ant", "bee"], ["ant", "bee", "Cat"]),
        (["a1", "A1", "a01"], ["A1", "a01", "a1"]),
        (["x2y10", "x2y9", "x1z", "2x"], ["2x", "x1z", "x2y9", "x2y10"]),
        (["\u00b2", "a", "\u0661", "1"], ["1", "\u0661", "a", "\u00b2"]),
    ],
)
def test_natural_order_counts_numbers_and_ignores_capital_letters(names, order):
    assert natural_order(names) == natural_order(names[::-1]) == order


@pytest.mark.parametrize(
    "names", [numbers(0, 11), ["Cat", "ant", "bee"], ["c1", "C2", "c10"], SYNSETS[:20], WORDS[:20]]
)
def test_folders_have_the_labels_that_timm_gives_them(tmp_path, names):
    write(tmp_path, {name: {"1.png": RED} for name in names})
    found, _ = find_images_and_targets(str(tmp_path))
    ours = {str(entry.location): entry.label for entry in ImageFolder(root=str(tmp_path)).entries()}
    assert ours == dict(found)


def test_twelve_numbers_are_labelled_by_their_value_with_a_warning_that_torchvision_would_not(folders):
    dataset = folders(numbers(0, 11))
    assert dataset.class_names == numbers(0, 11)
    assert told(dataset, teacher(12)) == [
        "evaluation.dataset: class 2 is 2 in natural order, and 10 in the order of characters, in which torchvision "
        "sorts; give class_order if the model was trained in that order, or to say that it was not"
    ]


@pytest.mark.parametrize("names", [numbers(0, 8), [f"{number:02}" for number in range(12)], ["ant", "bee"]])
def test_folders_in_one_order_alone_are_no_news(folders, names):
    assert told(folders(names), teacher(len(names))) == []


def test_spdfq_evaluate_warns_too(folders):
    model = teacher(12)
    with pytest.warns(
        UserWarning, match=r"^evaluation\.dataset: class 2 is 2 in natural order, and 10 in the order of"
    ):
        spdfq.evaluate(model.module, model, folders(numbers(0, 11)), progress=False)


# the model's own names


def test_folders_are_compared_with_the_names_in_the_models_configuration(folders):
    dataset = folders(["Ant", "honey_bee", "cat"])
    assert told(dataset, knowing("ant", "cat", "honey bee")) == []
    assert refused(dataset, knowing("cat", "ant", "honey bee")) == (
        "class 0 is Ant here and cat in Means; give class_order, the names in the order of the model's classes"
    )
    described = knowing("a1", "a2", "a3", label_descriptions={"a1": "ant", "a2": "cat, feline", "a3": "honey bee"})
    assert told(dataset, described) == []
    described = knowing("a1", "a2", "a3", label_descriptions=["cat, feline", "honey bee", "ant"])
    assert refused(dataset, described).startswith("class 0 is Ant here and a1 (cat) in Means; give class_order")
    (line,) = told(dataset, knowing("x", "y", "z"))
    assert line == (
        "evaluation.dataset: the classes are not named as those of the model, so their order cannot be compared with "
        "the model's: class 0 is Ant here and x there, class 1 is cat here and y there; if that is wrong, or to "
        "say that it is right, give class_order, the names in the order of the model's classes"
    )
    assert refused(dataset, knowing("ant", "cat", "dog")) == (
        "holds honey_bee (not in the model) and lacks dog of the model's classes; a class without images is an empty "
        "folder"
    )


# ImageNet


@pytest.mark.parametrize("suffix", ["", "_word"])
def test_the_synsets_are_in_the_order_of_the_model(folders, suffix):
    assert told(folders([f"{name}{suffix}" for name in SYNSETS]), teacher(1000)) == []


@pytest.mark.parametrize("names", [numbers(0, 999), numbers(1, 1000), [f"class{number}" for number in range(1000)]])
def test_names_that_timm_does_not_know_are_accepted_with_a_warning_what_they_stand_for(folders, names):
    (line,) = told(folders(names), teacher(1000))
    assert f"class 0 is {names[0]} here and {TENCH} there, class 1 is {names[1]} here and {GOLDFISH} there" in line
    assert ("numbers from 1 on are often ILSVRC's own, which are in another order" in line) == (names[0] == "1")


def test_words_are_refused_in_another_order_than_the_models(folders, tmp_path):
    names = [name.replace(" ", "_").replace("/", "-") for name in DIFFERENT]
    line = (
        f"class 0 is abacus here and {TENCH} in Means; give class_order, the names in the order of the model's classes"
    )
    assert refused(folders(names), teacher(1000)) == line
    (tmp_path / "order.txt").write_text("\n".join(names))
    stated = folders(names, class_order=str(tmp_path / "order.txt"))
    assert (stated.class_names, told(stated, teacher(1000))) == (names, [])


# the order that a user states


def test_a_stated_order_numbers_the_folders_also_those_without_images(tmp_path):
    write(tmp_path, {"ant": {"1.png": shade(10)}, "bee": {"1.png": shade(20)}, "cat": {"1.png": shade(30)}})
    (tmp_path / "order.txt").write_text("\ufeffcat\n\n dog \nbee\r\nant\n", encoding="utf-8")
    for order in (("cat", "dog", "bee", "ant"), str(tmp_path / "order.txt")):
        dataset = ImageFolder(root=str(tmp_path), class_order=order)
        ((images, labels, _),) = dataset.batches(teacher(4), 9)
        assert dict(zip(shades(images), labels.tolist(), strict=True)) == {10: 3, 20: 2, 30: 0}
        assert (dataset.classes, told(dataset, teacher(4))) == (4, [])
    assert dataset.fingerprint() != ImageFolder(root=str(tmp_path)).fingerprint()


def test_a_stated_order_is_believed_but_a_contradiction_is_told(folders):
    dataset = folders(numbers(0, 11), class_order=tuple(sorted(numbers(0, 11))))
    assert told(dataset, teacher(12)) == []
    assert told(dataset, knowing(*sorted(numbers(0, 11)))) == []
    assert told(dataset, knowing(*numbers(0, 11))) == [
        "evaluation.dataset: class_order: class 2 is 10 here and 2 in Means; leave class_order as it is only if the "
        "model's order is another"
    ]


@pytest.mark.parametrize(
    ("order", "message"),
    [
        (("a",), "lacks b and c; name"),
        ((), "is empty; give the names in the order of the model's classes"),
        (("a", "b", "c", "a"), "names a more than once; leave one of them"),
        ("nowhere.txt", "nowhere.txt: no such file; give an array of names, or a text file with one on each line"),
    ],
)
def test_an_order_that_is_none_is_one_line(folders, order, message):
    dataset = folders(["a", "b", "c"], class_order=order)
    for use in (len, lambda dataset: dataset.classes):
        with pytest.raises(DataError) as raised:
            use(dataset)
        assert str(raised.value).startswith(f"image_folder: class_order: {message.replace('b and c', 'b, c')}")


def test_an_order_in_a_binary_file_is_one_line(folders, tmp_path):
    (tmp_path / "order.pkl").write_bytes(b"\x80\xff\xfe")
    with pytest.raises(DataError, match=r"order\.pkl: not a text file; write one name on each line$"):
        len(folders(["a"], class_order=str(tmp_path / "order.pkl")))


# lists and shards


@pytest.fixture
def shard(tmp_path):
    """``shard(names)`` is a dataset with a row for each class, its shade ten times its number."""
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    from support.data import encoded

    def make(names, labels=None, **options):
        rows = [
            {"image": {"bytes": encoded(shade(10 * label)), "path": None}, "label": label}
            for label in labels or range(len(names))
        ]
        described = {"info": {"features": {"label": {"names": names, "_type": "ClassLabel"}}}}
        metadata = {"huggingface": json.dumps(described)} if names else {}
        pq.write_table(pa.Table.from_pylist(rows).replace_schema_metadata(metadata), tmp_path / "a.parquet")
        return Parquet(files=str(tmp_path / "a.parquet"), **options)

    return make


def test_the_names_in_shards_are_compared_and_numbered_as_stated(shard):
    assert told(shard(["dog", "cat", "ant"]), knowing("dog", "cat", "ant")) == []
    assert told(shard(numbers(0, 11)), teacher(12)) == [], "the shards themselves state the order"
    dataset = shard(["dog", "cat", "ant"])
    line = "class 0 is dog here and ant in Means; give class_order, the names in the order of the model's classes"
    assert refused(dataset, knowing("ant", "cat", "dog")) == line
    dataset = shard(["dog", "cat", "ant"], class_order=("ant", "cat", "dog", "bee"))
    ((images, labels, _),) = dataset.batches(teacher(4), 9)
    assert (shades(images), labels.tolist()) == ([0, 10, 20], [2, 1, 0])
    assert (dataset.classes, told(dataset, knowing("ant", "cat", "dog", "bee"))) == (4, [])
    with pytest.raises(DataError, match=r"^parquet: class_order: lacks ant, cat; name every class at its place$"):
        len(shard(["dog", "cat", "ant"], class_order=("dog",)))


def test_shards_of_imagenet_are_compared_by_their_words(shard):
    assert told(shard(THOUSAND.label_descriptions(), [3]), teacher(1000)) == []
    message = refused(shard(sorted(DIFFERENT), [3]), teacher(1000))
    assert message.startswith(f"class 0 is Afghan hound here and {TENCH} in Means; give class_order")


def test_shards_that_contradict_their_names_are_one_line(shard):
    with pytest.raises(
        DataError, match=r"a\.parquet: row 1 has label 3, but the file names 3 classes; fetch it again$"
    ):
        len(shard(["a", "b", "c"], [0, 3]))
    with pytest.raises(DataError, match=r"a\.parquet: has no names of classes; leave out class_order$"):
        len(shard([], [0, 3], class_order=("a", "b")))


def test_numbers_that_count_from_one_are_told(tmp_path):
    write(tmp_path, {"val": {f"{index}.png": RED for index in (1, 2, 3)}})
    (tmp_path / "list").write_text("1.png 1\n2.png 2\n3.png 3\n")
    dataset = ImageList(root=str(tmp_path / "val"), labels=str(tmp_path / "list"))
    assert refused(dataset, teacher(3)) == (
        "3.png has label 3, but the classes of Means are 0 to 2; labels are positions in the model's list of classes, "
        "counted from 0, and these seem to be counted from 1"
    )
    assert refused(dataset, teacher(2)).endswith("counted from 0")


def test_synsets_in_a_list_are_compared_with_the_names_of_the_model(tmp_path):
    write(tmp_path, {"val": {"1.png": RED}})
    (tmp_path / "list").write_text(f"1.png {SYNSETS[0]}\n")
    dataset = ImageList(root=str(tmp_path / "val"), labels=str(tmp_path / "list"))
    assert told(dataset, teacher(1000)) == []
    assert refused(dataset, knowing(*SYNSETS[::-1])) == (
        "class 0 is n01440764 here and n15075141 in Means; give numbers in the order of the model's classes"
    )
