"""Import the examples as when their scripts are run, and run them."""

import importlib
import sys
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@contextmanager
def _imported(folder, *names):
    hidden = {name: sys.modules.pop(name) for name in names if name in sys.modules}
    path = sys.path[:]
    sys.path.insert(0, str(EXAMPLES / folder))
    try:
        yield SimpleNamespace(**{name: importlib.import_module(name) for name in names})
    finally:
        sys.path[:] = path
        for name in names:
            sys.modules.pop(name, None)
        sys.modules.update(hidden)


@pytest.fixture(scope="session")
def imported():
    """Import modules of one folder; other folders have some of the same names."""
    return _imported


@pytest.fixture
def run_script(monkeypatch, capsys):
    """Run ``main`` of a module with a command line and return what it prints."""

    def run(module, words):
        monkeypatch.setattr(sys, "argv", ["script.py", *words.split()])
        module.main()
        return capsys.readouterr().out

    return run
