"""How long the rest of a run will take."""

from spdfq.runs.forecast import Forecast

MAIN = ["teacher", "images", "quantize", "evaluate"]
NAMES = [*MAIN, "noise: images", "noise: quantize", "noise: evaluate"]


def test_nothing_is_known_before_the_first_stage():
    forecast = Forecast(NAMES)
    assert [forecast.expected(name) for name in MAIN] == [None] * 4
    assert forecast.later("teacher") is None


def test_the_evaluation_is_expected_from_the_teachers():
    forecast = Forecast(NAMES, seconds={"teacher": 2.0})
    assert forecast.expected("evaluate") == 6.0
    assert forecast.expected("noise: evaluate") == 6.0
    assert forecast.later("images") is None  # nobody knows how long the back-end takes


def test_a_control_takes_as_long_as_the_runs_own_back_end_and_evaluation():
    forecast = Forecast(
        NAMES, quick=frozenset({"noise"}), seconds={"teacher": 2.0, "images": 50.0, "quantize": 7.0, "evaluate": 4.0}
    )
    assert forecast.later("evaluate") == 0.0 + 7.0 + 4.0
    assert forecast.later("noise: evaluate") == 0.0


def test_optimised_images_of_a_control_take_as_long_as_the_runs_own():
    seconds = {"images": 50.0, "quantize": 7.0, "evaluate": 4.0}
    assert Forecast(NAMES, alike={"noise": 1.0}, seconds=seconds).later("evaluate") == 61.0
    assert Forecast(NAMES, alike={"noise": 0.02}, seconds=seconds).later("evaluate") == 12.0


def test_how_long_another_kind_of_source_takes_is_not_known():
    assert Forecast(NAMES, seconds={"images": 0.1, "quantize": 7.0, "evaluate": 4.0}).later("evaluate") is None
