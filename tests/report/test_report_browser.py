"""The report in a browser: no requests, no overflow, every picture loaded."""

import html
import http.server
import json
import os
import re
import shutil
import subprocess
import threading
from functools import partial

import numpy as np
import pytest
import torch

from retroexit.report.report import write_report
from retroexit.report.strips import Strip
from retroexit.routing.calibration import Calibration

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--dump-dom"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    *("--virtual-time-budget=10000", "--window-size=2000,1200"),
)
# A frame of one width around the page; facts about it are written where --dump-dom shows them.
FRAME = """<!doctype html><meta charset="utf-8"><pre id="facts"></pre>
<iframe style="border:0;height:900px;width:WIDTHpx" src="page.html"></iframe>
<script>
const frame = document.querySelector("iframe");
frame.addEventListener("load", () => {
  const page = frame.contentDocument, view = frame.contentWindow, root = page.documentElement;
  const all = chosen => [...page.querySelectorAll(chosen)];
  document.getElementById("facts").textContent = JSON.stringify({
    inside: view.innerWidth,
    wide: root.scrollWidth,
    outside: all("body *").filter(e => !e.closest(".wide"))
      .filter(e => e.getBoundingClientRect().right > root.clientWidth + 1)
      .map(e => e.tagName),
    pictures: all("img").map(i => i.complete && i.naturalWidth > 0 && i.clientWidth > 40),
    drawings: all("svg").map(s => s.getBoundingClientRect().width),
    smallest: Math.min(...all("p, td, th, figcaption, dd, h1, h2, h3")
      .map(e => parseFloat(view.getComputedStyle(e).fontSize))),
    tables: all("div.wide").map(d => d.clientWidth),
    fetched: view.performance.getEntriesByType("resource").map(e => e.name)
      .filter(name => !name.startsWith("data:")),
  });
});
</script>
"""


@pytest.fixture(scope="session")
def browser():
    """A headless browser; tests that need one skip where there is none."""
    for name in (os.environ.get("RETROEXIT_BROWSER", ""), *NAMES):
        if name and (path := shutil.which(name)):
            return path
    pytest.skip(f"no browser; install one of {', '.join(NAMES)}, or set RETROEXIT_BROWSER")


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


def look(browser, page, width, folder):
    """Show a page in a frame of some width and return facts about it."""
    (folder / "page.html").write_text(page, encoding="utf-8")
    (folder / "frame.html").write_text(FRAME.replace("WIDTH", str(width)), encoding="utf-8")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=folder)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}/frame.html"
        command = [browser, *FLAGS, f"--user-data-dir={folder / 'profile'}", address]
        done = subprocess.run(command, capture_output=True, text=True, timeout=200)
        server.shutdown()
    match = re.search(r'<pre id="facts">(\{.*?\})</pre>', done.stdout, re.DOTALL)
    assert match, done.stderr[-2000:]
    return json.loads(html.unescape(match[1]))


@pytest.fixture(scope="module")
def page(make_evaluation, tmp_path_factory):
    """A report with everything: promise, guidance, long names, images of two sizes."""
    evaluation, other, unguided = (make_evaluation(120, 5, seed=seed) for seed in range(3))
    random = np.random.default_rng(0)
    images = {side: random.integers(0, 256, (side, 2 * side, 3), np.uint8) for side in (32, 300)}
    path = write_report(
        tmp_path_factory.mktemp("report"),
        evaluation,
        [Strip(f"hardest ({side})", [("exit 1: 0.123", image)] * 7, 2) for side, image in images.items()],
        title="A latent decoder with a rather long name and five early exits",
        command="retroexit evaluate examples/latent_decoder.py:decoder runs/latent --inputs x.py:" + "y" * 80,
        unguided=unguided,
        calibration=Calibration(torch.from_numpy(other.loss), torch.from_numpy(other.need_predicted())),
    )
    return path.read_text("utf-8")


@pytest.mark.parametrize("width", [400, 1920])
def test_the_page_can_be_read_at_any_width_and_fetches_nothing(browser, page, width, tmp_path):
    facts = look(browser, page, width, tmp_path)
    assert facts["inside"] == width
    assert facts["wide"] <= width and facts["outside"] == []
    assert len(facts["pictures"]) == 14 and all(facts["pictures"])
    assert len(facts["drawings"]) == 5
    assert all(min(0.8 * width, 350) <= drawn <= width for drawn in facts["drawings"])
    assert facts["smallest"] >= 12
    assert all(table >= 0.85 * min(width, 1472) for table in facts["tables"])
    assert facts["fetched"] == []
