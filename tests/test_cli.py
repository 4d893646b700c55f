"""The command line, run in this process on a toy module written to a folder."""

from __future__ import annotations

import importlib
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

import retroexit
from retroexit import cli
from retroexit.training.branches import BranchTrainer

typer = pytest.importorskip("typer")

COMMANDS = ("demo", "inspect", "fit", "evaluate", "plugins", "doctor")
ROOT = Path(__file__).resolve().parents[1]

TOY = """
import torch
from torch import nn


class Stage(nn.Module):
    def __init__(self, up):
        super().__init__()
        self.conv = nn.Conv2d(12, 12, 3, padding=1)
        self.up = nn.Upsample(scale_factor=up)

    def forward(self, x):
        return self.up(torch.relu(self.conv(x)))


class Decoder(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(4, 12, 1)
        self.stages = nn.ModuleList([Stage(2), Stage(2), Stage(1)])
        self.rgb = nn.Conv2d(12, 3, 1)

    def forward(self, z):
        h = self.stem(z)
        for stage in self.stages:
            h = stage(h)
        return torch.tanh(3 * self.rgb(h))


def decoder():
    return Decoder()


def with_inputs():
    return Decoder(), torch.rand(1, 4, 4, 4)


def broken():
    raise RuntimeError("no weights here")


def number():
    return 3


def keyword_samples():
    return [{"z": z} for z in samples]


samples = torch.randn(12, 4, 4, 4, generator=torch.Generator().manual_seed(1))
few = samples[:5]
none = []
"""


@dataclass
class Result:
    status: int
    out: str
    err: str


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Run a command line beside a file ``toy.py``; gives exit status and what was printed."""
    (tmp_path / "toy.py").write_text(TOY)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))

    def call(*arguments: str) -> Result:
        capsys.readouterr()
        status: Any = 0
        try:
            cli.main(arguments)
        except SystemExit as end:
            status = end.code or 0
        printed = capsys.readouterr()
        if isinstance(status, str):  # as the interpreter does
            return Result(1, printed.out, printed.err + status + "\n")
        return Result(status, printed.out, printed.err)

    yield call
    for name in [name for name in sys.modules if str(tmp_path) in name]:
        del sys.modules[name]


FIT = (
    "fit",
    "toy.py:decoder",
    "--inputs",
    "toy.py:samples",
    "--attach-at",
    "1,2",
    "--scale",
    "1/2,3/4",
    "--min-channels",
    "4",
)
FAST = ("--metric", "ms-ssim", "--steps", "2", "--batch", "2", "--predictor-steps", "3")


def test_every_command_shows_one_example_that_it_understands(run: Any) -> None:
    listed = run("--help")
    assert listed.status == 0
    for command in COMMANDS:
        assert re.search(rf"^\s*{command}\s", listed.out, re.MULTILINE)
        shown = run(command, "--help")
        assert shown.status == 0
        (example,) = re.findall(r"^\s*Example: (.*)$", shown.out, re.MULTILINE)
        words = shlex.split(example)
        assert words[:2] == ["retroexit", command]
        for option in (word for word in words if word.startswith("--")):
            assert re.search(rf"^\s*{option}\b", shown.out, re.MULTILINE), option


def test_without_a_command_the_help_is_shown(run: Any) -> None:
    shown = run()
    assert "Usage: retroexit [OPTIONS] COMMAND" in shown.out + shown.err


def test_inspect_lists_the_stages(run: Any) -> None:
    for arguments in (("toy.py:with_inputs",), ("toy:decoder", "--shape", "1,4,4,4")):
        shown = run("inspect", *arguments)
        assert shown.status == 0, shown.err
        assert shown.out.startswith("Decoder, ")
        for row, size in (("stages.0", "8x8"), ("stages.1", "16x16"), ("stages.2", "16x16")):
            assert re.search(rf"^ *\d  {row} +Stage +{size} +12 ", shown.out, re.MULTILINE), row


def test_fit_and_evaluate_write_what_they_say(run: Any, tmp_path: Path) -> None:
    fitted = run(*FIT, *FAST, "--guidance", "--out", "run")
    assert fitted.status == 0, fitted.err
    assert "Decoder with 2 early exits" in fitted.out
    assert re.search(r"saved to run; predictor error on held-out inputs \d\.\d{4}\n$", fitted.out)
    assert (tmp_path / "run/model.json").exists()
    shown = run(
        "evaluate",
        "toy.py:decoder",
        "run",
        "--inputs",
        "toy.py:few",
        "--threshold",
        "0.25",
        "--threshold",
        "0.75",
    )
    assert shown.status == 0, shown.err
    assert re.search(r"^ +0.25 .*\n +0.75 ", shown.out, re.MULTILINE)
    assert shown.out.endswith("report: run/report/report.html\n")
    page = (tmp_path / "run/report/report.html").read_text()
    assert "retroexit evaluate toy.py:decoder run --inputs toy.py:few --threshold 0.25" in page
    assert len(json.loads((tmp_path / "run/report/evaluation.json").read_text())["loss"]) == 5


def test_samples_by_keyword_can_be_fitted(run: Any) -> None:
    arguments = [word if word != "toy.py:samples" else "toy.py:keyword_samples" for word in FIT]
    fitted = run(*arguments, *FAST, "--out", "run")
    assert fitted.status == 0, fitted.err


def test_a_dry_run_says_what_would_be_done_and_does_nothing(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(BranchTrainer, "advance", lambda trainer: pytest.fail("trained"))
    before = sorted(path for path in tmp_path.rglob("*") if "__pycache__" not in path.parts)
    shown = run(*FIT, *FAST, "--guidance", "--crop", "12", "--out", "deep/run", "--dry-run")
    assert shown.status == 0, shown.err
    assert "Decoder with 2 early exits" in shown.out
    assert "samples: 12, 10 to train branches on, 2 held out" in shown.out
    assert (
        "steps: 2 branches x 2, batches of 2 windows of 12 pixels; predictor 3; metric ms-ssim" in shown.out
    )
    # Per sample: features of 12 channels at 8x8 and 16x16, the value map at 16x16, an image of 3 channels at
    # 16x16.
    megabytes = 12 * 4 * (12 * (64 + 256 + 256) + 3 * 256) / 1e6
    assert (
        f"would write to deep/run: cache ({megabytes:.1f} MB), bank (up to 1,024 pairs), branches"
        in shown.out
    )
    assert shown.out.endswith("dry run: nothing was trained or written\n")
    assert sorted(path for path in tmp_path.rglob("*") if "__pycache__" not in path.parts) == before


def test_an_interrupted_fit_says_that_it_goes_on(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(trainer: BranchTrainer) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(BranchTrainer, "advance", stop)
        stopped = run(*FIT, *FAST, "--out", "run")
    assert (stopped.status, stopped.err) == (1, "interrupted; the same command goes on where it stopped\n")
    assert run(*FIT, *FAST, "--out", "run").status == 0


def _with(**changed: str) -> tuple[str, ...]:
    words = [*FIT, *FAST, "--out", "run"]
    for option, value in changed.items():
        words[words.index("--" + option.replace("_", "-")) + 1] = value
    return tuple(words)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("inspect", "toy"), "asked for 'toy'; found no ':'"),
        (("inspect", "nowhere:decoder"), "asked for 'nowhere:decoder'; found ModuleNotFoundError"),
        (("inspect", "nowhere.py:decoder"), "found FileNotFoundError: no file "),
        (("inspect", "toy.py:decoda"), "found AttributeError: .*'decoda'"),
        (
            ("inspect", "toy.py:broken"),
            "asked to call 'toy.py:broken'; found that it raised RuntimeError: no weights here",
        ),
        (("inspect", "toy.py:number"), "asked for the generator of 'toy.py:number'; found a int"),
        (("inspect", "toy.py:decoder"), "found no adapter that can make its inputs"),
        (
            ("inspect", "toy.py:decoder", "--shape", "1,x"),
            r"asked for --shape \['1,x'\]; found invalid literal",
        ),
        (("inspect", "toy.py:decoder", "--shape", "1,-4,4,4"), r"asked for --shape \['1,-4,4,4'\]"),
        (_with(scale="1/0"), "asked for --scale 1/0"),
        (_with(scale="wide"), "asked for --scale wide; found Invalid literal for Fraction: 'wide'"),
        (_with(scale="2"), "asked for scale=2.0"),
        (_with(scale="1/2"), None),
        (_with(scale="1/2,1/3,1/4"), "asked for 3 scales; found 2 attach points"),
        (_with(attach_at="7", scale="1"), "asked for a branch at stage 7; found stages 1 to 3"),
        (_with(attach_at="stages.9", scale="1"), "stages.9.*stages.2"),
        (_with(attach_at=","), "asked for .*; found .* attach point"),
        (_with(inputs="toy.py:none"), "found list without samples"),
        (_with(inputs="toy.py:number"), "found int without samples"),
        (_with(metric="psnr"), "no metric 'psnr'; closest: "),
        (_with(out="toy.py"), "toy.py"),
        ((*FIT, *FAST, "--out", "run", "--seed", "-1"), "asked for seed=-1"),
        ((*FIT, *FAST, "--out", "run", "--lr", "0"), "asked for lr=0.0"),
        ((*FIT, *FAST, "--out", "run", "--tap", "beside"), "asked for tap='beside'"),
        ((*FIT, *FAST, "--out", "run", "--init", "warm"), "asked for init='warm'"),
        (
            (*FIT, *FAST, "--out", "run", "--guidance", "--retriever", "fais"),
            "no retriever 'fais'; closest: 'faiss'",
        ),
        ((*FIT, *FAST, "--out", "run", "--crop", "5"), "asked for crops of 5 pixels"),
        (
            ("evaluate", "toy.py:decoder", "away", "--inputs", "toy.py:few"),
            "asked to load away; found no readable model.json",
        ),
    ],
)
def test_mistakes_end_with_one_line_and_status_1(
    run: Any, arguments: tuple[str, ...], message: str | None
) -> None:
    if message is None:  # one scale serves all exits
        assert run(*arguments).status == 0
        return
    failed = run(*arguments)
    assert failed.status == 1
    assert re.fullmatch(rf"error: .*{message}.*\n", failed.err), failed.err
    assert "Traceback" not in failed.err + failed.out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("fitt",), "No such command 'fitt'"),
        (("fit", "toy.py:decoder"), "Missing option '--inputs'"),
        ((*FIT, "--out", "run", "--steps", "0"), "Invalid value for '--steps'"),
        (("demo", "--scenes", "3"), "Invalid value for '--scenes'"),
    ],
)
def test_a_command_line_that_cannot_be_read_ends_with_status_2(
    run: Any, arguments: tuple[str, ...], message: str
) -> None:
    failed = run(*arguments)
    assert failed.status == 2
    assert message in failed.err


def test_other_settings_for_a_folder_are_refused_by_name(run: Any) -> None:
    assert run(*_with()).status == 0
    failed = run(*_with(steps="3"))
    assert failed.status == 1
    assert "error: asked to go on with the fit in run; found other settings: steps was 2, is 3." in failed.err


def test_a_file_is_not_mistaken_for_a_module_of_its_name(run: Any, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other/toy.py").write_text("from beside import decoder, samples\n")
    (tmp_path / "other/beside.py").write_text(
        TOY.replace("nn.Conv2d(4, 12, 1)", "nn.Conv2d(4, 12, 1, bias=False)")
    )
    (tmp_path / "json.py").write_text(TOY)
    counts = []
    for target in ("toy.py:decoder", "other/toy.py:decoder", "json.py:decoder"):
        shown = run("inspect", target, "--shape", "1,4,4,4")
        assert shown.status == 0, shown.err
        (count,) = re.findall(r"Decoder, ([\d,]+) parameters", shown.out)
        counts.append(int(count.replace(",", "")))
    sys.modules.pop("beside", None)
    assert counts[0] - counts[1] == 12
    assert counts[2] == counts[0]
    assert importlib.import_module("json") is json


def test_plugins_lists_our_own(run: Any) -> None:
    shown = run("plugins")
    assert shown.status == 0
    assert re.search(
        r"^builtin +retroexit +\S* +retroexit_metrics, retroexit_retrievers", shown.out, re.MULTILINE
    )


def test_doctor_reports_and_fails_where_something_is_broken(
    run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from retroexit import doctor

    ok, bad = (
        doctor.Check("torch", "ok", "2.15"),
        doctor.Check("faiss", "fail", "gone", "pip install faiss-cpu"),
    )
    monkeypatch.setattr(doctor, "diagnose", lambda: [ok])
    assert run("doctor") == Result(0, "ok    torch: 2.15\n", "")
    monkeypatch.setattr(doctor, "diagnose", lambda: [ok, bad])
    assert run("doctor") == Result(
        1, "ok    torch: 2.15\nfail  faiss: gone\n      pip install faiss-cpu\n", ""
    )


def test_doctor_runs_on_this_machine(run: Any) -> None:
    shown = run("doctor")
    assert f"torch: {torch.__version__}" in shown.out


def test_a_missing_typer_is_answered_with_the_pip_line(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "typer", None)
    try:
        importlib.reload(cli)
        failed = run("doctor")
    finally:
        monkeypatch.undo()
        importlib.reload(cli)
    assert failed.status == 1
    assert failed.err.startswith("error: the command line needs typer")
    assert failed.err.endswith("pip install 'retroexit[cli]'\n")


def test_warnings_of_ours_are_one_line_and_the_handler_is_put_back(
    run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import warnings

    from retroexit import doctor

    def warning() -> list[doctor.Check]:
        warnings.warn("mind the gap", retroexit.RetroExitWarning, stacklevel=1)
        return []

    monkeypatch.setattr(doctor, "diagnose", warning)
    handler = warnings.showwarning
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        assert run("doctor").err == "warning: mind the gap\n"
    assert warnings.showwarning is handler


def test_a_traceback_never_reaches_the_terminal(tmp_path: Path) -> None:
    code = "import sys; from retroexit.cli import main; main(['inspect', 'nowhere:thing'])"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, env=_environment()
    )
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith("error: asked for 'nowhere:thing'; found ModuleNotFoundError")
    assert done.stderr.count("\n") == 1


def _environment() -> dict[str, str]:
    import os

    return {**os.environ, "PYTHONPATH": str(ROOT)}


@pytest.mark.parametrize("file", ["README.md"])
def test_commands_and_code_in_the_readme_can_be_read(run: Any, file: str) -> None:
    text = (ROOT / file).read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert blocks
    for block in blocks:
        compile(block, file, "exec")
        for name in re.findall(r"retroexit\.(\w+)\(", block):
            assert callable(getattr(retroexit, name))
    helps = {command: run(command, "--help").out for command in COMMANDS}
    lines = [
        line
        for line in re.findall(
            r"`(retroexit [^`]+)`|^\s*(retroexit \S.*)$|&& (retroexit \w+)", text, re.MULTILINE
        )
    ]
    named = [next(filter(None, line)) for line in lines]
    assert {shlex.split(line)[1] for line in named} == set(COMMANDS)
    for line in named:
        command, *words = shlex.split(line)[1:]
        for option in (word for word in words if word.startswith("--")):
            assert option in helps[command], f"{line}: {option}"
