"""The picture of a decoder: no overlaps, selectable text, reproducible files."""

import itertools
import sys
import xml.etree.ElementTree as ElementTree

import pytest

from retroexit.errors import MissingExtraError, OptionError
from retroexit.report.decoder_picture import draw_decoder
from retroexit.stages.stage import Stage

pytest.importorskip("matplotlib")


def decoder(count, live=0, dimensions=2, name="body", alike=False):
    """Stages whose costs grow; after l_i all but the first i of some live values are needed."""
    total = sum(range(1, count + 1)) * 1.1
    stages, spent = [], 0.05
    for i in range(1, count + 1):
        side = 8 if alike else 4 << (6 * i // count)
        spent += i / total
        values = tuple((f"encoder.{k}", (1, 8 * k, side, side)) for k in range(i, live + 1))
        shape = (1, 64 if alike else 4 * (count - i + 2), *[side] * dimensions)
        chosen = i in {count // 4, count // 3, count // 2, count - 1}
        stages.append(Stage(i, f"{name}.{i}", "Block", shape, i, i / total, spent, values, is_suggested=chosen))
    return stages


CASES = {
    "two stages": decoder(2),
    "usual": decoder(6, 1),
    "one dimension": decoder(5, 2, dimensions=1),
    "three dimensions": decoder(5, 2, dimensions=3),
    "thirty, all different": decoder(30, 30, name="generator.synthesis.upsampling_blocks.residual"),
    "sixty, alike": decoder(60, alike=True),
    "formula": decoder(3, name="a$b_c$"),
}


@pytest.mark.parametrize("stages", CASES.values(), ids=CASES)
def test_texts_neither_overlap_nor_leave_the_sheet(stages, tmp_path, monkeypatch):
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: drawn.append(figure))
    draw_decoder(stages, tmp_path / "d.svg", "A title that goes on and on, " * 9)
    figure = drawn[0]
    renderer = FigureCanvasAgg(figure).get_renderer()
    boxes = {t: t.get_window_extent(renderer) for t in figure.axes[0].texts if t.get_text()}
    for text, box in boxes.items():
        inside = box.x0 >= 0 and box.y0 >= 0 and box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1
        assert inside, text.get_text()
    for (a, box_a), (b, box_b) in itertools.combinations(boxes.items(), 2):
        across = min(box_a.x1, box_b.x1) - max(box_a.x0, box_b.x0)
        down = min(box_a.y1, box_b.y1) - max(box_a.y0, box_b.y0)
        assert min(across, down) <= 1, (a.get_text(), b.get_text())  # a pixel of a hundredth of an inch


@pytest.mark.parametrize("name", ["usual", "thirty, all different"])
def test_numbers_sizes_savings_and_live_values_can_be_read_and_selected(name, tmp_path):
    stages = CASES[name]
    draw_decoder(stages, tmp_path / "d.svg", "A decoder")
    nodes = ElementTree.parse(tmp_path / "d.svg").getroot().iter("{http://www.w3.org/2000/svg}text")
    shown = ["".join(node.itertext()).strip() for node in nodes]
    assert shown[0] == "A decoder"
    savings = [f"saves {int(100 * s.saves)}%" for s in stages if s.is_suggested]
    assert [text for text in shown if text.startswith("saves ")] == savings
    assert {f"{100 * s.cumulative:.0f}%" for s in stages} <= set(shown)
    assert any(text.startswith(f"{stages[0].shape[2]}×") and text.endswith("ch") for text in shown)
    if name == "usual":
        assert {stage.path for stage in stages} <= set(shown)
        assert "v1" in shown and any("encoder.1" in text for text in shown)
    else:
        assert "18 more live values are not drawn" in shown


@pytest.mark.parametrize("ending", [".svg", ".png", ".pdf"])
def test_equal_stages_give_an_equal_small_file(tmp_path, ending):
    for name in "ab":
        draw_decoder(CASES["usual"], tmp_path / f"{name}{ending}", "A decoder")
    written = [(tmp_path / f"{name}{ending}").read_bytes() for name in "ab"]
    assert written[0] == written[1]
    assert len(written[0]) < 100_000
    assert b"date" not in written[0].lower() or ending != ".svg"


def test_a_file_that_cannot_be_written_is_an_error(tmp_path, monkeypatch):
    for name, message in (
        ("d.jpg", "must end in one of .svg, .png, .pdf, got '.*d.jpg'"),
        ("d", "must end in one of .*, got '.*/d'"),
        ("nowhere/d.svg", "no folder '.*nowhere' for picture"),
    ):
        with pytest.raises(OptionError, match=message):
            draw_decoder(CASES["usual"], tmp_path / name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'retroexit\[report\]'"):
        draw_decoder(CASES["usual"], tmp_path / "d.svg")
