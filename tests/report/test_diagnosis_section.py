"""What the page and the command line show of a diagnosis."""

import json

import pytest

from spdfq.errors import DataError
from spdfq.report import write_report
from spdfq.report.diagnosis import block_rows, diagnosis_section, predicted, sentence, signed

EFFECT = {"site": "head.input", "bits": 4, "gain": 0.25, "gain_error": 0.01, "alone": 0.2}
VALUES = {"site": "head.input", "clipped": 1.25, "used": 9, "levels": 16, "snr": 12.34, "best_snr": 20.0}
BLOCK = {"block": "blocks.0", "before": 0.2, "after": 0.1, "heldout_before": 0.2, "heldout_after": 0.3}
SUGGESTION = {
    "fragment": '[[quantization.overrides]]\nsites = ["head.input"]\nbits = 8\n',
    "kl": 0.1,
    "heldout_kl": 0.2,
    "top1": 88.0,
    "weight_bits": [4.0, 4.5],
    "activation_bits": [4.0, 4.25],
}


def found(**changes):
    given = {
        "images": 32,
        "heldout": 64,
        "kl": 0.5,
        "heldout_kl": 0.6,
        "full_top1": 90.0,
        "top1": 80.0,
        "effects": [{**EFFECT, "top1_gain": 1.5, "top1_alone": 85.0}],
        "values": [VALUES],
        "blocks": [BLOCK],
        "suggestion": SUGGESTION,
        "findings": ["channels have <much> larger values than the others: head.input channel 1"],
        "notes": [],
    }
    return given | changes


def test_a_row_shows_both_tests_and_the_values_of_its_site():
    row = diagnosis_section(found())["rows"][0]
    assert row[:5] == ("head.input", "4", "\N{MINUS SIGN}0.2500", "0.0100", "0.2000")
    assert row[5:] == ("+1.50", "85.00", "1.25 %", "9 of 16", "12.3", "20.0")


def test_a_block_that_is_worse_on_held_out_images_is_marked():
    assert block_rows(found())[0] == ("blocks.0", "0.2000", "0.1000", "0.2000", "0.3000", "worse")
    unseen = {**BLOCK, "heldout_before": None, "heldout_after": None}
    assert block_rows(found(blocks=[unseen]))[0][3:] == ("", "", "")


def test_the_prediction_names_what_it_costs():
    lines = predicted(found())
    assert lines[0].endswith("0.5000 → 0.1000, on held-out images 0.6000 → 0.2000, top-1 80.00 → 88.00 %")
    assert lines[1] == "cost: 4.00 → 4.50 bits for a weight on average, 4.00 → 4.25 for an activation"
    assert diagnosis_section(found(suggestion=None))["fragment"] == []


def test_numbers_and_sentences():
    assert (signed(-0.00001, 4), signed(0.5, 2), signed(-0.5, 2)) == ("0.0000", "+0.50", "\N{MINUS SIGN}0.50")
    assert sentence("one thing.") == "One thing."


def test_the_page_has_the_section_and_a_damaged_file_is_an_error(finished, tmp_path):
    (tmp_path / "run.json").write_text((finished.folder / "run.json").read_text())
    assert "<h2>Diagnosis</h2>" not in write_report(tmp_path).read_text()
    (tmp_path / "diagnosis.json").write_text(json.dumps(found()))
    page = write_report(tmp_path).read_text()
    assert "<h2>Diagnosis</h2>" in page
    assert "&lt;much&gt;" in page
    (tmp_path / "diagnosis.json").write_text(json.dumps({"kl": 1}))
    with pytest.raises(DataError, match=r"diagnosis.json: lacks 'heldout'"):
        write_report(tmp_path)
