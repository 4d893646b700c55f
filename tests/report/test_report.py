"""The HTML report: self-contained, complete, with the numbers of the evaluation."""

import base64
import html
import io
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from retroexit.errors import MissingExtraError, OptionError
from retroexit.evaluation.sweep import Evaluation, thresholds_for
from retroexit.report.report import write_report
from retroexit.report.strips import Strip
from retroexit.routing.calibration import Calibration


class Page:
    """Tables, addresses, ids, headings and figures of a page."""

    def __init__(self, text):
        rows = {
            name: table.split("<tr")[1:] for name, table in re.findall(r'<table id="(.*?)"(.*?)</table>', text, re.S)
        }
        self.tables = {name: [self.cells(row) for row in table] for name, table in rows.items()}
        self.addresses = re.findall(r'\b(?:src|href|srcset)="([^"]*)"', text)
        self.ids = re.findall(r'\bid="([^"]*)"', text)
        self.headings = re.findall("<h2>(.*?)</h2>", text)
        self.pictures = [address for address in self.addresses if address.startswith("data:image/png;base64,")]
        self.drawings, self.chosen = text.count("<svg"), text.count('<figure class="chosen"')

    @staticmethod
    def cells(row):
        """Texts of the cells of a row, without tags."""
        cells = re.findall(r"<t[dh]\b.*?>(.*?)</t[dh]>", row, re.DOTALL)
        return [html.unescape(re.sub("<.*?>", "", cell)) for cell in cells]

    def pixels(self, number):
        return np.asarray(Image.open(io.BytesIO(base64.b64decode(self.pictures[number].partition(",")[2]))))


@pytest.fixture(scope="module")
def strips():
    random = np.random.default_rng(0)
    images = [(f"exit {k}", random.integers(0, 256, (24, 32, 3), dtype=np.uint8)) for k in (1, 2, 3)]
    return [Strip("easiest <input>", images, 0), Strip("hardest input", images[:2], 1)]


@pytest.fixture(scope="module")
def usual(make_evaluation, strips, tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    return write_report(folder, make_evaluation(), strips, title="<b>T</b>").read_text("utf-8")


def test_the_page_needs_no_network_and_its_references_resolve(usual):
    assert not re.search(r"https?://|//[a-z]+\.|@import|<link|<script", usual)
    page = Page(usual)
    inner = set(page.addresses) - set(page.pictures)
    assert all(address.startswith("#") for address in inner)
    targets = {address[1:] for address in inner} | set(re.findall(r"url\(#([^)]+)\)", usual))
    assert page.drawings == 5
    assert targets and targets <= set(page.ids)
    assert len(page.ids) == len(set(page.ids))
    assert "&lt;b&gt;T&lt;/b&gt;" in usual and "easiest &lt;input&gt;" in usual
    assert "<b>T" not in usual and "<input>" not in usual


def test_small_pictures_survive_unchanged_and_large_ones_are_reduced(usual, strips, make_evaluation, tmp_path):
    page = Page(usual)
    assert len(page.pictures) == 5 and page.chosen == 2
    assert np.array_equal(page.pixels(0), strips[0].images[0][1])
    strip = Strip("large", [("one", np.zeros((300, 1200, 3), np.uint8))], 0)
    bare = make_evaluation(predicted=None, distance=None)
    page = Page(write_report(tmp_path, bare, [strip], title="T").read_text("utf-8"))
    assert page.pixels(0).shape == (96, 384, 3)


def test_the_tables_hold_the_numbers_of_the_evaluation(make_evaluation, tmp_path):
    e = make_evaluation()
    path = write_report(tmp_path, e, [], title="T", thresholds=[0.1, 0.05])
    tables = Page(path.read_text("utf-8")).tables
    _, *rows = tables["sweep"]
    for row, tau in zip(rows, (0.05, 0.1), strict=True):
        point = e.at_threshold(tau)
        assert row[:3] == [f"{tau:g}", f"{100 * point.saved:.0f} %", f"{100 * (1 - point.time):.0f} %"]
        numbers = [point.mean_macs / 1e9, point.mean_loss, point.p90_loss]
        assert [float(cell) for cell in row[4:7]] == pytest.approx(numbers, rel=0.01)
        assert [int(cell) for cell in row[8:]] == point.counts.tolist()
    head, *rows = tables["exits"]
    assert [row[0] for row in rows] == ["1", "2", "3", "backbone"]
    columns = dict(zip(head, zip(*rows, strict=True), strict=True))
    assert [float(cell) for cell in columns["computeGMACs"]] == pytest.approx(e.macs / 1e9, rel=0.01)
    (quality,) = [cells for name, cells in columns.items() if "mean LPIPS" in name]
    assert [float(cell.split()[0]) for cell in quality[:3]] == pytest.approx(e.loss.mean(0), rel=0.01)
    assert columns["after stage"] == ("2", "4", "6", "") and columns["timeof the backbone"][0] == "20 %"


def test_the_predictor_table_and_the_headline_hold_the_numbers(make_evaluation, usual, tmp_path):
    e = make_evaluation()
    rows, error, point = Page(usual).tables["predictor"][1:], e.predictor_error(), e.at_threshold(0.1)
    assert [float(row[1]) for row in rows] == pytest.approx(error["mean_absolute"], rel=0.01)
    assert [float(row[3]) for row in rows] == pytest.approx(error["spearman"], abs=0.006)
    assert f"At a threshold of 0.1 LPIPS (alex), {100 * point.saved:.0f} % of the backbone" in usual
    assert f"mean {point.mean_loss:.3g}, 90 % of the samples below {point.p90_loss:.3g}." in usual
    summary = write_report(tmp_path, make_evaluation(overhead=np.full(4, 9e9)), [], title="T").parent
    headline = json.loads((summary / "summary.json").read_text())["headline"]
    assert re.search(r"\d+ % of the backbone's compute is added", headline)


def test_the_headline_of_a_calibrated_model_states_its_promise(make_evaluation, tmp_path):
    e, other = make_evaluation(samples=100), make_evaluation(samples=100, seed=1)
    calibration = Calibration(torch.from_numpy(other.loss), torch.from_numpy(other.need_predicted()))
    write_report(tmp_path, e, [], title="T", calibration=calibration)
    point = e.promised(calibration, 0.1)
    assert point.saved != pytest.approx(e.at_threshold(0.1).saved)
    headline = json.loads((tmp_path / "summary.json").read_text())["headline"]
    assert headline.startswith(f"At a threshold of 0.1 LPIPS (alex), {100 * point.saved:.0f} % of the backbone")
    assert "at most 5 % of the inputs lose more (confidence 95 %)" in headline
    assert f"here {int((point.loss_of > 0.1).sum())} of 100 do, mean {point.mean_loss:.3g}." in headline


def test_the_page_opens_with_what_was_saved_promised_and_kept(make_evaluation, usual, tmp_path):
    e, other = make_evaluation(samples=100), make_evaluation(samples=100, seed=1)
    calibration = Calibration(torch.from_numpy(other.loss), torch.from_numpy(other.need_predicted()))
    promised = write_report(tmp_path, e, [], title="T", calibration=calibration).read_text("utf-8")
    for text, values in ((promised, {"95 %"}), (usual, {"no promise"})):
        tiles = re.findall(r"<div><b>(.*?)</b><span>(.*?)</span></div>", text, re.DOTALL)
        assert len(tiles) == 4 and len({words for _, words in tiles}) == 4
        assert values <= {value for value, _ in tiles}
        order = [text.index(part) for part in ('class="cards"', 'id="sweep"', "<h2>Figures", 'id="exits"')]
        assert order == sorted(order)
        assert not re.search(r"-0(\.0+)? %", text)


def test_details_are_folded_and_everything_is_reached_by_the_keyboard(usual):
    folded = re.findall(r"<details>(.*?)</details>", usual, re.DOTALL)
    assert usual.count("<details") == len(folded)  # closed, and none inside another
    titles = [re.search("<summary><h2>(.*?)</h2></summary>", text)[1] for text in folded]
    assert titles == ["Exits", "Predictor", "What was counted", "How this was measured"]
    assert usual.count('class="wide"') == len(re.findall(r'class="wide" role="region" tabindex="0" aria-label', usual))
    assert usual.count("<main>") == usual.count("<h1>") == 1
    assert all('alt="' in image for image in re.findall("<img.*?>", usual))


def test_text_has_contrast(usual):
    def luminance(colour):
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return np.dot(linear, (0.2126, 0.7152, 0.0722))

    colours = dict(re.findall(r"--(ink|soft|pick): (#\w+)", usual))
    for name, colour in colours.items():
        colour = "#" + "".join(2 * digit for digit in colour[1:]) if len(colour) == 4 else colour
        for ground in ("#ffffff", "#fff1e6", "#f5f5f5"):
            if name != "pick" or ground == "#ffffff":
                assert (luminance(ground) + 0.05) / (luminance(colour) + 0.05) >= 4.5, (name, ground)


def test_what_was_not_measured_is_left_out(make_evaluation, tmp_path):
    bare = make_evaluation(predicted=None, distance=None, seconds=None, exits=[], metric={}, about={})
    page = Page(write_report(tmp_path, bare, [], title="T", command=None).read_text("utf-8"))
    assert page.headings == ["Figures", "Exits", "What was counted", "How this was measured"]
    assert set(page.tables) == {"exits", "counted"}
    assert not any("time" in head or "stage" in head for head in page.tables["exits"][0])
    assert page.drawings == 2
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert (summary["highlight"], summary["sweep"], summary["predictor_error"]) == (None, [], None)
    assert summary["headline"].startswith("Exit 1 takes 22 % of the backbone's compute")


def test_page_and_summary_hold_facts_and_numbers(make_evaluation, tmp_path):
    about = {"folder": Path("a/b"), "count": np.int64(3), "versions": {"python": "3.11"}, "nothing": None}
    e = make_evaluation(about=about)
    page = write_report(tmp_path, e, [], title="T", command="--x '<y>'", thresholds=[0.04, 0.1])
    text = page.read_text("utf-8")
    assert all(part in text for part in ("ab" * 32, "torch 2.15.0", "python 3.11", "--x &#39;&lt;y&gt;&#39;"))
    assert "<dt>nothing" not in text
    summary = json.loads((tmp_path / "summary.json").read_text())
    point = e.at_threshold(0.1)
    assert summary["highlight"] == summary["sweep"][1]
    assert summary["highlight"]["saved"] == pytest.approx(point.saved)
    assert summary["highlight"]["counts"] == point.counts.tolist()
    assert summary["highlight"]["best_fixed"]["saved"] == pytest.approx(e.best_fixed(point.mean_loss).saved)
    assert summary["gain_factor"] == e.gain_factor(e.sweep([0.04, 0.1]))
    assert [row["exit"] for row in summary["fixed"]] == [1, 2, 3, 4]
    assert [row["violations"] for row in summary["oracle"]] == [0, 0]
    assert summary["predictor_error"]["mean_absolute"] == e.predictor_error()["mean_absolute"]
    assert (summary["title"], summary["command"], summary["samples"]) == ("T", "--x '<y>'", 60)
    assert summary["about"] == {**about, "folder": "a/b", "count": 3}


def test_what_was_counted_is_listed_part_by_part(make_evaluation, usual, tmp_path):
    e = make_evaluation()
    rows = {row[0]: row for row in Page(usual).tables["counted"][1:]}
    routes = [f"route to exit {k}" for k in (1, 2, 3)]
    assert list(rows) == ["backbone", *routes, "predictor", "retrieval"]
    assert all(row[1].endswith(" GMACs") for row in rows.values())
    amount = {name: float(row[1].split()[0]) * 1e9 for name, row in rows.items()}
    assert amount["predictor"] == pytest.approx(e.overhead[-1])
    assert amount["retrieval"] == pytest.approx(e.overhead[0] - e.overhead[-1])
    point = e.at_threshold(-1.0)  # every sample to the backbone
    assert amount["backbone"] + amount["predictor"] == pytest.approx(point.mean_macs)
    assert rows["retrieval"][2] == "2 %"  # 0.2 of 9 GMACs
    # One sample without any loss, and a predictor of hardly any cost.
    nothing = {"loss": np.zeros((1, 1)), "predicted": np.zeros((1, 1)), "overhead": np.full(2, 0.9e6)}
    small = make_evaluation(samples=1, branches=1, **nothing)
    text = write_report(tmp_path / "deep", small, [], title="T").read_text("utf-8")
    assert Page(text).tables["counted"][-1][:3] == ["predictor", "0.9 MMACs", "0.01 %"]
    assert not re.search(r"-0(\.0+)? %", text)


def test_figures_that_cannot_be_drawn_are_named_with_what_would_give_them(make_evaluation, tmp_path, usual):
    bare = make_evaluation(predicted=None, distance=None)
    text = write_report(tmp_path, bare, [], title="T").read_text("utf-8")
    assert "Figures 3, 7 and 9 need a predictor: retroexit.fit trains one." in text
    assert "Figure 10 needs a bank: wrap the generator with guidance." in text
    assert "need a predictor" not in usual and "needs a bank" not in usual
    numbers = ("s 3 and 7", "s 4 and 6", " 8", " 9", " 10")
    assert [n for n in numbers if f"Paper, figure{n}." not in usual] == []


@pytest.mark.parametrize("scale", [1e-4, 1.0, 40.0])
def test_default_thresholds_are_few_round_and_span_the_losses(make_evaluation, scale):
    e = make_evaluation()
    other = Evaluation(e.loss * scale, None, e.macs, e.overhead)
    taus = thresholds_for(other)
    assert 5 <= len(taus) <= 16
    assert taus[0] > 0 and taus == sorted(taus)
    assert taus[0] <= np.percentile(other.loss, 20) and taus[-1] >= np.percentile(other.loss, 90)
    assert all(len(f"{tau:e}".rstrip("0").partition("e")[0].rstrip("0")) <= 5 for tau in taus)
    assert 0.1 in thresholds_for(Evaluation(e.loss * scale, None, e.macs, e.overhead, {"name": "lpips-vgg"}))


def test_missing_thresholds_and_a_missing_jinja2_are_errors(make_evaluation, tmp_path, monkeypatch):
    with pytest.raises(OptionError, match="thresholds must not be empty, got"):
        write_report(tmp_path, make_evaluation(), [], title="T", thresholds=[])
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'retroexit\[report\]'"):
        write_report(tmp_path, make_evaluation(), [], title="T")
    assert not list(tmp_path.iterdir())
