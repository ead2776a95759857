"""The diagnosis of a finished run: its files, its place in the report, and its fragment in a recipe."""

import json

import pytest
from support.commands import spdfq

from spdfq.errors import DataError, SpdfqError
from spdfq.runs import diagnosing
from spdfq.runs.diagnosing import diagnose_run
from spdfq.runs.pipeline import run
from spdfq.runtime.ranks import Ranks


@pytest.fixture(scope="module")
def diagnosed(finished):
    """What the command printed as JSON."""
    done = spdfq("doctor", finished.folder, "--heldout", 5, "--json", "--quiet")
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


def bits_of(folder):
    """The bits of each site of a run."""
    return {site["name"]: site["bits"] for site in json.loads((folder / "sites.json").read_text())["quantized"]}


def test_the_files_hold_what_the_command_prints(finished, diagnosed):
    stored = json.loads((finished.folder / "diagnosis.json").read_text())
    assert diagnosed == {"folder": str(finished.folder), "file": diagnosed["file"], **stored}
    assert (stored["images"], stored["heldout"]) == (2, 5)
    assert len(stored["blocks"]) == 6
    assert len(stored["values"]) == len(json.loads((finished.folder / "sites.json").read_text())["quantized"])


def test_the_report_has_a_section(finished, diagnosed):
    text = (finished.folder / "report.html").read_text()
    assert "<h2>Diagnosis</h2>" in text
    assert diagnosed["effects"][0]["site"] in text
    assert "Blocks before and after learning" in text


def test_the_fragment_extends_the_recipe_of_the_run(finished, diagnosed, tmp_path):
    mine = {"extends": [str(finished.folder / "recipe.toml"), diagnosed["file"]]}
    result = run(mine, out=finished.folder.parent / "suggested")
    bits, first = bits_of(result.folder), bits_of(finished.folder)
    assert diagnosed["suggestion"]["bits"].items() <= bits.items()
    changed = {name for name in bits if bits[name] != first[name]}
    assert changed == set(diagnosed["suggestion"]["bits"])
    after = diagnose_run(result.folder, heldout=5)
    assert after["kl"] < diagnosed["kl"]


def test_a_new_run_in_the_folder_removes_the_diagnosis(finished, diagnosed, tmp_path):
    copied = tmp_path / "runs" / "copy"
    result = run(str(finished.folder / "recipe.toml"), out=copied, store=finished.folder.parent / ".store")
    (copied / "diagnosis.json").write_text(json.dumps({key: diagnosed[key] for key in diagnosed if key != "file"}))
    (copied / "suggestion.toml").write_text("")
    run(str(finished.folder / "recipe.toml"), out=result.folder, store=finished.folder.parent / ".store")
    assert not (copied / "diagnosis.json").exists()
    assert not (copied / "suggestion.toml").exists()


def test_the_command_prints_tables_and_the_fragment(finished, monkeypatch, diagnosed):
    monkeypatch.setattr(diagnosing, "diagnose_run", lambda *args, **options: diagnosed)
    done = spdfq("doctor", finished.folder)
    assert done.exit_code == 0, done.output
    for said in ("divergence, calibration", "top-1 in float", "[[quantization.overrides]]", diagnosed["file"]):
        assert said in done.stdout


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"images": 0}, "images: expected a number of images of at least 1"),
        ({"heldout": "many"}, "heldout: expected a number of images"),
        ({"overrides": ["quantization.weights.bits=8"]}, "cannot change a finished run"),
    ],
)
def test_wrong_options_are_clear_errors(finished, options, message):
    with pytest.raises(SpdfqError, match=message):
        diagnose_run(finished.folder, **options)


def test_several_processes_are_refused(finished, monkeypatch):
    monkeypatch.setattr(diagnosing, "join", lambda: Ranks(0, 2))
    with pytest.raises(SpdfqError, match="start it without torchrun"):
        diagnose_run(finished.folder)


def test_a_run_that_has_not_finished_is_refused(finished, tmp_path):
    (tmp_path / "recipe.toml").write_text((finished.folder / "recipe.toml").read_text())
    with pytest.raises(DataError, match=r"has no run.json"):
        diagnose_run(tmp_path)
    assert spdfq("doctor", tmp_path).exit_code == 2
