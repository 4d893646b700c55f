"""What all commands share: help, errors, plug-ins' commands, the documentation."""

from __future__ import annotations

import importlib.util
import re
import shlex
import sys
import warnings
from pathlib import Path
from typing import Annotated

import pytest
import typer

import retroexit
from retroexit import plugins
from retroexit.cli import doctor, options
from retroexit.cli.app import COMMANDS
from retroexit.errors import MissingExtraError

ROOT = Path(__file__).resolve().parents[2]


def test_every_command_shows_one_example_that_it_understands(run):
    listed = run("--help").succeeds()
    for command in COMMANDS:
        assert re.search(rf"^\s*{command}\s", listed, re.MULTILINE)
        shown = run(command, "--help").succeeds()
        (example,) = re.findall(r"^\s*Example: (.*)$", shown, re.MULTILINE)
        words = shlex.split(example)
        assert words[:2] == ["retroexit", command]
        for option in (word for word in words if word.startswith("--")):
            assert re.search(rf"^\s*{option}\b", shown, re.MULTILINE), option


def test_the_version_is_shown(run):
    assert run("--version").succeeds().startswith(f"retroexit {retroexit.__version__}, torch ")


def test_the_help_of_fit_has_few_options_in_groups_and_all_on_request(run):
    first, everything = run("fit", "--help").succeeds(), run("fit", "--help-all").succeeds()
    options = [set(re.findall(r"^ +(--[\w-]+)", text, re.MULTILINE)) for text in (first, everything)]
    assert len(options[0]) <= 25
    assert options[0] < options[1]
    assert re.findall(r"^(\w+):$", first, re.MULTILINE) == ["What", "Exits", "Training", "Quality"]
    assert "more options: --help-all" in first and "more options" not in everything


def test_the_page_of_the_configuration_has_every_option_of_fit(run):
    spec = importlib.util.spec_from_file_location("options_page", ROOT / "docs/options.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    text = script.PAGE.read_text()
    assert text == script.page(text), "run: python docs/options.py"
    options = set(re.findall(r"^ +--([\w-]+)", run("fit", "--help-all").succeeds(), re.MULTILINE))
    keys = set(re.findall(r"^\| `([\w-]+)` ", text, re.MULTILINE))
    assert options - keys == {"config", "dry-run", "help", "help-all"}


def test_commands_end_with_what_to_type_next(run):
    fitted = ("toy.py:decoder", "run", "--inputs", "toy.py:others")
    assert run.fit().next == "next: retroexit evaluate toy.py:decoder run --inputs mydata:test\n"
    calls = {
        "retroexit calibrate toy.py:decoder run --inputs mydata:calibration": ("evaluate", *fitted),
        "open run/report/report.html": ("report", "run"),
        "retroexit evaluate toy.py:decoder run": ("calibrate", *fitted, "--alpha", "0.4", "--confidence", "0.5"),
        "retroexit export toy.py:decoder run": ("evaluate", *fitted),
        "retroexit fit toy.py:with_inputs": ("inspect", "toy.py:with_inputs"),
        "retroexit fit --help-all": ("plugins",),
    }
    for line, words in calls.items():
        result = run(*words)
        result.succeeds()
        assert result.next.startswith(f"next: {line}"), words


def test_without_a_command_the_help_is_shown(run):
    shown = run()
    assert "Usage: retroexit [OPTIONS] COMMAND" in shown.out + shown.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("fitt",), "No such command 'fitt'"),
        (("fit", "toy.py:decoder"), "Missing option '--inputs'"),
        (("fit", "toy.py:decoder", "--steps", "0"), "Invalid value for '--steps'"),
        (("demo", "--scenes", "3"), "Invalid value for '--scenes'"),
    ],
)
def test_a_command_line_that_cannot_be_read_ends_with_status_2(run, arguments, message):
    failed = run(*arguments)
    assert failed.status == 2
    assert message in failed.err


class Command:
    """A plug-in's command, in the way that the host hands it over."""

    @staticmethod
    def greet(name: Annotated[str, typer.Argument(help="Whom.")] = "you") -> None:
        """Greet somebody.

        Example:
            retroexit greet me
        """
        typer.echo(f"hello {name}")

    @staticmethod
    def unreadable(thing: Unknown) -> None:  # type: ignore[name-defined]  # noqa: F821
        """Annotated with what nobody knows."""

    @staticmethod
    def unshowable(thing: Annotated[str, typer.Option(help=3)] = "") -> None:  # type: ignore[call-overload]
        """Documented with a number."""


def _offer(monkeypatch, **commands):
    class Offers:
        @plugins.hookimpl
        def retroexit_commands(self):
            return commands

    host = plugins.Host(discover=False)
    host.register(Offers(), "mine")
    monkeypatch.setattr("retroexit.cli.app.host", lambda: host)


def test_a_command_of_a_plugin_is_one_of_ours(run, monkeypatch):
    _offer(monkeypatch, greet=Command.greet)
    assert run("greet", "me").out == "hello me\n"
    shown = run("greet", "--help").out
    assert "Greet somebody." in shown
    assert "  Example: retroexit greet me\n" in shown


@pytest.mark.parametrize(
    ("name", "command", "cause"),
    [
        ("fit", Command.greet, "the command 'fit': retroexit has a command of that name"),
        ("odd", Command.unreadable, "the command 'odd': NameError: name 'Unknown' is not defined"),
        ("odd", Command.unshowable, "the command 'odd': .*Error"),
        ("odd", 3, "command 'odd' must be callable, got 3"),
    ],
)
def test_a_command_of_a_plugin_that_cannot_be_added_is_reported_and_left_out(run, monkeypatch, name, command, cause):
    _offer(monkeypatch, **{name: command})
    shown = run("--help")
    assert shown.status == 0
    assert re.fullmatch(r"warning: .*plug-in 'mine'.*\n", shown.err), shown.err
    assert re.search(cause, shown.err)
    assert not re.search(r"^\s*odd\s", shown.out, re.MULTILINE)
    run("doctor", "--help").succeeds()
    assert "--attach-at" in run("fit", "--help").out


def test_a_missing_typer_is_answered_with_the_pip_line(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "typer", None)
    failed = run("doctor")
    failed.fails_with("the command line needs typer")
    assert failed.err.endswith("pip install 'retroexit[cli]'\n")


def test_warnings_of_ours_are_one_line_and_the_handler_is_put_back(run, monkeypatch):
    def warning():
        warnings.warn("mind the gap", retroexit.RetroExitWarning, stacklevel=1)
        return []

    monkeypatch.setattr(doctor, "diagnose", warning)
    handler = warnings.showwarning
    assert run("doctor").err == "warning: mind the gap\n"
    assert warnings.showwarning is handler


def test_commands_in_the_documentation_can_be_read(run):
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    text = "\n".join(page.read_text() for page in pages).replace("\\\n", "")  # continued lines
    helps = {command: run(command, "--help-all" if command == "fit" else "--help").out for command in COMMANDS}
    pattern = r"`(retroexit [^`]+)`|^(?:\$ )?\s*(retroexit \S[^#\n]*)|&& (retroexit \w+)"
    named = [next(filter(None, line)) for line in re.findall(pattern, text, re.MULTILINE)]
    assert {shlex.split(line)[1] for line in named} >= set(COMMANDS)
    for line in named:
        command, *words = shlex.split(line)[1:]
        for option in (word for word in words if word.startswith("--")):
            assert command.startswith("-") or option in helps[command], f"{line}: {option}"


def test_the_option_ray_runs_a_command_inside_workers(run, monkeypatch):
    missing = MissingExtraError("workers need Ray Data: pip install 'retroexit[ray]'")
    counts = []

    def workers(count):
        counts.append(count)
        raise missing

    monkeypatch.setattr(options, "ray_workers", workers)
    inputs = ("--inputs", "mydata:test")
    for words in (
        ("fit", "m:d", *inputs, "--out", "o"),
        ("calibrate", "m:d", "o", *inputs),
        ("evaluate", "m:d", "o", *inputs),
        ("bank", "build", "m:d", *inputs, "--out", "o"),
    ):
        run(*words, "--ray", "3").fails_with(r"pip install 'retroexit\[ray\]'")
    assert counts == [3] * 4
