"""The calibration images of a finished run as files for other tools."""

import json

import pytest
from support.commands import spdfq
from support.runs import IMAGES, images_of

from spdfq.calibration_data import CalibrationImages
from spdfq.errors import DataError
from spdfq.runs.calibration_images import export_images


def test_the_file_holds_the_images_of_the_run_bit_for_bit(finished, tmp_path):
    done = spdfq("images", finished.folder, "--to", tmp_path / "a.npz", "--json")
    assert done.exit_code == 0, done.output
    printed = json.loads(done.stdout)
    assert printed["images"] == IMAGES
    assert printed["rounding"] is None
    found = CalibrationImages.load(tmp_path / "a.npz")
    assert found.images.tobytes() == images_of(finished).images.numpy().tobytes()
    model = json.loads((finished.folder / "run.json").read_text())["model"]
    assert [float(value) for value in found.mean] == pytest.approx(model["mean"])
    assert [float(value) for value in found.std] == pytest.approx(model["std"])


def test_the_command_says_what_8_bits_change(finished, tmp_path):
    done = spdfq("images", finished.folder, "--to", f"{tmp_path}/new/png/")
    assert done.exit_code == 0, done.output
    lost = export_images(finished.folder, tmp_path / "new/png")["rounding"]
    assert 0 < lost["mean"] < lost["largest"] <= 0.5 / 255 / 0.353 + 1e-5
    assert f"by {lost['mean']:.4f} on average and at most {lost['largest']:.4f}" in done.stdout
    assert "images     2 of 28 × 28 pixels, source optimize" in done.stdout
    assert len(CalibrationImages.load(tmp_path / "new/png")) == IMAGES


def test_what_cannot_be_written_is_one_line(finished, tmp_path):
    done = spdfq("images", finished.folder, "--to", tmp_path / "a.jpg")
    assert done.exit_code == 2
    assert done.stderr == f"error: {tmp_path / 'a.jpg'}: give a file that ends in .npz, or a folder for PNG pictures\n"
    done = spdfq("images", finished.folder, "--to", finished.folder)
    assert done.exit_code == 2
    assert "holds other files" in done.stderr
    done = spdfq("images", tmp_path, "--to", tmp_path / "a.npz")
    assert done.exit_code == 2
    assert "not a run folder" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_is_not_finished_or_damaged_is_refused(finished, tmp_path):
    (tmp_path / "recipe.toml").write_bytes((finished.folder / "recipe.toml").read_bytes())
    with pytest.raises(DataError, match=r"has no run.json; give the folder of a finished run"):
        export_images(tmp_path, tmp_path / "a.npz")
    (tmp_path / "run.json").write_text('{"model": {}}')
    with pytest.raises(DataError, match=r"run.json: lacks 'mean'; run the recipe again with --fresh"):
        export_images(tmp_path, tmp_path / "a.npz")
    (tmp_path / "run.json").write_bytes((finished.folder / "run.json").read_bytes())
    with pytest.raises(DataError, match=r"synthetic.safetensors: damaged or missing"):
        export_images(tmp_path, tmp_path / "a.npz")
