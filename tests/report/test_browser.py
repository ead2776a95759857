"""The page in a browser, where Chromium is installed: no messages, nothing loaded, and what a click opens."""

import re
import shutil
import subprocess

import pytest

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")
OPTIONS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--enable-logging=stderr")
PROBE = """<script>addEventListener("load", () => {
  const opened = [".term", ".term.table", ".cell"].map(kind => {
    document.querySelector(kind).click();
    return document.querySelectorAll(":popover-open").length;
  });
  const wide = document.documentElement.scrollWidth - document.documentElement.clientWidth;
  document.body.innerHTML = `<p id="found">${opened} ${wide}</p>`;
})</script></body>"""


def chromium(page, tmp_path, *options):
    command = [CHROMIUM, *OPTIONS, f"--user-data-dir={tmp_path / 'profile'}", *options, page.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)


@pytest.mark.parametrize("options", [(), ("--blink-settings=preferredColorScheme=0",)], ids=["light", "dark"])
def test_the_page_is_drawn_without_messages(finished, tmp_path, options):
    done = chromium(
        finished.folder / "report.html",
        tmp_path,
        "--window-size=1280,2000",
        f"--screenshot={tmp_path / 'page.png'}",
        *options,
    )
    assert "CONSOLE" not in done.stderr
    assert (tmp_path / "page.png").stat().st_size > 50_000


def test_names_tables_and_sites_open_their_notes_and_a_phone_needs_no_scrolling_aside(finished, tmp_path):
    page = (finished.folder / "report.html").read_text()
    probed = tmp_path / "probed.html"
    probed.write_text(re.sub("<meta http-equiv=[^>]*>", "", page).replace("</body>", PROBE))
    done = chromium(probed, tmp_path, "--window-size=390,844", "--dump-dom")
    assert '<p id="found">1,1,1 0</p>' in done.stdout
    assert "CONSOLE" not in done.stderr
