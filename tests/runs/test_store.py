"""Finished stages are kept; begun ones go on; half of anything is never believed."""

import json
import os
import subprocess
import sys

import pytest
import torch

from spdfq.errors import DataError, SpdfqError
from spdfq.quantized import QuantizedModel, save_quantized
from spdfq.report import write_sheet
from spdfq.runs.store import STATE, Store, lock_folder, store_beside
from spdfq.runtime.files import read_tensors, replace_file, write_tensors, write_text


class Stage:
    """Writes a number, one higher each time it is made, and leaves a state behind where it fails."""

    def __init__(self):
        self.made, self.found, self.fail = 0, [], False

    def make(self, folder):
        state = folder / STATE / "progress"
        self.found.append(state.read_text() if state.exists() else None)
        if self.fail:
            state.write_text("half")
            raise KeyboardInterrupt
        self.made += 1
        write_text(folder / "value.json", json.dumps(self.made))

    def load(self, folder):
        return json.loads((folder / "value.json").read_text())


@pytest.fixture
def stage():
    return Stage()


def test_a_finished_stage_is_made_once(tmp_path, stage):
    first, second = Store(tmp_path), Store(tmp_path)
    assert [store.stage("images", "abc", stage.make, stage.load) for store in (first, second)] == [1, 1]
    assert (first.records["images"].reused, second.records["images"].reused) == (False, True)
    assert second.records["images"].key == "abc"
    assert second.records["images"].seconds >= 0
    assert not (tmp_path / "images-abc" / STATE).exists()


def test_another_key_or_name_is_another_stage(tmp_path, stage):
    store = Store(tmp_path)
    assert [store.stage(name, key, stage.make, stage.load) for name, key in (("a", "x"), ("a", "y"), ("b", "x"))] == [
        1,
        2,
        3,
    ]


def test_fresh_makes_a_finished_stage_anew_and_forgets_a_begun_one(tmp_path, stage):
    store = Store(tmp_path)
    store.stage("images", "abc", stage.make, stage.load)
    store.fresh = True
    assert store.stage("images", "abc", stage.make, stage.load) == 2
    assert not store.records["images"].reused
    begin(tmp_path, stage)
    store.stage("images", "begun", stage.make, stage.load)
    assert stage.found[-1] is None


def begin(root, stage):
    stage.fail = True
    with pytest.raises(KeyboardInterrupt):
        Store(root).stage("images", "begun", stage.make, stage.load)
    stage.fail = False


def test_a_begun_stage_finds_its_state_again(tmp_path, stage):
    begin(tmp_path, stage)
    store = Store(tmp_path)
    assert store.stage("images", "begun", stage.make, stage.load) == 1
    assert stage.found == [None, "half"]
    assert not store.records["images"].reused
    assert not (tmp_path / "images-begun" / STATE).exists()


@pytest.mark.parametrize("damage", ["", "{", None])
def test_a_finished_stage_that_is_damaged_is_one_clear_error(tmp_path, stage, damage):
    Store(tmp_path).stage("images", "abc", stage.make, stage.load)
    value = tmp_path / "images-abc" / "value.json"
    value.unlink() if damage is None else value.write_text(damage)
    with pytest.raises(DataError, match=r"images-abc: this finished stage is damaged .*delete it, or use --fresh"):
        Store(tmp_path).stage("images", "abc", stage.make, stage.load)
    assert Store(tmp_path, fresh=True).stage("images", "abc", stage.make, stage.load) == 2


def test_the_store_lies_beside_the_run_folder_or_where_the_environment_says(tmp_path, monkeypatch):
    monkeypatch.delenv("SPDFQ_STORE", raising=False)
    assert store_beside(tmp_path / "runs/quickstart").root == tmp_path / "runs/.store"
    monkeypatch.setenv("SPDFQ_STORE", str(tmp_path / "elsewhere"))
    assert store_beside(tmp_path / "runs/quickstart").root == tmp_path / "elsewhere"


def test_state_of_work_that_is_not_kept_survives_what_kills_it_alone(tmp_path):
    store, seen = Store(tmp_path), []

    def work(error=None):
        with store.unfinished("again", "abc") as folder:
            seen.append([path.name for path in folder.iterdir()])
            (folder / "half").touch()
            if error:
                raise error

    with pytest.raises(KeyboardInterrupt):
        work(KeyboardInterrupt())
    with pytest.raises(SpdfqError):
        work(SpdfqError("mend it"))
    work()
    work()
    assert seen == [[], ["half"], [], []]
    assert not (tmp_path / "again-abc").exists()


HOLD = """
import sys
from filelock import FileLock
with FileLock(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_run_folder_that_another_process_holds_is_refused(tmp_path):
    folder = tmp_path / "run"
    lock_folder(folder).release()
    command = [sys.executable, "-c", HOLD, str(folder / ".lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(
            SpdfqError, match="run: another process is writing this run; wait for it, or choose another"
        ):
            lock_folder(folder)
        other.stdin.close()
        other.wait()
    lock_folder(folder).release()


# files


def test_a_file_is_the_old_one_or_the_new_one(tmp_path):
    path = tmp_path / "value.json"
    write_text(path, "old")

    def fail(temporary):
        temporary.write_text("half")
        raise OSError("disk full")

    with pytest.raises(DataError, match=r"value.json: cannot be written \(disk full\); make room there"):
        replace_file(path, fail)
    assert {found.name: found.read_text() for found in tmp_path.iterdir()} == {"value.json": "old"}
    write_text(path, "new: \N{GREEK SMALL LETTER ALPHA}")
    assert {found.name: found.read_bytes() for found in tmp_path.iterdir()} == {"value.json": b"new: \xce\xb1"}


def test_a_file_is_flushed_before_it_takes_the_place_of_the_old_one(tmp_path, monkeypatch):
    path, flushed = tmp_path / "value.json", []
    write_text(path, "old")
    monkeypatch.setattr(os, "fsync", lambda handle: flushed.append((os.fstat(handle).st_ino, path.read_text())))
    write_text(path, "new")
    assert flushed == [(path.stat().st_ino, "old")]
    assert path.read_text() == "new"


def test_tensors_come_back_with_their_metadata(tmp_path):
    given = {"a": torch.arange(6.0).reshape(2, 3).T, "b": torch.ones(2, dtype=torch.uint8, requires_grad=False)}
    write_tensors(tmp_path / "x.safetensors", given, {"iteration": "3"})
    found, metadata = read_tensors(tmp_path / "x.safetensors", "delete it")
    assert all(torch.equal(found[name], value) for name, value in given.items())
    assert metadata == {"iteration": "3"}
    with pytest.raises(DataError, match=r"y.safetensors: damaged or missing .*; delete it"):
        read_tensors(tmp_path / "y.safetensors", "delete it")


def test_the_same_tensors_and_metadata_are_the_same_bytes(tmp_path):
    metadata = {f"key {number}": f'caf\u00e9 "{number}"\n\\/\x1f' for number in range(20)}
    given = {name: torch.arange(3).to(dtype) for name, dtype in (("b", torch.int64), ("a", torch.float16))}
    written = []
    for name in ("first", "second"):
        write_tensors(tmp_path / name, given, metadata)
        written.append((tmp_path / name).read_bytes())
    assert written[0] == written[1]
    found, kept = read_tensors(tmp_path / "first", "delete it")
    assert kept == metadata
    assert all(torch.equal(found[name], value) for name, value in given.items())
    write_tensors(tmp_path / "none", given)
    assert read_tensors(tmp_path / "none", "delete it")[1] == {}


# places that cannot be written

EMPTY = QuantizedModel(torch.nn.Identity(), {}, {}, {})
ANOTHER = "make room there, make it writable, or choose another folder"


@pytest.mark.parametrize(
    ("write", "place", "remedy"),
    [
        (lock_folder, "file/run", "make it writable, or choose another --out"),
        (lambda path: write_text(path, "text"), "file/run.json", ANOTHER),
        (lambda path: write_tensors(path, {"a": torch.ones(1)}), "file/a.safetensors", ANOTHER),
        (lambda path: write_sheet(path, [("run", torch.zeros(1, 3, 8, 8))]), "folder.png", ANOTHER),
        (lambda path: save_quantized(EMPTY, path, None), "file/run", ANOTHER),
        (
            lambda path: Store(path).stage("images", "abc", None, None),
            "file/store",
            "make it writable, or name another folder in SPDFQ_STORE",
        ),
        (
            lambda path: Store(path).unfinished("again", "abc").__enter__(),
            "file/store",
            "make it writable, or name another folder in SPDFQ_STORE",
        ),
    ],
    ids=["run folder", "text", "tensors", "sheet", "checkpoint", "stage", "unfinished stage"],
)
def test_a_place_that_cannot_be_written_is_one_line_with_the_place_and_the_remedy(tmp_path, write, place, remedy):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(DataError) as raised:
        write(tmp_path / place)
    reason = str(raised.value).removeprefix(f"{tmp_path / place}: cannot be written (").removesuffix(f"); {remedy}")
    assert reason.startswith(("Not a directory", "Is a directory", "Error while serializing: I/O error: Not a direct"))
    assert "\n" not in str(raised.value)


def test_a_folder_without_the_right_to_write_is_refused_by_name(tmp_path, monkeypatch):
    def refuse(path, flags, *rest, **options):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "open", refuse)  # tests may run as root, who can write everywhere
    with pytest.raises(DataError, match=r"run: cannot be written \(Permission denied\); make it writable, or choose"):
        lock_folder(tmp_path / "run")
    monkeypatch.undo()
    (tmp_path / "a").write_text("")
    with pytest.raises(DataError, match=r"/a: cannot be written \(it is a file\); make it writable, or choose another"):
        lock_folder(tmp_path / "a")


def test_two_processes_may_write_one_file_at_once(tmp_path, monkeypatch):
    path = tmp_path / "bench.json"

    def write(temporary):
        temporary.write_text("first")
        with monkeypatch.context() as patch:
            patch.setattr("os.getpid", lambda: -1)
            write_text(path, "second")

    replace_file(path, write)
    assert path.read_text() == "first"
    assert list(tmp_path.iterdir()) == [path]
