"""Damaged files of a run folder and of the store, and a kill while a run folder is written."""

import os
import shutil

import pytest
from support.runs import again

from spdfq.errors import DataError
from spdfq.report.exports import known_exports
from spdfq.runs.finished import finished_record, run_record
from spdfq.runs.pipeline import run


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b'{"model": ', "damaged (JSONDecodeError: "),
        (b"\xff", "damaged (UnicodeDecodeError: "),
        (b"[" * 100_000, "damaged (RecursionError: "),
        (b"[]", "damaged (expected an object, got [])"),
        (b"{}", "damaged (it is empty)"),
        (b'{"model": 3}', "damaged (model: expected an object, got 3)"),
    ],
)
def test_a_damaged_record_is_one_line_with_its_name(tmp_path, content, said):
    (tmp_path / "run.json").write_bytes(content)
    with pytest.raises(DataError) as raised:
        finished_record(tmp_path)
    assert str(raised.value) == f"{tmp_path / 'run.json'}: {str(raised.value).partition(': ')[2]}"
    assert str(raised.value).partition(": ")[2].startswith(said)
    assert str(raised.value).endswith("; run the recipe again with --fresh")
    assert "\n" not in str(raised.value)


def test_without_a_record_the_remedy_is_the_callers(tmp_path):
    with pytest.raises(DataError, match=r"has no run.json; measure a finished run"):
        finished_record(tmp_path, "measure a finished run")
    assert run_record(tmp_path) == {}


@pytest.mark.parametrize("content", ["{", "[]", '{"model.onnx": []}'])
def test_a_damaged_list_of_exports_is_one_line_with_its_name(tmp_path, content):
    (tmp_path / "exports.json").write_text(content)
    with pytest.raises(DataError, match=r"exports.json: damaged \(.*\); remove it and export again"):
        known_exports(tmp_path)


@pytest.mark.parametrize(
    ("stage", "name", "content"),
    [
        ("quantize", "sites.json", None),
        ("quantize", "sites.json", b"{"),
        ("quantize", "sites.json", b'{"multiplications": {}}'),
        ("evaluate", "metrics.json", b"[]"),
        ("evaluate", "metrics.json", b"\xff"),
    ],
)
def test_a_damaged_file_of_the_store_is_one_clear_error(finished, recipe, tmp_path, stage, name, content):
    store = shutil.copytree(finished.folder.parent / ".store", tmp_path / ".store")
    file = store / f"{stage}-{finished.stages[stage]['key']}" / name
    file.unlink() if content is None else file.write_bytes(content)
    with pytest.raises(DataError, match=rf"{stage}-.*this finished stage is damaged \(.*{name}: .*use --fresh"):
        run(recipe, out=tmp_path / "run", store=store)


@pytest.mark.parametrize("content", [b"{", b"[3]", b'[{"class": "cat"}]'])
def test_damaged_classes_in_the_store_are_one_line_with_their_name(finished, recipe, tmp_path, content):
    store = shutil.copytree(finished.folder.parent / ".store", tmp_path / ".store")
    (store / f"quantize-{finished.stages['quantize']['key']}" / "image_classes.json").write_bytes(content)
    with pytest.raises(DataError, match=r"run/image_classes.json: damaged \(.*\); run the recipe again with --fresh"):
        run(recipe, out=tmp_path / "run", store=store)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "sites.json", "site_noise.json"])
def test_a_kill_in_the_middle_of_a_copy_leaves_no_part_of_it(finished, recipe, monkeypatch, name):
    folder = again(finished, recipe, f"killed-{name}").folder
    (file,) = folder.rglob(name)
    before = file.read_bytes()
    written = []

    def replace(source, target):
        if target.name == name:
            written.append(source.read_bytes())
            raise KeyboardInterrupt  # the copy is complete beside its place, and not yet there
        os.rename(source, target)

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(KeyboardInterrupt):
        again(finished, recipe, f"killed-{name}")
    assert written == [before]
    assert not file.exists() or file.read_bytes() == before
    assert not list(folder.rglob("*.tmp"))
