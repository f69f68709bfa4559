"""The report in headless Chromium, at desktop and phone width, without a network."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from html import unescape
from pathlib import Path
from typing import Any

import pytest
from quickstart_runs import Quickstart
from report_runs import make_run

from rlhf.report.page import write_report

pytestmark = pytest.mark.slow
WIDTHS = (390, 1280)
PROBE = """<script>addEventListener("load", () => {
document.querySelectorAll("details").forEach(d => d.open = true);
const box = document.createElement("pre"); box.id = "probe";
const texts = selector => [...document.querySelectorAll(selector)].map(e => e.textContent.trim());
box.textContent = JSON.stringify({inner: innerWidth,
room: document.documentElement.clientWidth, wide: document.documentElement.scrollWidth,
images: document.images.length, broken: [...document.images].filter(i => !i.naturalWidth).length,
tables: document.querySelectorAll("table").length,
bare: [...document.querySelectorAll("table")].filter(t => !t.tBodies[0].rows.length).length,
empty: [...document.querySelectorAll("td")].filter(d => d.cellIndex < 2 && !d.textContent.trim()).length,
missing: texts(".missing"), alerts: texts("[role=alert]"),
small: [...document.querySelectorAll("td, p, li")].filter(e => parseFloat(getComputedStyle(e).fontSize) < 10).length});
document.body.append(box); parent.postMessage(box.textContent, "*");});</script>"""


def seen(page: Path, folder: Path, width: int) -> dict[str, Any]:
    """What a frame of that width shows of the page, since a window cannot be as narrow as a phone."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("there is no Chromium on this machine")
    inner = page.read_text(encoding="utf-8").replace("</body>", PROBE + "</body>")
    (folder / "inner.html").write_text(inner, encoding="utf-8")
    frame = (
        f"<iframe src='inner.html' style='width:{width}px;height:800px;border:0'></iframe><pre id='out'></pre>"
        "<script>addEventListener('message', e => document.getElementById('out').textContent = e.data)</script>"
    )
    (folder / "frame.html").write_text(frame, encoding="utf-8")
    command = [chromium, "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--dump-dom",
               "--proxy-server=127.0.0.1:9", f"--user-data-dir={folder / 'profile'}", "--enable-logging=stderr",
               "--virtual-time-budget=10000", "--window-size=1400,900", (folder / "frame.html").as_uri()]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env={**os.environ}, check=True)
    found = re.search(r'<pre id="out">(.*?)</pre>', done.stdout)
    assert found, done.stderr
    assert "CONSOLE" not in done.stderr
    return dict(json.loads(unescape(found.group(1))))


def check(shown: dict[str, Any], width: int) -> None:
    assert shown["inner"] == width and shown["wide"] <= shown["room"], "nothing sticks out"
    assert (shown["broken"], shown["bare"], shown["empty"], shown["small"]) == (0, 0, 0, 0)


@pytest.mark.parametrize("width", WIDTHS)
def test_every_picture_is_drawn_and_every_table_filled(tmp_path: Path, width: int) -> None:
    out = tmp_path / "report.html"
    write_report([make_run(tmp_path / "hand"), make_run(tmp_path / "other", "FAIL", "UNPROMOTED")], out)
    shown = seen(out, tmp_path, width)
    check(shown, width)
    assert shown["images"] > 20 and shown["alerts"] == []


@pytest.mark.parametrize("width", WIDTHS)
def test_the_report_of_a_quickstart(tmp_path: Path, first: Quickstart, width: int) -> None:
    out = tmp_path / "report.html"
    write_report([first.run], out)
    assert out.stat().st_size < 3_000_000
    shown = seen(out, tmp_path, width)
    check(shown, width)
    assert shown["alerts"] == [], "the record is whole"
    assert shown["images"] == 16 and shown["missing"] == []
