"""``retroexit fit --config`` and ``--dry-run``."""

import inspect
import json
import re
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import retroexit_oasis as oasis
import torch

import retroexit
from retroexit.api import wrap_options
from retroexit.training.settings import FitSettings

CONFIG = """
target = "toy.py:decoder"
inputs = "toy.py:samples"
attach-at = [1, 2]
scale = "1/2,3/4"
min_channels = 4
metric = "ms-ssim"
steps = 2
batch = 2
predictor-steps = 3
out = "run"
calibrate = 0.5
alpha = 0.5
confidence = 0.5
predictor = "linear"
latency = 1

[loss]
l1 = 0.5
quality = 2
"""


def _config(run, text, *words):
    Path("fit.toml").write_text(text)
    return run("fit", "--config", "fit.toml", *words)


def test_a_file_holds_all_options_and_typed_options_replace_its_values(run, tmp_path):
    _config(run, CONFIG).succeeds()
    saved = json.loads((tmp_path / "run/model.json").read_text())
    record = saved["about"]["fit"]
    assert saved["attach_at"] == ["stages.0", "stages.1"]
    assert record["losses"] == {"l1": 0.5, "quality": 2.0}
    assert (record["steps"], record["batch"], record["predictor_steps"]) == (2, 2, 3)
    assert (record["cache"], record["lr"]) == (True, None)
    words = ("--steps", "3", "--loss", "l1=1", "--attach-at", "2", "--scale", "1/2")
    _config(run, CONFIG, *words, "--ema", "0.5", "--clip", "0", "--out", "again").succeeds()
    saved = json.loads((tmp_path / "again/model.json").read_text())
    record = saved["about"]["fit"]
    assert saved["attach_at"] == ["stages.1"]
    assert (record["steps"], record["losses"]) == (3, {"l1": 1.0})
    assert (record["batch"], record["ema"], record["clip"]) == (2, 0.5, None)


def test_a_file_can_name_a_preset_and_tables_of_replacements(run):
    head = CONFIG.partition("[loss]")[0]
    more = (
        'loss = "megaportraits"\nequalise = true\ndiscriminator = "toy.py:Judge"\ngaze = "toy.py:Looks"\n'
        'adversarial = "non-saturating"\ndiscriminator-lr = 0.01\n[instead]\nvgg = "features-random"\n'
    )
    printed = _config(run, head + more, "--dry-run").succeeds()
    assert "non-saturating, lr 0.01" in printed and "predictor: linear, reads" in printed
    assert "times: calls with 1 samples" in printed
    assert "promise: P(loss > threshold) <= 0.5 with confidence 0.5" in printed
    words = ("--no-equalise", "--predictor", "pooled", "--loss", "l1=1", "--instead", "l1=quality")
    printed = _config(run, head + more, "--dry-run", *words).succeeds()
    assert "loss 1 quality" in printed and "predictor: pooled" in printed and "equalised" not in printed


def test_every_argument_and_setting_of_a_fit_is_an_option(run):
    shown = run("fit", "--help-all").out
    names = {*inspect.signature(retroexit.fit).parameters, *(field.name for field in fields(FitSettings))}
    names |= {*inspect.signature(wrap_options).parameters} - {"description", "sizes", "stages", "self_test", "seed"}
    for name in names - {"model", "folder", "progress", "settings"}:
        assert f"--{ {'losses': 'loss'}.get(name, name).replace('_', '-') }" in shown


def test_exits_of_a_generator_with_further_outputs_may_give_the_image_alone(run):
    options = {"target": "toy.py:stateful", "image": "image", "image_range": "-1,1", "attach_at": "1", "scale": "1/4"}
    printed = [run.fit("--dry-run", *more, **options).succeeds() for more in ((), ("--image-only",))]
    widths = [re.search(r"after stages\.0 .* \d+  (\d+(?: \d+)*)", text).group(1) for text in printed]
    assert widths == ["12 4 3", "4 3"]


@pytest.mark.parametrize(
    ("line", "status", "message"),
    [
        ("stepz = 3", 1, "no option 'stepz' for fit.toml; closest: 'steps'"),
        ("checkpoint_evry = 3", 1, "closest: 'checkpoint-every'"),
        ("steps = ", 1, "cannot read fit.toml: TOMLDecodeError: Invalid value"),
        ("ema = 1.0", 1, "ema"),
        ("steps = 2.5", 2, "Invalid value for '--steps'"),
        ("steps = true", 2, "Invalid value for '--steps'"),
        ("steps = 0", 2, "Invalid value for '--steps'"),
        ("bfloat16 = 'maybe'", 2, "Invalid value for '--bfloat16'"),
        ("lr = [1, 2]", 2, "Invalid value for '--lr'"),
        ("", 2, "Missing option '--out'"),
    ],
)
def test_mistakes_in_a_file_are_named(run, line, status, message):
    key = line.partition(" =")[0] or "out"
    rest = [part for part in CONFIG.splitlines() if part.partition(" =")[0] != key]
    failed = _config(run, "\n".join([line, *rest]))
    assert failed.status == status
    assert message in failed.err and "Traceback" not in failed.err
    run("fit", "--config", "away.toml").fails_with("cannot read away.toml: .*No such file")


def test_a_dry_run_prints_work_and_cost_and_writes_nothing(run, tmp_path):
    before = sorted(path for path in tmp_path.rglob("*") if "__pycache__" not in path.parts)
    losses = ("--loss", "l1=0.5", "--loss", "quality=2")
    printed = run.fit("--guidance", "--crop", "12", *losses, "--dry-run", out="deep/run").succeeds()
    # Per sample: features of 12 channels at 8x8 and 16x16, the value map and an image of 3 channels at 16x16.
    megabytes = 12 * 4 * (12 * (64 + 256 + 256) + 3 * 256) / 1e6
    for line in (
        "Decoder with 2 early exits",
        "samples: 12, 10 to train branches on, 2 held out",
        "steps: 2 branches x 2, batches of 2 windows of 12 pixels; predictor 3; metric ms-ssim",
        "metric ms-ssim; loss 0.5 l1 + 2 quality",
        f"would write to deep/run, with {megabytes:.1f} MB of cached features",
    ):
        assert line in printed
    assert re.search(
        r"cost: [\d.,]+ \w+ and \d+\.\d\d s a step of all branches, .* in all; about \d+ s and \d+ MB "
        r"besides the generator, from two steps on this machine\n",
        printed,
    )
    assert printed.endswith("dry run: nothing was trained or written\n")
    assert sorted(path for path in tmp_path.rglob("*") if "__pycache__" not in path.parts) == before
    printed = run.fit("--dry-run", min_channels="64").succeeds()
    assert "exit 1, 2: saves nothing" in printed


def test_a_dry_run_lists_every_term_with_its_network_and_the_source_of_its_weights(run):
    printed = run.fit(*run.FACE, "--dry-run").succeeds()
    opponent = r"Judge, a copy per branch: 2 x 117 parameters"  # 3 * 4 * 9 + 4 + 4 + 1
    for line in (
        rf"adversarial +1 +{opponent}, hinge, lr 0.0004 +toy.py:Judge",
        r"features-random +1 +vgg19 +random numbers, the same everywhere",
        r"quality +1 +ms-ssim",
        r"l1 +1",
        rf"feature-matching +1 +{opponent}, hinge, lr 0.0004 +toy.py:Judge",
        r"gaze +1 +Looks, 8 parameters +toy.py:Looks",
    ):
        assert re.search(rf"^{line} *$", printed, re.MULTILINE), (line, printed)
    assert re.search("equalised: .* first 50 steps", printed)
    plain = run.fit(*run.FACE, "--no-equalise", "--discriminator-lr", "0.001", "--dry-run").out
    assert "hinge, lr 0.001" in plain and "equalised" not in plain


def test_missing_weights_are_listed_and_refused_at_the_end(run, tmp_path, monkeypatch):
    def no_network(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setattr(torch.hub, "download_url_to_file", no_network)
    words = ("--loss", "oasis", "--discriminator", "toy.py:Judge")
    printed = run.fit(*words, "--dry-run")
    printed.fails_with("vgg19-dcbb9e9d.pth.*no network.*features-alex")
    assert re.search(r"^vgg +1 +not found, see below *$", printed.out, re.MULTILINE)
    assert "vgg, lpips not counted, since their weights were not found" in printed.out
    run.fit(*words).fails_with("vgg19-dcbb9e9d.pth")
    (tmp_path / "vgg19.pth").write_bytes(b"no weights")
    run.fit(*words, "--loss-weights", "vgg=vgg19.pth", "--dry-run").fails_with("vgg19.pth")
    assert not (tmp_path / "run").exists()


@pytest.mark.long
def test_a_trained_discriminator_is_loaded_from_a_file_into_the_adapters_network(run, tmp_path):
    (tmp_path / "city.py").write_text(
        "import torch, retroexit_oasis as o\n"
        "def make():\n    torch.manual_seed(0)\n    return o.OASISGenerator(6, 4, 2, (64, 64), 8)\n"
        "labels = torch.randint(6, (4, 8, 8), generator=torch.Generator().manual_seed(0))\n"
        "labels = labels.repeat_interleave(8, 1).repeat_interleave(8, 2)\n"
        "samples = [o.one_hot(x[None], 6)[0] for x in labels]\n"
    )
    torch.save(oasis.OASISDiscriminator(6).state_dict(), tmp_path / "D.pth")
    city = {"target": "city.py:make", "inputs": "city.py:samples", "attach_at": "4", "scale": "1/2", "batch": "1"}
    losses = ("--loss", "oasis", "--instead", "vgg=l1", "--instead", "lpips=quality", "--dry-run")
    printed = run.fit(*losses, "--discriminator", "D.pth", "--adapter", "oasis", **city).succeeds()
    size = sum(p.numel() for p in oasis.OASISDiscriminator(6).parameters())
    network = rf"OASISDiscriminator, a copy per branch: 1 x {size:,} parameters, oasis, lr 0.0004"
    assert re.search(rf"^adversarial +1 +{network} +D.pth *$", printed, re.MULTILINE), printed
    untrained = run.fit(*losses, **city)
    assert re.search(r"oasis, lr 0.0004 +none: as the adapter makes it, untrained", untrained.out)
    assert re.search("warning: .*OASISDiscriminator", untrained.err)
    run.fit(*losses, "--adapter", "none", **city).fails_with("discriminator")
    run.fit("--adapter", "oases", "--dry-run", **city).fails_with("no plug-in 'oases'; .*'oasis'")


def test_a_dry_run_refuses_impossible_processes(run, monkeypatch):
    run.fit("--devices", "3", "--dry-run").fails_with("batch.*3 processes")
    monkeypatch.setitem(sys.modules, "lightning_fabric", None)
    run.fit("--devices", "2", "--dry-run").fails_with("several devices need lightning-fabric")
