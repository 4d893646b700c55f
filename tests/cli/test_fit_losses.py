"""``retroexit fit`` with the losses of the paper: presets, stand-ins, discriminators, what a dry run says."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

FIT = (
    *("fit", "toy.py:decoder", "--inputs", "toy.py:samples", "--attach-at", "1,2", "--scale", "1/2,3/4"),
    *("--min-channels", "4", "--metric", "ms-ssim", "--steps", "2", "--batch", "2", "--predictor-steps", "3"),
    *("--out", "run"),
)
FACE = (
    *("--loss", "megaportraits", "--instead", "vgg=features-random", "--instead", "ms-ssim=quality"),
    *("--discriminator", "toy.py:Judge", "--gaze", "toy.py:Looks"),
)
TERMS = ["adversarial", "features-random", "quality", "l1", "feature-matching", "gaze"]


def _record(folder: Path) -> Any:
    return json.loads((folder / "run/fit.json").read_text())


def test_a_preset_is_trained_on_with_stand_ins_opponents_and_a_gaze_network(run: Any, tmp_path: Path) -> None:
    fitted = run(*FIT, *FACE, "--equalise-steps", "1", "--adversarial", "non-saturating")
    assert fitted.status == 0, fitted.err
    found = _record(tmp_path)
    assert list(found["losses"]) == TERMS and found["loss"]["equalise"] == 1
    assert found["loss"]["objective"] == "non-saturating"
    assert found["loss"]["discriminator_lr"] == 4e-4
    assert {"discriminator", "gaze"} < set(found["loss"])


def test_a_dry_run_lists_every_term_with_its_network_and_where_its_weights_come_from(
    run: Any, tmp_path: Path
) -> None:
    shown = run(*FIT, *FACE, "--dry-run")
    assert shown.status == 0, shown.err
    opponent = r"Judge, a copy per branch: 2 x 117 parameters"  # 3 * 4 * 9 + 4 + 4 + 1
    for line in (
        rf"adversarial +1 +{opponent}, hinge, lr 0.0004 +toy.py:Judge",
        r"features-random +1 +vgg19 +random numbers, the same everywhere",
        r"quality +1 +ms-ssim",
        r"l1 +1",
        rf"feature-matching +1 +{opponent}, hinge, lr 0.0004 +toy.py:Judge",
        r"gaze +1 +Looks, 8 parameters +toy.py:Looks",
    ):
        assert re.search(rf"^{line}$", shown.out, re.MULTILINE), (line, shown.out)
    assert "equalised: weights are multiplied by what the first 50 steps show" in shown.out
    assert re.search(r"^cost: [\d.,]+ \w+ and .* MB besides the generator", shown.out, re.MULTILINE)
    assert not (tmp_path / "run").exists()
    plain = run(*FIT, *FACE, "--no-equalise", "--discriminator-lr", "0.001", "--dry-run")
    assert "hinge, lr 0.001" in plain.out and "equalised" not in plain.out


def test_a_dry_run_counts_the_discriminators(run: Any) -> None:
    def macs(*words: str) -> float:
        shown = run(*FIT, *words, "--dry-run")
        number, unit = re.search(r"cost: ([\d.,]+) (\w+) and", shown.out).groups()  # type: ignore[union-attr]
        return float(number.replace(",", "")) * {"MMACs": 1, "GMACs": 1000, "kMACs": 1e-3}[unit]

    alone = macs("--loss", "l1=1")
    both = macs("--loss", "l1=1", "--loss", "adversarial=1", "--discriminator", "toy.py:Judge")
    # Judge: 16x16 pixels x (3 * 4 * 9 + 4) MACs, 2 images, 2 branches. Forward and to the image in the
    # branch's step; real and fake, each forward and to the weights, and to the 4 maps between, in its own.
    first, second = 256 * 108, 256 * 4
    step = 2 * 2 * ((first + second) * 2 + 2 * (2 * first + 3 * second))
    assert both - alone == pytest.approx(step / 1e6, abs=0.11)


def test_missing_weights_are_listed_and_refused_at_the_end(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_network(*_: object, **__: object) -> None:
        raise OSError("no network")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setattr(torch.hub, "download_url_to_file", no_network)
    words = (*FIT, "--loss", "oasis", "--discriminator", "toy.py:Judge")
    shown = run(*words, "--dry-run")
    shown.fails_with("the loss 'vgg' needs vgg19-dcbb9e9d.pth.*no network.*Other networks: 'features-alex'")
    assert re.search(r"^vgg +1 +not found, see below$", shown.out, re.MULTILINE)
    assert "vgg, lpips not counted, since their weights were not found" in shown.out
    run(*words).fails_with("the loss 'vgg' needs vgg19-dcbb9e9d.pth")
    assert not (tmp_path / "run").exists()
    (tmp_path / "vgg19.pth").write_bytes(b"no weights")
    run(*words, "--loss-weights", "vgg=vgg19.pth", "--dry-run").fails_with("vgg19.pth is not a weight file")


def test_a_trained_discriminator_comes_from_a_file_for_the_adapters_own(run: Any, tmp_path: Path) -> None:
    oasis = pytest.importorskip("retroexit_oasis")
    (tmp_path / "city.py").write_text(
        "import torch, retroexit_oasis as o\n"
        "def make():\n    torch.manual_seed(0)\n    return o.OASISGenerator(6, 4, 2, (64, 128), 8)\n"
        "labels = torch.randint(6, (4, 8, 16), generator=torch.Generator().manual_seed(0))\n"
        "labels = labels.repeat_interleave(8, 1).repeat_interleave(8, 2)\n"
        "samples = [o.one_hot(x[None], 6)[0] for x in labels]\n"
    )
    torch.save(oasis.OASISDiscriminator(6).state_dict(), tmp_path / "D.pth")
    words = [word.replace("toy.py:decoder", "city.py:make").replace("toy.py:", "city.py:") for word in FIT]
    words[words.index("1,2")], words[words.index("1/2,3/4")] = "1", "1/2"
    stand_in = ("--loss", "oasis", "--instead", "vgg=l1", "--instead", "lpips=quality")
    shown = run(*words, *stand_in, "--discriminator", "D.pth", "--adapter", "oasis", "--dry-run")
    assert shown.status == 0, shown.err
    size = sum(p.numel() for p in oasis.OASISDiscriminator(6).parameters())
    told = rf"OASISDiscriminator, a copy per branch: 1 x {size:,} parameters, oasis, lr 0.0004 +D.pth$"
    assert re.search(rf"^adversarial +1 +{told}", shown.out, re.MULTILINE), shown.out
    untrained = run(*words, *stand_in, "--dry-run")
    assert "oasis, lr 0.0004  none: as the adapter makes it, untrained" in untrained.out
    assert "warning: the discriminator OASISDiscriminator is untrained" in untrained.err
    run(*words, *stand_in, "--adapter", "none", "--dry-run").fails_with(
        "'adversarial' needs a discriminator, got none"
    )
    run(*words, "--adapter", "oases", "--dry-run").fails_with("no plug-in 'oases'; installed: .*'oasis'")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--loss", "oasys"), "asked for --loss oasys; found no weight behind a '='.*or one of oasis, mega"),
        (("--loss", "oasis", "--loss", "l1=1"), "asked for --loss oasis; found no weight behind a '='"),
        (
            ("--instead", "vgg"),
            "asked for --instead vgg; found nothing behind a '='. Write vgg=features-alex",
        ),
        (("--instead", "vgg=l1"), "the losses l1, quality by another one, got 'l1' instead of 'vgg'"),
        (
            ("--loss-weights", "vgg=x.pth"),
            "loss_weights must name one of l1, quality, got 'vgg'",
        ),
        (
            ("--loss", "adversarial=1", "--discriminator", "none"),
            "'adversarial' needs a discriminator, got none",
        ),
        (("--loss", "adversarial=1", "--discriminator", "D.pth"), "no adapter makes a discriminator"),
        (("--loss", "gaze=1"), "the loss 'gaze' needs a gaze network, got none"),
        (("--gaze", "toy.py:number"), "asked for --gaze toy.py:number; found a int. The factory returns"),
        (("--discriminator", "toy.py:broken"), "found that it raised RuntimeError: no weights here"),
        (("--no-equalise", "--equalise-steps", "3"), "--no-equalise and --equalise-steps 3; found that they"),
        ((*FACE, "--adversarial", "best"), "of_discriminator, got 'best'"),
    ],
)
def test_losses_that_cannot_be_had_are_refused_by_a_dry_run(
    run: Any, tmp_path: Path, words: tuple[str, ...], message: str
) -> None:
    run(*FIT, *words, "--dry-run").fails_with(message)
    assert not (tmp_path / "run").exists()


def test_a_file_holds_all_of_it_and_options_go_before_it(run: Any, tmp_path: Path) -> None:
    (tmp_path / "fit.toml").write_text(
        'target = "toy.py:decoder"\ninputs = "toy.py:samples"\nattach-at = "1,2"\nscale = 0.5\n'
        'min-channels = 4\nmetric = "ms-ssim"\nout = "run"\nloss = "megaportraits"\nequalise = true\n'
        'discriminator = "toy.py:Judge"\ngaze = "toy.py:Looks"\nadversarial = "non-saturating"\n'
        'discriminator-lr = 0.01\npredictor = "linear"\nlatency = 1\n'
        'calibrate = 0.5\nalpha = 0.5\nconfidence = 0.5\n[instead]\nvgg = "features-random"\n'
    )
    shown = run("fit", "--config", "fit.toml", "--dry-run")
    assert shown.status == 0, shown.err
    assert "non-saturating, lr 0.01" in shown.out and "predictor: linear, reads" in shown.out
    assert "times: calls with 1 samples" in shown.out
    assert "promise: P(loss > threshold) <= 0.5 with confidence 0.5" in shown.out
    words = ("--adversarial", "hinge", "--no-equalise", "--predictor", "pooled")
    shown = run(
        "fit", "--config", "fit.toml", "--dry-run", *words, "--loss", "l1=1", "--instead", "l1=quality"
    )
    assert shown.status == 0, shown.err
    assert "loss 1 quality" in shown.out and "predictor: pooled" in shown.out
    assert "equalised" not in shown.out


def test_a_dry_run_refuses_a_folder_of_another_fit_and_processes_that_cannot_be(
    run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(*FIT).status == 0
    run(*FIT, "--lr", "0.1", "--dry-run").fails_with("other settings: lr was 0.004, is 0.1")
    assert run(*FIT, "--predictor", "linear", "--dry-run").status == 0, "the predictor is trained anew"
    run(*FIT, "--devices", "3", "--dry-run").fails_with("batch must be a multiple of 3 processes, got 2")
    monkeypatch.setitem(sys.modules, "lightning_fabric", None)
    run(*FIT, "--devices", "2", "--dry-run").fails_with("2 devices need lightning-fabric")
