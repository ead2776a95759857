"""What tests share: no network, one thread and no store of one's own, so that results do not depend on the machine."""

import gc
import os
import shutil

os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported
os.environ["OMP_NUM_THREADS"] = "1"  # also of the processes that tests start, beside which other tests run
os.environ.pop("SPDFQ_STORE", None)

import pytest
from attrs import evolve

os.fsync = lambda descriptor: None  # no test's files must survive a power failure; a flush takes milliseconds
gc.disable()  # what is imported and collected lives until the end; looking for garbage in it takes seconds


def pytest_collection_finish():
    import torch  # only where tests run: the process that starts the others does without, and starts them sooner

    torch.set_num_threads(1)
    gc.freeze()
    gc.set_threshold(10_000, 20, 20)  # by default an eighth of the time goes into looking
    gc.enable()


# a run for all tests that look at one; what makes it is imported only then, so that other tests start sooner


@pytest.fixture(scope="session")
def photos(tmp_path_factory):
    """A test image of each class, in folders."""
    from support.runs import save_photos

    return save_photos(tmp_path_factory.mktemp("photos"))


@pytest.fixture(scope="session")
def recipe(photos):
    """The recipe of the finished run."""
    from support.runs import recipe_on

    return recipe_on(photos)


@pytest.fixture(scope="session")
def first_run(recipe, tmp_path_factory):
    """A run in its folder beside its store, to be copied and not touched."""
    from spdfq.runs.pipeline import run

    return run(recipe, out=tmp_path_factory.mktemp("project") / "runs/first")


@pytest.fixture(scope="session")
def exported_run(first_run, tmp_path_factory):
    """A copy of the folder of that run with a checked ONNX file of integers, to be copied and not touched."""
    import support.exports  # noqa: F401  exporting is faster then

    from spdfq.runs.exporting import export_run

    folder = shutil.copytree(first_run.folder, tmp_path_factory.mktemp("exported") / "vit")
    export_run(folder, softmax="uniform8", check=True)
    return folder


@pytest.fixture(scope="module")
def finished(first_run, tmp_path_factory):
    """A finished run; its store is shared by the tests of a file, and by no others."""
    runs = shutil.copytree(first_run.folder.parent, tmp_path_factory.mktemp("project") / "runs")
    return evolve(first_run, folder=runs / first_run.folder.name)
