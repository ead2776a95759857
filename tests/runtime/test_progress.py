"""Progress bars: what they show, and the time left for a whole run."""

import sys
from types import SimpleNamespace

import pytest

from spdfq.errors import SpdfqError
from spdfq.runtime import RichProgress, pick_progress, silent
from spdfq.runtime.progress import clock, in_notebook


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


# bars by default


@pytest.fixture
def notebook(monkeypatch):
    """A stand-in for IPython in a notebook's kernel; a list of what its cell shows."""
    shown = []

    class Handle:
        def update(self, data, raw):
            shown.append(data["text/plain"])

    shell, display = SimpleNamespace(kernel=object()), SimpleNamespace(display=lambda *_, **__: Handle())
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: shell))
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    return shown


@pytest.mark.parametrize("terminal", [True, False])
def test_bars_are_shown_in_a_terminal_unless_they_are_declined(monkeypatch, terminal):
    monkeypatch.setattr(sys, "stderr", SimpleNamespace(isatty=lambda: terminal))
    assert isinstance(pick_progress(None), RichProgress) == terminal
    assert isinstance(pick_progress(True), RichProgress)
    assert pick_progress(False) is pick_progress(silent) is silent


def test_a_notebooks_cell_shows_the_bar_as_text(notebook, capsys):
    with pick_progress(None)("synthesising", 3) as advance:
        advance(1, loss=0.5)
        advance(2, loss=0.25)
    assert "1/3" in notebook[0]
    assert "loss=0.5" in notebook[0]
    assert "synthesising" in notebook[-1]
    assert "3/3" in notebook[-1]
    assert notebook[-1].endswith("loss=0.25")
    assert len(notebook) == 2, "at most four times a second, and at the end"
    assert capsys.readouterr() == ("", "")


def test_a_shell_without_a_kernel_is_no_notebook(notebook, monkeypatch):
    assert in_notebook()
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: None))
    assert not in_notebook()


@pytest.mark.parametrize("given", [3, "yes", RichProgress, []])
def test_what_shows_no_progress_is_refused(given):
    with pytest.raises(SpdfqError, match=r"^progress: expected True, False, None or a RichProgress\(\), got "):
        pick_progress(given)
