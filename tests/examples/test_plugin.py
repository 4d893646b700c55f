"""The example plug-in, installed into a fresh environment."""

import os
import re
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

PLUGIN = Path(__file__).resolve().parents[2] / "examples" / "plugin"

USE = """
import sys
import torch, retroexit
from retroexit_example import TokenDecoder

torch.manual_seed(0)
decoder = TokenDecoder(codes=16, channels=32, grid=(4, 4)).eval()
guidance = retroexit.Guidance(retriever="pca-tree", size=64)
options = {"min_channels": 4, "adapter": "example", "guidance": guidance}
model = retroexit.wrap(decoder, attach_at=[2, 3], scale=1 / 4, **options)
tokens = torch.randint(16, (8, 2, 4, 4))
settings = {"steps": 2, "batch": 2, "predictor_steps": 2, "progress": False}
retroexit.fit(model, tokens, sys.argv[1], metric="edges", **settings)
report = retroexit.evaluate(model, tokens, progress=False)
again = retroexit.load(sys.argv[1], decoder)
same = torch.equal(again(tokens, exit=1)["rgb"], model(tokens, exit=1)["rgb"])
print(type(again.bank.retriever).__name__, report.metric["name"], model.is_recorded, same)
"""


def run(python, *words, folder=None):
    environment = os.environ | {"PIP_DISABLE_PIP_VERSION_CHECK": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run([str(python), *words], capture_output=True, text=True, cwd=folder, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def python(tmp_path_factory):
    """Make an environment on top of this one, which nothing is downloaded for, and install the plug-in."""
    pytest.importorskip("pip", reason="pip installs the plug-in")
    pytest.importorskip("hatchling", reason="hatchling builds the plug-in")
    home = tmp_path_factory.mktemp("environment")
    venv.create(home, symlinks=os.name != "nt")
    where = {"base": str(home), "platbase": str(home)}
    python = Path(sysconfig.get_path("scripts", "venv", where), Path(sys.executable).name)
    below = {sysconfig.get_path(kind) for kind in ("purelib", "platlib")}
    lines = [f"import site; site.addsitedir({path!r})\n" for path in sorted(below)]
    Path(sysconfig.get_path("purelib", "venv", where), "below.pth").write_text("".join(lines))
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    run(python, "-m", "pip", "install", *options, str(PLUGIN))
    return python


@pytest.mark.slow
def test_the_installed_plugin_is_listed(python):
    pytest.importorskip("typer", reason="the command line needs it")
    shown = run(python, "-m", "retroexit", "plugins")
    hooks = "retroexit_build_stage, retroexit_describe, retroexit_metrics, retroexit_retrievers"
    assert re.search(rf"^example +retroexit-example-plugin +0\.1\.0 +in use +{hooks}$", shown, re.MULTILINE), shown
    assert re.search(r"^retroexit_metrics +example +edges$", shown, re.MULTILINE)
    assert re.search(r"^retroexit_retrievers +example +pca-tree$", shown, re.MULTILINE)


@pytest.mark.long
def test_everything_that_it_offers_is_used_by_name(python, tmp_path):
    used = run(python, "-W", "error::UserWarning", "-c", USE, str(tmp_path / "run"))
    assert used == "PCATreeRetriever edges True True\n"


@pytest.mark.slow
def test_its_own_tests_pass(python):
    shown = run(python, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(PLUGIN / "tests"), folder=PLUGIN)
    assert re.search(r"^\d+ passed", shown, re.MULTILINE), shown
