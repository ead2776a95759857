"""Classes of ImageNet: files of labels in common formats, and folders named by synsets."""

import pytest
from attrs import evolve
from support.data import shade, shades, teacher, write

from spdfq.data import ImageFolder, ImageList
from spdfq.data.imagenet import synsets
from spdfq.data.labels import read_labels
from spdfq.errors import DataError

NAMES = [f"ILSVRC2012_val_{number:08d}" for number in (1, 2, 3)]
TENCH, GOLDFISH, PAPER = "n01440764", "n01443537", "n15075141"  # the first two classes, and the last: toilet tissue


@pytest.fixture
def listed(tmp_path):
    """``listed(text)`` is the dataset of three images in one folder and a file of labels."""
    write(tmp_path, {"val": {f"{name}.JPEG": shade(10 * index) for index, name in enumerate(NAMES, 1)}})

    def make(text, **options):
        (tmp_path / "labels").write_bytes(text if isinstance(text, bytes) else text.encode())
        return ImageList(root=str(tmp_path / "val"), labels=str(tmp_path / "labels"), **options)

    return make


def labels_of(dataset):
    (batch,) = dataset.batches(teacher(1000), 10)
    return list(zip(shades(batch.images), batch.labels.tolist(), strict=True))


def test_the_classes_are_the_thousand_synsets_in_alphabetical_order():
    assert list(synsets()) == sorted(synsets())
    assert list(synsets().values()) == list(range(1000))
    assert (synsets()[TENCH], synsets()[GOLDFISH], synsets()[PAPER]) == (0, 1, 999)


# files of labels


def test_numbers_are_positions_in_the_models_classes(listed):
    dataset = listed(f"{NAMES[1]}.JPEG 490\n{NAMES[0]}.JPEG\t65\n\n{NAMES[2]}.JPEG 0\n")
    assert labels_of(dataset) == [(20, 490), (10, 65), (30, 0)]
    assert dataset.classes is None
    dataset.check_classes(teacher(491))
    with pytest.raises(
        DataError, match=r"^evaluation.dataset: .*00000002.JPEG has label 490, but the classes of Means are 0 to 489"
    ):
        dataset.check_classes(teacher(490))
    subset = evolve(dataset, limit=1)
    assert [entry.label for entry in subset.used()] == [0]
    with pytest.raises(DataError, match=r"00000002\.JPEG has label 490"):  # in the list, if not in the subset
        subset.check_classes(teacher(490))


def test_synsets_are_looked_up_among_imagenets_classes(listed):
    dataset = listed(f"{NAMES[0]}.JPEG {PAPER}\r\n{NAMES[1]}.JPEG {TENCH}\r\n")
    assert labels_of(dataset) == [(10, 999), (20, 0)]
    assert dataset.classes == 1000
    dataset.check_classes(teacher(1000))
    with pytest.raises(DataError, match="has 1000 classes, Means knows 999"):
        dataset.check_classes(teacher(999))


def test_the_solution_of_kaggle_names_images_without_suffix_and_boxes_after_the_synset(listed):
    header = "\ufeffImageId,PredictionString\n"
    boxes = f"{GOLDFISH} 85 1 499 272 {GOLDFISH} 10 20 30 40 "
    dataset = listed(f"{header}{NAMES[2]},{boxes}\n{NAMES[0]},{TENCH} 0 0 9 9 \n")
    assert labels_of(dataset) == [(30, 1), (10, 0)]
    assert dataset.classes == 1000


def test_names_may_have_folders_and_spaces(tmp_path):
    write(tmp_path, {"a b": {"c d.png": shade(10)}})
    (tmp_path / "list").write_text("a b/c d.png 7\n")
    assert read_labels(tmp_path / "list").items == (("a b/c d.png", 7),)
    assert labels_of(ImageList(root=str(tmp_path), labels=str(tmp_path / "list"))) == [(10, 7)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "490\n361\n",
            r"line 1: '490' names no image \(the ground truth of ILSVRC's development kit .* order\)",
        ),
        (
            "a.png 1\na.png,1\n",
            "line 2: 'a.png,1' is not a name and a class; expected 'name class' on each line",
        ),
        (
            "a.png 1\nb.png cat\n",
            "line 2: 'cat' is not a number; the classes of a file must be numbers from 0 on",
        ),
        (f"a.png {TENCH}\nb.png 3\n", "line 2: '3' is not a synset; the classes of a file must be numbers from 0 on"),
        ("a.png n00000001\n", "line 1: 'n00000001' is not a class of ImageNet-1k"),
        ("a.png -1\n", "line 1: '-1' is not a synset"),
        ("a.png 1\nb.png 1\na.png 2\n", "line 3: a.png is listed twice"),
        ("ImageId,PredictionString\nx\n", "line 2: 'x' is not an image id and a prediction string"),
        (
            f'ImageId,PredictionString\n"a,{TENCH} 1 2\nb,{TENCH} 1 2\n',
            "line 2: '\"a,n01440764 1 2' is not a line of a",
        ),
        ("ImageId,PredictionString\na\0,n01440764 1\n", "line 2: holds a zero byte, so it is not text; expected"),
        ("a.png 1\nb.png 2147483648\n", "line 2: the class 2147483648 is larger than any model's; the classes of a"),
        (f"a.png {'9' * 5000}\n", "line 1: the class 99999999999999999999 is larger than any model's"),
        ("ImageId,PredictionString\nx, \n", "line 2: 'x, ' is not an image id and a prediction string"),
        ("\n \n", "is empty; expected"),
        (b"MATLAB 5.0\xff\x00", "not a text file; expected"),
    ],
)
def test_any_other_file_is_refused_with_its_first_wrong_line(listed, text, message):
    dataset = listed(text)
    with pytest.raises(DataError, match=rf"^image_list: .*labels.*{message}") as raised:
        len(dataset)
    assert "\n" not in str(raised.value)


def test_missing_files_are_named(listed, tmp_path):
    dataset = listed(f"{NAMES[0]}.JPEG 1\nx.JPEG 2\n")
    with pytest.raises(DataError, match=r"^image_list: 1 of 2 images are missing, the first is x\.JPEG; check root"):
        dataset.fingerprint()
    (tmp_path / "labels").unlink()
    with pytest.raises(DataError, match="labels: no such file; give labels = "):
        len(dataset)
    with pytest.raises(DataError, match="nowhere: no such folder; give root = 'path/to/val'"):
        len(ImageList(root=str(tmp_path / "nowhere"), labels=str(tmp_path / "labels")))


# folders that are synsets


@pytest.fixture
def folders(tmp_path):
    """``folders(names)`` is a dataset with a folder for each name and one image in the first of them."""

    def make(names):
        write(tmp_path, {name: {"1.png": shade(10)} if index == 0 else {} for index, name in enumerate(names)})
        return ImageFolder(root=str(tmp_path))

    return make


def test_the_thousand_synsets_are_imagenets_classes_in_the_order_of_the_model(folders):
    dataset = folders(synsets())
    dataset.check_classes(teacher(1000))
    assert dataset.class_names == list(synsets())


def test_missing_and_strange_folders_among_them_are_named(folders, tmp_path):
    dataset = folders([name for name in synsets() if name != GOLDFISH])
    with pytest.raises(
        DataError, match=f"lacks {GOLDFISH} of ImageNet-1k's classes; a class without images is an empty"
    ):
        dataset.check_classes(teacher(1000))
    (tmp_path / "thumbnails").mkdir()
    with pytest.raises(
        DataError,
        match=f"holds thumbnails \\(not in ImageNet-1k\\) and lacks {GOLDFISH} of",
    ):
        dataset.check_classes(teacher(1000))
    (tmp_path / GOLDFISH).mkdir()
    with pytest.raises(DataError, match="holds thumbnails \\(not in ImageNet-1k\\);"):
        dataset.check_classes(teacher(1000))
    with pytest.raises(DataError, match="has 1001 classes, Means knows 10"):
        dataset.check_classes(teacher(10))


def test_ten_of_the_synsets_are_a_dataset_of_their_own_for_a_model_of_ten_classes(folders):
    dataset = folders(list(synsets())[::100])
    dataset.check_classes(teacher(10))
    with pytest.raises(DataError, match=r"lacks n01443537, n01484850, n01491361, n01494475, n01496331 and 985 more of"):
        dataset.check_classes(teacher(1000))


def test_folders_with_other_names_are_accepted(folders):
    folders([f"class{number}" for number in range(1000)]).check_classes(teacher(1000))
