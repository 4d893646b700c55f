"""Broken distributions, with metadata in a folder on the path of a fresh interpreter."""

import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

HEAD = "from retroexit.plugins import hookimpl\n"
GOOD = f"{HEAD}@hookimpl\ndef retroexit_losses():\n    from torch import nn\n    return {{'squares': nn.MSELoss}}\n"


@dataclass
class Site:
    """A folder of distributions, as pip would leave them."""

    folder: Path

    def add(self, distribution, module, source, entry=None):
        """Install a module and announce it; ``entry`` is the line in ``entry_points.txt``."""
        (self.folder / f"{module}.py").write_text(source)
        info = self.folder / f"{distribution.replace('-', '_')}-1.2.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.2\n")
        (info / "entry_points.txt").write_text(f"[retroexit]\n{entry or f'{module} = {module}'}\n")

    def run(self, *words):
        """Run a Python command line that sees these distributions."""
        path = os.pathsep.join([str(self.folder), *filter(None, sys.path)])
        environment = os.environ | {"PYTHONPATH": path}
        return subprocess.run([sys.executable, *words], capture_output=True, text=True, env=environment)


@pytest.fixture
def site(tmp_path):
    return Site(tmp_path)


NOT_IN_USE = {
    "import error": ("import nowhere_at_all", "ModuleNotFoundError: No module named 'nowhere_at_all'"),
    "system exit": ("raise SystemExit('no licence')", "SystemExit: no licence"),
    "panic": ("class Panic(BaseException): pass\nraise Panic('rust')", "Panic: rust"),
}
LOOK = """
import importlib.metadata as metadata, json, sys, warnings
find, groups = metadata.entry_points, []
metadata.entry_points = lambda **filters: (groups.append(filters.get("group")), find(**filters))[1]
import retroexit, torch
early = [name for name in sys.modules if name.startswith("plug_")] + [g for g in groups if g == "retroexit"]
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    from retroexit.plugins import host
    for _ in range(2):
        host().installed()
        host().describe(torch.nn.ReLU())
    used = host().retriever("exact").__name__, host().width_rule("floor")(64, 0.5, 8)
    plugins = host().installed()
print(json.dumps({
    "early": early,
    "said": [[w.category.__name__, str(w.message)] for w in said],
    "used": used,
    "losses": host().names("loss"),
    "plugins": {p.name: [p.state, p.error] for p in plugins},
}))
"""


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    """Install every broken distribution and one good one, and look everything up twice."""
    site = Site(tmp_path_factory.mktemp("site"))
    site.add("merry-plugin", "plug_good", GOOD)
    for name, (source, _) in NOT_IN_USE.items():
        module = f"plug_{name.replace(' ', '_')}"
        site.add(f"bad-{name.replace(' ', '-')}", module, source, entry=f"{name} = {module}")
    site.add("first-zoo", "plug_zoo", GOOD.replace("squares", "zoo"), entry="zoo = plug_zoo")
    site.add("second-zoo", "plug_zoo2", GOOD.replace("squares", "zoo2"), entry="zoo = plug_zoo2")
    done = site.run("-c", LOOK)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_whatever_is_installed_the_library_imports_and_works(seen):
    assert seen["early"] == [], "'import retroexit' looked for plug-ins"
    assert seen["used"] == ["ExactRetriever", 32]
    assert {"l1", "mse", "squares", "zoo"} <= set(seen["losses"])
    assert seen["plugins"]["plug_good"] == seen["plugins"]["builtin"] == ["in use", None]
    assert {category for category, _ in seen["said"]} == {"RetroExitWarning"}
    assert len(seen["said"]) == len(NOT_IN_USE) + 1
    assert any("second-zoo 1.2 is not in use: the name 'zoo' is taken" in text for _, text in seen["said"])


@pytest.mark.parametrize("name", NOT_IN_USE)
def test_a_plugin_that_cannot_be_loaded_is_named_once_with_its_cause(seen, name):
    _, cause = NOT_IN_USE[name]
    start = f"plug-in '{name}' of bad-{name.replace(' ', '-')} 1.2 is not in use: "
    (text,) = [text for _, text in seen["said"] if text.startswith(start)]
    assert re.match(cause, text.removeprefix(start)), text
    state, error = seen["plugins"][name]
    assert state == "not in use"
    assert text == start + error


def test_the_command_line_lists_what_is_broken_and_goes_on(site):
    pytest.importorskip("typer")
    site.add("sad-plugin", "plug_bad", "import nowhere_at_all")
    offer = "@hookimpl\ndef retroexit_commands(): return {'greet': greet, 'fit': greet}\n"
    greet = "def greet(name: str = 'you'):\n    '''Greet somebody.'''\n    print('hello', name)\n"
    site.add("odd-plugin", "plug_odd", HEAD + offer + greet)
    shown = site.run("-m", "retroexit", "plugins")
    assert shown.returncode == 0, shown.stderr
    assert re.search(r"^plug_bad +sad-plugin +1\.2 +not in use$", shown.stdout, re.MULTILINE)
    assert re.search(r"^plug_odd +odd-plugin +1\.2 +in part +retroexit_commands$", shown.stdout, re.MULTILINE)
    assert re.search(r"^retroexit_commands +plug_odd +greet$", shown.stdout, re.MULTILINE)
    cause = "plug-in 'plug_bad' of sad-plugin 1.2: ModuleNotFoundError: No module named 'nowhere_at_all'"
    assert cause in shown.stdout.splitlines()
    assert "retroexit has a command of that name" in shown.stdout
    assert shown.stderr.count("nowhere_at_all") == 1
    assert "Traceback" not in shown.stderr
    assert site.run("-m", "retroexit", "greet", "--name", "me").stdout == "hello me\n"
