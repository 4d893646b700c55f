"""The documentation: its code runs or says why not, and nothing is missing in it."""

import functools
import inspect
import re
from pathlib import Path

import pytest

import retroexit
from retroexit import api, errors

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
RUN = ("README.md", "quickstart.md")  # deployment.md has a test of its own
BLOCK = re.compile(r"(?:<!-- not run: (.+?) -->\n)?```python\n(.*?)```", re.DOTALL)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_code_is_run_or_says_why_not(page):
    for reason, code in BLOCK.findall(page.read_text()):
        compile(code, page.name, "exec")
        assert bool(reason) != (page.name in (*RUN, "deployment.md")), code
        for name in re.findall(r"\bretroexit\.(\w+)\(", code):
            assert callable(getattr(retroexit, name))


@pytest.mark.parametrize("name", RUN)
def test_the_code_of_the_first_pages_runs(name, tmp_path, monkeypatch):
    """With two steps instead of the page's."""
    pytest.importorskip("torchmetrics")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("retroexit.training.initialise._SAMPLES", [2])
    quick = {"steps": 2, "predictor_steps": 2, "progress": False}
    monkeypatch.setattr(retroexit, "fit", lambda *args, **settings: api.fit(*args, **settings | quick))
    monkeypatch.setattr(retroexit, "evaluate", functools.partial(api.evaluate, repeats=1, progress=False))
    (page,) = [page for page in PAGES if page.name == name]
    space = {"__name__": name}
    for _, code in BLOCK.findall(page.read_text()):
        fewer = code.replace("scene_inputs(48,", "scene_inputs(4,").replace("scene_inputs(24,", "scene_inputs(3,")
        exec(compile(fewer, name, "exec"), space)
    assert space["images"].shape == (3, 3, 64, 128)
    assert (tmp_path / "runs/scenes/report/report.html").exists()


def test_the_readme_is_short():
    lines = PAGES[0].read_text().splitlines()
    assert len(lines) <= 150
    assert max(map(len, lines)) <= 120


def test_every_error_has_an_entry_in_troubleshooting():
    page = (ROOT / "docs/troubleshooting.md").read_text()
    classes = [value for value in vars(errors).values() if inspect.isclass(value) and issubclass(value, Exception)]
    missing = {error.__name__ for error in classes} - set(re.findall(r"^### (\w+)$", page, re.MULTILINE))
    assert missing == {"RetroExitError"}  # the base of all


def test_every_public_name_is_in_the_reference():
    page = (ROOT / "docs/api.md").read_text()
    documented = re.findall(r"^\.\. auto\w+:: (?:[\w.]+\.)?(\w+)$", page, re.MULTILINE)
    assert set(retroexit.__all__) - {"RetroExitError", "RetroExitWarning"} <= set(documented)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_a_page_names_exist(page):
    text = page.read_text()
    named = re.findall(r"\b((?:retroexit|tests|examples|benchmarks|adapters|docs)/[\w/.-]*\w)", text)
    named += [link for link in re.findall(r"\]\(([\w./-]+)", text) if link != "https"]
    for name in named:
        assert (ROOT / name).exists() or (page.parent / name).exists(), name


def test_every_page_is_in_the_table_of_contents():
    index = (ROOT / "docs/index.md").read_text().split()
    assert {page.stem for page in PAGES[1:]} - {"index"} <= set(index)
