"""``retroexit inspect`` on a toy: output, files and errors."""

import importlib
import json
import re
import shlex
import sys

import pytest

import retroexit


def test_inspect_shows_the_tree_with_the_stages_in_it(run):
    for arguments in (("toy.py:with_inputs",), ("toy:decoder", "--shape", "1,4,4,4")):
        shown = run("inspect", *arguments).succeeds()
        assert shown.startswith("Decoder, ")
        assert " for z 1x4x4x4\n" in shown
        for row, size in (("stages.0", "8x8"), ("stages.1", "16x16"), ("stages.2", "16x16")):
            assert re.search(rf"^ *\d[* ] +{row} +Stage +{size} +12 ", shown, re.MULTILINE), row
        for beside in ("stem +Conv2d", "rgb +Conv2d"):
            assert re.search(rf"^ +{beside} ", shown, re.MULTILINE), beside
        assert re.search(r"^thop   \d\.\d+ MMACs for the backbone, 1\.\d+ of ours", shown, re.MULTILINE)


def test_the_suggested_exits_come_with_lines_that_run(run):
    result = run("inspect", "toy.py:sized", "--args", "4, name='x'", "--shape", "1,4,4,4")
    shown = result.succeeds()
    starred = re.findall(r"^ *(\d)\* ", shown, re.MULTILINE)
    assert "  model = retroexit.wrap(generator)\n" in shown
    (places,) = re.findall(r"add attach_at=(\[.*?\]), scale=1 / 4", shown)
    assert json.loads(places) == list(map(int, starred)) == [1, 2]
    (command,) = re.findall(r"^next: retroexit (fit .*)$", result.next, re.MULTILINE)
    words = shlex.split(command.replace("mydata:train", "toy.py:samples"))
    fitted = run(*words, "--metric", "ms-ssim", "--dry-run").succeeds()
    assert re.search(r"Decoder with \d early exits?\n", fitted)
    assert "saves nothing" not in fitted


def test_inspect_times_the_stages(run):
    result = run("inspect", "toy.py:with_inputs", "--time")
    shown = result.succeeds()
    assert re.search(r"share +up to +time +up to +saves", shown)
    assert "time   share of the measured time" in shown
    starred = re.findall(r"^ *(\d)\* ", shown, re.MULTILINE)
    assert "retroexit.wrap(generator, timed=True)" in shown and f"--attach-at {','.join(starred)}" in result.next


@pytest.mark.parametrize(
    ("arguments", "inputs"),
    [
        (("toy.py:with_keywords",), "z 1x4x4x4"),
        (("toy.py:with_dict",), "z 2x4x4x4"),
        (("toy.py:ready", "--shape", "1x4x4x4"), "z 1x4x4x4"),
        (("toy.py:Decoder", "--shape", "z=3,4,4,4"), "z 3x4x4x4"),
        (("toy.py:Labelled", "--shape", "2,4,4,4", "--shape", "label=2:int"), "z 2x4x4x4, label 2"),
        (("toy.py:sized", "--args", "7, False", "--shape", "1,7,4,4"), "z 1x7x4x4"),
    ],
)
def test_ways_to_name_a_generator_and_its_inputs(run, arguments, inputs):
    shown = run("inspect", *arguments).succeeds()
    assert shown.splitlines()[0].endswith(f" for {inputs}")


def test_the_picture_and_the_facts_are_written_where_asked(run, tmp_path):
    pytest.importorskip("matplotlib")
    shown = run("inspect", "toy.py:with_inputs", "--picture", "d.svg", "--json", "d.json").succeeds()
    assert "\npicture: d.svg\nfacts: d.json\n" in shown
    picture = (tmp_path / "d.svg").read_text()
    assert "Decoder: 3 stages, " in picture
    facts = json.loads((tmp_path / "d.json").read_text())
    sys.path.insert(0, str(tmp_path))
    toy = importlib.import_module("toy")
    generator, z = toy.with_inputs()
    stages = retroexit.find_stages(generator.eval(), (z,))
    assert facts["generator"] == "Decoder"
    assert facts["inputs"] == {"z": [1, 4, 4, 4]}
    assert facts["parameters"] == sum(p.numel() for p in generator.parameters())
    assert facts["macs"] == round(stages[0].macs / stages[0].share)
    assert facts["replayed"] == ""
    assert facts["suggested"] == [stage.index for stage in stages if stage.is_suggested]
    for row, stage in zip(facts["stages"], stages, strict=True):
        assert (row["path"], row["macs"], row["shape"]) == (stage.path, stage.macs, list(stage.shape))
        assert row["saves"] == pytest.approx(1 - stage.cumulative)
    assert [part["stage"] for part in facts["tree"]] == [None, None, 1, 2, 3, None]


def test_a_file_is_not_mistaken_for_a_module_of_its_name(run, tmp_path):
    toy = (tmp_path / "toy.py").read_text()
    (tmp_path / "other").mkdir()
    (tmp_path / "other/toy.py").write_text("from beside import decoder, samples\n")
    (tmp_path / "other/beside.py").write_text(toy.replace("nn.Conv2d(4, 12, 1)", "nn.Conv2d(4, 12, 1, bias=False)"))
    (tmp_path / "json.py").write_text(toy)
    counts = []
    for target in ("toy.py:decoder", "other/toy.py:decoder", "json.py:decoder"):
        shown = run("inspect", target, "--shape", "1,4,4,4").succeeds()
        (count,) = re.findall(r"Decoder, ([\d,]+) parameters", shown)
        counts.append(int(count.replace(",", "")))
    sys.modules.pop("beside", None)
    assert counts[0] - counts[1] == 12
    assert counts[2] == counts[0]
    assert importlib.import_module("json") is json


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("toy",), "no ':' with a name after it in 'toy'. Write package.module:factory"),
        (("nowhere:decoder",), "'nowhere:decoder' cannot be imported: ModuleNotFoundError.*in the module's folder"),
        (("nowhere.py:decoder",), "FileNotFoundError: no file .*Check the path"),
        (("lacking.py:decoder",), "No module named 'nosuchpackage'. .* imports nosuchpackage: install"),
        (("mistaken.py:decoder",), "ZeroDivisionError: .*Correct the module"),
        (("toy.py:decoda",), "no 'decoda' in toy.py; closest: 'decoder'"),
        (("toy.py:broken",), r"toy.py:broken\(\) raised RuntimeError: no weights here. Check the factory"),
        (("toy.py:number",), "'toy.py:number' must be or return a torch.nn.Module, .* got int"),
        (("toy.py:wrong_keywords",), "dict of keyword inputs., got Decoder, tuple, int"),
        (("toy.py:sized",), r"takes .width, .*got \(\): missing a .*'width'. Pass .* --args"),
        (("toy.py:sized", "--args", "4, wide=1"), r"got \(4, wide=1\): .*'wide'"),
        (("toy.py:sized", "--args", "x"), "must be Python literals as in a call, got 'x'. .*quote texts"),
        (("toy.py:sized", "--args", "4,,"), "must be Python literals as in a call, got '4,,'"),
        (("toy.py:sized", "--args", "**{'width': 4}"), "must be Python literals as in a call"),
        (("toy.py:ready", "--args", "4"), "must be a factory .* got a Decoder. Leave --args out"),
        (("toy.py:decoder",), r"\(z\).*--shape 1,32,16,32"),
        (("toy.py:decoder", "--shape", "1,x"), "--shape 1,x cannot be read: invalid literal"),
        (("toy.py:decoder", "--shape", "1,-4,4,4"), "--shape 1,-4,4,4 cannot be read: .*Write 1,32,16,32"),
        (("toy.py:decoder", "--shape", "1,4:nn"), "--shape 1,4:nn cannot be read: .*'torch.nn'"),
        (("toy.py:with_inputs", "--picture", "d.gif"), ".svg.*'d.gif'"),
        (("toy.py:with_inputs", "--json", "no/d.json"), "no folder 'no' for --json no/d.json. Make it first"),
    ],
)
def test_mistakes_end_with_one_line_and_status_1(run, tmp_path, arguments, message):
    (tmp_path / "lacking.py").write_text("import nosuchpackage\n")
    (tmp_path / "mistaken.py").write_text("1 / 0\n")
    run("inspect", *arguments).fails_with(message)


def test_without_matplotlib_a_picture_is_answered_with_the_pip_line(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    failed = run("inspect", "toy.py:with_inputs", "--picture", "d.svg")
    failed.fails_with("matplotlib")
    assert failed.err.endswith("pip install 'retroexit[report]'\n")
    run("inspect", "toy.py:with_inputs").succeeds()
