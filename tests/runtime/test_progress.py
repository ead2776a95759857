"""Progress bars: what they show, and the time left for a whole run."""

import pytest

from spdfq.runtime import RichProgress, silent
from spdfq.runtime.progress import clock


@pytest.fixture
def shown(monkeypatch, capsys):
    """What a terminal 100 columns wide shows, on standard error."""
    monkeypatch.setenv("COLUMNS", "100")
    return lambda: capsys.readouterr().err


def test_the_silent_bar_takes_what_the_shown_one_takes():
    with silent("x", 3) as advance:
        assert advance() is None
        assert advance(2, loss=1.0) is None


def test_the_bar_is_on_standard_error_with_its_live_values(capsys):
    with RichProgress()("synthesising", 3) as advance:
        advance(2)
        advance(loss=0.123456)
    out, err = capsys.readouterr()
    assert out == ""
    for part in ("synthesising", "3/3", "loss=0.1235"):
        assert part in err


def test_no_loss_is_cut_off_at_100_columns(shown):
    names = [
        "attention_prior",
        "soft_cross_entropy",
        "total_variation",
        "patch_similarity_entropy",
        "total",
        "gradient",
    ]
    with RichProgress()("synthesising", 3) as advance:
        advance(3, **dict.fromkeys(names, 12.3456))
    text = shown()
    assert [name for name in names if f"{name}=12.35" not in text] == []
    assert "\N{HORIZONTAL ELLIPSIS}" not in text


def test_the_bar_names_the_stage_of_the_run(shown):
    progress = RichProgress()
    progress.stage(2, 4, "images", expected=None, later=None)
    with progress("synthesising", 3) as advance:
        advance(3)
    assert "stage 2 of 4, images: synthesising" in shown()


@pytest.mark.parametrize(
    ("expected", "later", "bar", "text"),
    [
        (None, 0.0, None, ""),  # nothing is known yet
        (None, 0.0, 30.0, "0:30 left"),  # the last stage, or no run at all
        (None, 60.0, 30.0, "1:30 left"),
        (None, None, 30.0, "at least 0:30 left"),  # a later stage is unknown
        (100.0, 60.0, None, "2:40 left"),
        (100.0, 60.0, 30.0, "2:40 left"),  # the stage has more than this bar
        (10.0, 60.0, 30.0, "1:30 left"),  # the stage takes longer than expected
    ],
)
def test_the_time_left_is_that_of_the_stage_and_of_what_comes_after(monkeypatch, expected, later, bar, text):
    monkeypatch.setattr("time.monotonic", lambda: 0.0)
    progress = RichProgress()
    progress.stage(1, 4, "teacher", expected, later)
    assert progress.time_left(bar) == text


def test_a_duration_has_hours_only_where_it_lasts_one():
    assert [clock(seconds) for seconds in (0.4, 59.6, 61, 3661)] == ["0:00", "1:00", "1:01", "1:01:01"]
