"""Packaging: cost of an import, content of the wheel, public errors."""

import inspect
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

import retroexit
from retroexit import errors

ROOT = Path(__file__).resolve().parents[1]
HEAVY = ("torchvision", "lpips", "faiss", "hnswlib", "matplotlib", "torchmetrics", "typer", "thop", "jinja2")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_importing_and_looking_up_loads_no_heavy_dependency():
    modules = "retroexit.metrics, retroexit.retrieval, retroexit.report.report"
    lines = ("import sys, " + modules, "from retroexit.plugins import host", "host().retriever('exact')")
    code = "\n".join([*lines, f"print(*[name for name in {HEAVY!r} if name in sys.modules])"])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_all_but_its_search_works_without_hnswlib():
    code = """
import sys
sys.modules["hnswlib"] = None  # could not be compiled
import numpy, retroexit
from retroexit.plugins import host
keys = numpy.eye(4, dtype="float32")
for name in ("exact", "faiss", "hnswlib"):
    retriever = host().retriever(name)()
    try:
        retriever.build(keys)
        print(name, retriever.search(keys, 1).ids.ravel().tolist())
    except retroexit.RetroExitError as error:
        print(type(error).__name__, error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    *lines, last = done.stdout.splitlines()
    assert lines == ["exact [0, 1, 2, 3]", "faiss [0, 1, 2, 3]"]
    assert last.startswith("MissingExtraError") and "pip install hnswlib" in last and "'exact' or 'faiss'" in last


def test_every_error_is_public_ours_and_a_builtin_too():
    defined = [thing for thing in vars(errors).values() if inspect.isclass(thing) and issubclass(thing, Exception)]
    for error in set(defined) - {errors.RetroExitError, errors.RetroExitWarning}:
        assert issubclass(error, errors.RetroExitError)
        assert issubclass(error, (ValueError, RuntimeError, OSError, ImportError, AssertionError))
        assert str(error("what to do")) == "what to do"


def test_the_version_is_stated_once():
    assert PROJECT["version"] == retroexit.__version__
    assert f"\nversion: {retroexit.__version__}\n" in (ROOT / "CITATION.cff").read_text()


def test_the_wheel_holds_the_library_the_adapters_and_their_data(tmp_path):
    wheel = pytest.importorskip("hatchling.builders.wheel", reason="hatchling builds the wheel")
    (path,) = wheel.WheelBuilder(str(ROOT)).build(directory=str(tmp_path), versions=["standard"])
    with zipfile.ZipFile(path) as opened:
        names = set(opened.namelist())
        (info,) = [name for name in names if name.endswith("entry_points.txt")]
        entry_points = opened.read(info).decode()
    adapters = {folder.name for folder in (ROOT / "adapters").iterdir() if (folder / "__init__.py").exists()}
    packages = {name.partition("/")[0] for name in names if ".dist-info/" not in name}
    assert packages == {"retroexit"} | adapters
    for suffix in (".py", ".typed", ".json", ".safetensors", ".j2"):
        data = {str(file.relative_to(ROOT)) for file in (ROOT / "retroexit").rglob(f"*{suffix}")}
        assert data <= names
    assert not any(name.endswith(".pyc") for name in names)
    for adapter in adapters:
        assert f"= {adapter}\n" in f"{entry_points}\n"
    assert "retroexit = retroexit.cli:main" in entry_points


def test_what_is_for_research_only_is_in_no_distribution(tmp_path):
    sdist = pytest.importorskip("hatchling.builders.sdist", reason="hatchling builds the distribution")
    (path,) = sdist.SdistBuilder(str(ROOT)).build(directory=str(tmp_path), versions=["standard"])
    with tarfile.open(path) as opened:
        names = {name.partition("/")[2] for name in opened.getnames()}
    assert "examples/street_scenes/exits.py" in names
    assert any(name.startswith("retroexit/") and name.endswith(".safetensors") for name in names)
    assert "examples/street_scenes/backbone.safetensors" not in names
