"""The pictures, the loss table and the page of a run folder."""

import base64
import csv
import json
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from support.reports import Page, page, run_json, teacher, whole_folder

from spdfq.report import write_pictures
from spdfq.report.curves import curves
from spdfq.report.page import bits_label
from spdfq.report.pictures import _columns, _Places, heat, signed_heat
from spdfq.synth.base import SyntheticImages


def lightness(colours):
    """CIE L* of sRGB colours."""
    srgb = colours / 255
    linear = np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)
    luminance = linear @ [0.2126, 0.7152, 0.0722]
    return np.where(luminance > 0.008856, 116 * np.cbrt(luminance) - 16, 903.3 * luminance)


def test_heat_colours_grow_lighter_in_even_steps():
    levels = lightness(heat(np.linspace(0, 1, 65)))
    assert np.all(np.diff(levels) > 0)
    eighths = np.diff(levels[::8])
    assert eighths.min() > 9.5
    assert eighths.max() < 12.5


def test_signed_colours_are_pale_at_zero_and_darken_alike_on_both_sides():
    levels = lightness(signed_heat(np.linspace(-1, 1, 65)))
    assert np.all(np.diff(levels[:33]) > 0)
    np.testing.assert_allclose(levels[:32], levels[:32:-1], atol=6)


def test_grey_images_are_shown_as_the_pixels_they_stand_for(tmp_path):
    images = torch.zeros(2, 1, 4, 4)
    images[0, 0, 0, 0], images[1, 0, 3, 3] = 1.0, -9.0
    assert write_pictures(tmp_path, SyntheticImages(images=images), teacher()) == ["synthetic.png"]
    sheet = Image.open(tmp_path / "synthetic.png")
    assert sheet.mode == "LA"
    assert sheet.size == (2 * 112 + 3, 112)  # 4 pixels magnified 28 times
    grey = np.array(sheet)
    assert np.all(grey[:28, :28] == (191, 255))  # 255 (1 * 0.25 + 0.5) = 191.25
    assert np.all(grey[28:, :112] == (128, 255))  # 255 * 0.5 = 127.5, rounded to even
    assert np.all(grey[:, 112:115] == (255, 0))
    assert np.all(grey[-28:, -28:] == (0, 255))  # below the pixel range: clamped


def test_three_channels_are_shown_as_colours(tmp_path):
    images = torch.zeros(1, 3, 4, 4)
    images[:, 1], images[:, 2] = 2.0, -2.0
    write_pictures(tmp_path, SyntheticImages(images=images), teacher(3))
    sheet = Image.open(tmp_path / "synthetic.png")
    assert sheet.mode == "RGBA"
    assert np.all(np.array(sheet) == (128, 255, 0, 255))


def test_large_images_are_not_magnified_and_at_most_64_are_shown(tmp_path):
    images = torch.zeros(70, 1, 90, 60)
    write_pictures(tmp_path, SyntheticImages(images=images), teacher())
    assert Image.open(tmp_path / "synthetic.png").size == (8 * 63 - 3, 8 * 93 - 3)


@pytest.mark.parametrize(("count", "columns"), [(1, 1), (4, 4), (5, 5), (9, 5), (10, 5), (12, 6), (32, 8), (64, 8)])
def test_the_grid_leaves_few_holes(count, columns):
    assert _columns(count) == columns


def test_prior_and_reached_attention_share_one_scale(tmp_path):
    prior, reached = torch.zeros(1, 2, 2, 2), torch.ones(1, 2, 2, 2)
    prior[:, :, 0, 1] = 0.5  # all of its mass on one token, although its sum is not 1
    images = SyntheticImages(images=torch.ones(1, 1, 4, 4), prior=prior, reached=reached, first_block=6)
    assert write_pictures(tmp_path, images, teacher()) == ["synthetic.png", "attention.png"]
    sheet = np.array(Image.open(tmp_path / "attention.png"))
    place = _Places(112, 112)
    assert sheet.shape[1::-1] == place.size(1, 2)
    for row in (0, 1):
        tiles = sheet[place.top(row) :, place.left(0) :][:112, : place.group, :3]
        assert np.all(tiles[:56, 56:112] == heat(np.array(1.0)))
        assert np.all(tiles[56:, :112] == heat(np.array(0.0)))
        assert np.all(tiles[:, 115:227] == heat(np.array(0.25)))  # a quarter of the mass on each of four tokens
        assert np.all(tiles[:56, -56:] == signed_heat(np.array(-0.75)))
        assert np.all(tiles[56:, -112:] == signed_heat(np.array(0.25)))
    thumbnail = sheet[:112, place.left(0) + (place.group - 112) // 2 :][:, :112]
    assert np.all(thumbnail == (191, 191, 191, 255))


def test_every_block_has_a_label_beside_its_row(tmp_path):
    maps = torch.ones(1, 3, 2, 2)
    write_pictures(tmp_path, SyntheticImages(images=torch.ones(1, 1, 4, 4), prior=maps, reached=maps), teacher())
    sheet, place = np.array(Image.open(tmp_path / "attention.png")), _Places(112, 112)
    inked = sheet[..., 3].astype(bool)
    for row in range(3):
        assert inked[place.top(row) :, : place.left(0)][:112].any()
    assert inked[112 : place.top(0), place.left(0) :].any()  # the words prior and reached
    assert not inked[:112, : place.left(0)].any()


def test_maps_without_mass_are_drawn_dark(tmp_path):
    maps = torch.zeros(1, 1, 2, 2)
    write_pictures(tmp_path, SyntheticImages(images=torch.ones(1, 1, 4, 4), prior=maps, reached=maps), teacher())
    place = _Places(112, 112)
    assert np.all(np.array(Image.open(tmp_path / "attention.png"))[-112:, place.left(0)][:, :3] == heat(np.array(0.0)))


def test_the_loss_table_holds_every_value_of_every_group(tmp_path):
    curve = torch.rand(2, 3, 2, generator=torch.Generator().manual_seed(0)) * 1000
    images = SyntheticImages(images=torch.zeros(1, 1, 4, 4), curves=curve, columns=("a, b", "total"))
    assert write_pictures(tmp_path, images, teacher()) == ["synthetic.png", "losses.csv"]
    with open(tmp_path / "losses.csv", newline="") as handle:
        header, *rows = csv.reader(handle)
    assert header == ["group", "iteration", "a, b", "total"]
    assert [tuple(map(int, row[:2])) for row in rows] == [(g, i) for g in range(2) for i in range(3)]
    values = torch.tensor([[float(value) for value in row[2:]] for row in rows])
    torch.testing.assert_close(values.view(2, 3, 2), curve, rtol=1e-5, atol=0)


def test_pictures_of_an_earlier_run_do_not_stay_behind(tmp_path):
    whole_folder(tmp_path)
    assert (tmp_path / "attention.png").exists()
    write_pictures(tmp_path, SyntheticImages(images=torch.zeros(1, 1, 4, 4)), teacher())
    assert not (tmp_path / "attention.png").exists()
    assert not (tmp_path / "losses.csv").exists()


def curve_points(path, values, kind):
    """The points of the first line or band drawn for a ``[groups, iterations]`` list."""
    rows = [f"{g},{i},{v}" for g, group in enumerate(values) for i, v in enumerate(group)]
    path.write_text("\n".join(["group,iteration,loss", *rows]) + "\n")
    points = re.search(rf'class="{kind}" points="([^"]+)"', curves(path))[1]
    return [tuple(map(float, point.split(","))) for point in points.split()]


def test_wide_ranges_are_drawn_on_a_logarithmic_axis(tmp_path):
    x, y = zip(*curve_points(tmp_path / "losses.csv", [[1, 10, 100, 1000]], "line"), strict=True)
    # the plot spans 42..257 by 10..116: four intervals across, three decades up
    assert x == pytest.approx([42 + 215 * (i + 0.5) / 4 for i in range(4)], abs=0.06)
    assert y == pytest.approx([116 - 106 * i / 3 for i in range(4)], abs=0.06)
    assert "loss (log scale)" in curves(tmp_path / "losses.csv")


def test_groups_are_drawn_as_their_mean_inside_a_band(tmp_path):
    path, values = tmp_path / "losses.csv", [[1, 1], [1, 2], [4, 3]]
    assert [y for _, y in curve_points(path, values, "line")] == pytest.approx([81 - 1 / 3, 81 - 1 / 3], abs=0.06)
    # 1 is at 116 and 4 at 10, so each unit is 106 / 3 high
    high, low = [10, 10 + 106 / 3], [116, 116]
    assert [y for _, y in curve_points(path, values, "band")] == pytest.approx([*high, *low[::-1]], abs=0.06)
    assert "lowest to highest over 3 groups" in curves(path)
    assert "log scale" not in curves(path)


def test_long_curves_are_thinned_without_losing_their_peaks(tmp_path):
    values = [1.0] * 4000
    values[1234] = 5.0
    band = curve_points(tmp_path / "losses.csv", [values], "band")
    assert len(band) == 2 * 160
    assert min(y for _, y in band) == 10
    assert max(y for _, y in band) == 116


@pytest.mark.parametrize("values", [[[2.0]], [[0.0, 0.0]], [[-3.0, -3.0, -3.0]], [[-2.0, 900.0]], [[1e-9, 1e9]]])
def test_any_finite_curve_can_be_drawn(tmp_path, values):
    points = curve_points(tmp_path / "losses.csv", values, "line")
    assert all(42 <= x <= 257 and 9.9 <= y <= 116.1 for x, y in points)
    Page(curves(tmp_path / "losses.csv"))


def test_the_page_holds_all_pieces_and_fetches_nothing(tmp_path):
    html = page(whole_folder(tmp_path))
    parsed = Page(html)
    assert not {"script", "link", "iframe", "object"} & set(parsed.tags)
    assert not re.search(r"https?:|url\(|@import|\son\w+=", html)
    sources = [value for name, value in parsed.attributes if name in ("src", "href")]
    carried = [base64.b64decode(source.removeprefix("data:image/png;base64,")) for source in sources]
    assert carried == [(tmp_path / name).read_bytes() for name in ("synthetic.png", "attention.png")]
    for heading in ("Images", "Attention", "Losses", "Time", "Sites", "Recipe", "Environment"):
        assert f"<h2>{heading}</h2>" in html
    assert parsed.tags.count("svg") == 2
    assert "prefers-color-scheme: dark" in html


def test_the_accuracy_line_says_what_was_measured(tmp_path):
    html = page(tmp_path)
    line = "FP 91.14 % → W4A4 89.86 % top-1 (simulated), 2000 images, agreement 95.25 %"
    assert f'content="{line}"' in html
    assert line in Page(html).text
    assert "Change −1.28 points" in Page(html).text
    assert "Top-5 99.80 % → 99.70 %" in Page(html).text


def test_an_integer_measurement_is_not_called_simulated(tmp_path):
    metrics = run_json()["metrics"] | {"simulated": False}
    assert "simulated" not in Page(page(tmp_path, metrics=metrics)).text


def test_missing_pieces_are_left_out(tmp_path):
    metrics = {"images": 10, "fp": {"top1": 50.0}, "quantized": {"top1": 40.0}}
    html = page(tmp_path, metrics=metrics)
    assert re.findall("<h2>(.*?)</h2>", html) == ["Time", "Environment"]
    assert "img" not in Page(html).tags
    assert "None" not in Page(html).text
    assert "Top-5" not in Page(html).text


def test_values_of_a_run_are_escaped(tmp_path):
    evil = "<script>alert('&\"')</script>"
    whole_folder(tmp_path)
    (tmp_path / "recipe.toml").write_text(f"name = '''{evil}'''\n")
    sites = {
        "quantized": [{"name": evil, "kind": evil, "quantizer": evil, "bits": 4, "shape": [1]}],
        "float": [{"name": evil, "what": evil}],
    }
    (tmp_path / "sites.json").write_text(json.dumps(sites))
    with open(tmp_path / "losses.csv", "w", newline="") as handle:
        csv.writer(handle).writerows([("group", "iteration", evil), (0, 0, 1), (0, 1, 2)])
    html = page(
        tmp_path,
        name=evil,
        warnings=[evil],
        device_name=evil,
        model=run_json()["model"] | {"name": evil},
        images={"type": evil, "count": 2},
        backend={"label": evil, "placement": evil, "steps": [evil]},
        stages={evil: {"seconds": 1.0, "reused": False, "key": evil}},
        versions={evil: evil},
    )
    parsed = Page(html)
    assert "script" not in parsed.tags
    assert parsed.text.count(evil) >= 14
    assert sum(evil in value for name, value in parsed.attributes if name in ("content", "aria-label")) == 2


@pytest.mark.parametrize(("real_images", "explained"), [(20, True), (0, False)])
def test_measures_are_explained_as_far_as_they_are_there(tmp_path, real_images, explained):
    found = {"semantic_alignment": 0.444 if explained else None, "head_similarity": None, "prior_overlap": 0.5}
    found |= {"channel_mean": [0.1, 0.2], "channel_std": [0.3, 0.3], "spectrum_slope": -1.5}
    found |= {"real_images": real_images, "notes": ["head_similarity: <none>"]}
    (tmp_path / "measures.json").write_text(json.dumps(found))
    text = Page(page(tmp_path)).text
    assert ("Semantic alignment 0.44" in text, "Alignment is the mean cosine" in text) == (explained, explained)
    assert "Prior reached 0.50 Channel mean 0.10 0.20 Channel std 0.30 0.30 Spectrum slope -1.50" in text
    assert "head_similarity: <none>" in text


def test_reused_stages_are_marked(tmp_path):
    assert "images 46 s quantize 0.0 s reused total 46 s" in Page(page(tmp_path)).text


def test_sites_are_counted_and_listed(tmp_path):
    text = Page(page(whole_folder(tmp_path))).text
    assert "weight uniform channel 4 2 weight uniform channel 8 1" in text
    assert "blocks.1.fc.weight weight 8 uniform channel 8 × 6" in text
    assert "LayerNorm 1 1,200" in text


def test_controls_are_rows_beside_the_run_and_the_size_is_shown(tmp_path):
    low = {**run_json()["metrics"], "quantized": {"top1": 62.35}, "agreement": 99.95}
    noise = {"name": "noise", "type": "gaussian_noise", "count": 2, "metrics": low}
    text = Page(page(tmp_path, controls=[noise], size={"float": 2_745_000, "quantized": 467_000})).text
    assert "this run optimize 2 89.86 % 95.25 % noise gaussian_noise 2 62.35 % 99.95 %" in text
    assert "Size 2.75 MB → 0.47 MB packed" in text
    assert "Controls" not in Page(page(tmp_path, controls=[])).text


def test_warnings_of_the_run_are_shown(tmp_path):
    assert "Warnings something to know" in Page(page(tmp_path, warnings=["something to know"])).text


def test_the_report_is_imported_without_torch():
    code = "import sys, spdfq.report; sys.exit('torch' in sys.modules or 'timm' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize(
    ("label", "percent", "shown"),
    [
        ("W4A4", 55.93, "W4A4 (55.9 % in float)"),
        ("W4A4", 0.9, "W4A4"),
        ("W4A4", None, "W4A4"),
        ("W4A32", 100.0, "W4A32"),
    ],
)
def test_the_label_says_how_much_stays_in_float(tmp_path, label, percent, shown):
    backend = run_json()["backend"] | {"label": label} | ({} if percent is None else {"percent_in_float": percent})
    assert bits_label(backend) == shown
    whole_folder(tmp_path)
    counts = {"total": 1_234_567, "float": 69, "percent_in_float": 55.93}
    rows = [{"name": "head.bias", "what": "parameter of Linear"}]
    (tmp_path / "sites.json").write_text(json.dumps({"quantized": [], "float": rows, "multiplications": counts}))
    text = Page(page(tmp_path, backend=backend)).text
    assert f"FP 91.14 % → {shown} 89.86 %" in text
    assert "55.93 % of the 1,234,567 multiplications of a forward pass have an operand in float." in text
