"""``retroexit fit``, ``calibrate``, ``evaluate`` and ``report`` on a toy."""

import json
import re

import numpy as np
import pytest
from PIL import Image

from retroexit.guidance import GuidanceBank
from retroexit.training.trainer import BranchTrainer

PROMISE = ("--alpha", "0.5", "--confidence", "0.5")
OTHERS = ("toy.py:decoder", "run", "--inputs", "toy.py:others", "--threshold", "0.2")


def _saved(folder, file="model.json"):
    return json.loads((folder / "run" / file).read_text())


def test_fit_and_evaluate_write_what_they_print(run, tmp_path):
    printed = run.fit("--guidance", "--image-range", "-1,1").succeeds()
    assert "Decoder with 2 early exits" in printed
    assert re.search(r"saved to run; predictor error on held-out inputs \d\.\d{4}\n$", printed)
    assert _saved(tmp_path)["options"]["image_range"] == [-1.0, 1.0]
    words = ("evaluate", "toy.py:decoder", "run", "--inputs", "toy.py:few")
    shown = run(*words, "--threshold", "0.25", "--threshold", "0.75").succeeds()
    assert re.search(r"^ +0.25 .*\n +0.75 ", shown, re.MULTILINE)
    assert "A threshold is what the predictor expects, not a promise" in shown
    assert shown.endswith("report: run/report/report.html\n")
    page = (tmp_path / "run/report/report.html").read_text()
    assert "retroexit evaluate toy.py:decoder run --inputs toy.py:few --threshold 0.25" in page
    assert len(json.loads((tmp_path / "run/report/evaluation.json").read_text())["loss"]) == 5


def test_pictures_of_a_folder_are_references(run, tmp_path):
    run.fit("--image-range", "-1,1").succeeds()
    (tmp_path / "photographs").mkdir()
    for number in range(4):
        Image.new("RGB", (16, 16), (60 * number, 0, 255)).save(tmp_path / f"photographs/{number}.png")
    words = ("evaluate", "toy.py:decoder", "run", "--inputs", "toy.py:few", "--threshold", "0.25", "--references")
    run(*words, "photographs").fails_with("must be one image for each of 5 samples, got 4. Pass them in the order")
    Image.new("RGB", (16, 16), (60 * 4, 0, 255)).save(tmp_path / "photographs/4.png")
    shown = run(*words, "photographs").succeeds()
    assert re.search(r"exit +MACs +PSNR +SSIM +ms-ssim", shown)
    assert re.search(r"\nbackbone +100.0 % +[\d.]+ +100.0 % ", shown) and re.search(r"\n<= 0.25 ", shown)
    assert _saved(tmp_path, "report/summary.json")["fidelity"][2]["exit"] == 3


def test_a_bank_made_beforehand_guides_the_fit(run, tmp_path):
    build = ("bank", "build", "toy.py:decoder", "--inputs", "toy.py:few", "--size", "16")
    run(*build, "--out", "made").succeeds()
    run.fit("--guidance", "--bank", "made").succeeds()
    made, used = (GuidanceBank.load(tmp_path / folder) for folder in ("made", next((tmp_path / "run").glob("bank-*"))))
    assert np.array_equal(made.retriever.keys, used.retriever.keys)
    run.fit("--bank", "made", out="other").fails_with("guidance")
    assert not (tmp_path / "other").exists()


def test_losses_width_rules_and_keyword_samples_are_chosen_by_name(run, tmp_path):
    chosen = ("--loss", "l1=0.5", "--loss", "quality=2", "--width-rule", "multiple-of-8")
    printed = run.fit(*chosen, inputs="toy.py:keyword_samples", scale="1/2").succeeds()
    assert re.search(r"^ +1  after stages.0 .* 8 3 *$", printed, re.MULTILINE)  # 6 by the paper's rule
    assert _saved(tmp_path)["about"]["fit"]["losses"] == {"l1": 0.5, "quality": 2.0}
    assert {rule["name"] for rule in _saved(tmp_path)["options"]["rules"]} == {"multiple-of-8"}


def test_a_preset_is_trained_on_with_replacements_discriminators_and_a_gaze_network(run, tmp_path):
    run.fit(*run.FACE, "--adversarial", "non-saturating").succeeds()
    record = _saved(tmp_path, "fit.json")
    terms = ["adversarial", "features-random", "quality", "l1", "feature-matching", "gaze"]
    assert list(record["losses"]) == terms and record["loss"]["equalise"] == 50
    assert record["loss"]["objective"] == "non-saturating"
    assert record["loss"]["discriminator_lr"] == 4e-4
    assert {"discriminator", "gaze"} < set(record["loss"])


def test_an_interrupted_fit_prints_how_to_continue(run, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(BranchTrainer, "advance", stop)
        stopped = run.fit()
    assert stopped.status == 1
    assert stopped.err.endswith("\ninterrupted; the same command continues where it stopped\n")
    run.fit().succeeds()


def test_a_folder_of_another_fit_is_refused(run):
    run.fit().succeeds()
    run.fit(steps="3").fails_with("steps.* 2, .* 3")
    run.fit("--lr", "0.1", "--dry-run").fails_with("lr was None, is 0.1")
    run.fit("--predictor", "linear", "--dry-run").succeeds()  # the predictor is trained anew


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--scale 1/0", "--scale must be numbers, got 1/0"),
        ("--scale wide", "--scale must be numbers, got wide. Write 1/15"),
        ("--attach-at 7 --scale 1", "7.*3"),
        ("--inputs toy.py:number", "int"),
        ("--out toy.py", "toy.py"),
        ("--weights x.pth", "ms-ssim.*weights"),
        ("--retriever faiss", "--retriever faiss needs guidance. Add --guidance"),
        ("--image-range 1", "--image-range must be two ascending numbers, got 1"),
        ("--image-range 1,0", "--image-range must be two ascending numbers, got 1,0"),
        ("--loss l1", "--loss must be name=value, once per name, got l1. Write l1=1, or"),
        ("--loss l1=1 --loss l1=2", "--loss must be name=value, once per name, got l1=2"),
        ("--loss l1=x", "weights of --loss must be numbers, got .*'l1': 'x'"),
        ("--loss oasys", "--loss must be name=value, .*, got oasys. Write l1=1, or one of oasis, mega"),
        ("--instead vgg", "--instead must be name=value, .*, got vgg. Write vgg=features-alex"),
        ("--loss adversarial=1 --discriminator D.pth", "adapter.* discriminator"),
        ("--gaze toy.py:number", "--gaze must be a torch.nn.Module or its factory, got a int"),
        ("--discriminator toy.py:broken", "raised RuntimeError: no weights here"),
        ("--calibrate 0.5", "59.*118"),
    ],
)
def test_mistakes_end_with_one_line_before_anything_is_written(run, tmp_path, words, message):
    run.fit(*words.split()).fails_with(message)
    assert not (tmp_path / "run").exists()


def test_a_fit_ends_with_promise_and_times(run, tmp_path):
    more = ("--calibrate", "0.5", "--latency", "2", "--predictor", "pooled", "--predict-from", "inputs")
    printed = run.fit(*more, *PROMISE).succeeds()
    assert "promise: P(ms-ssim > threshold) <= 0.5 with confidence 0.5 on inputs like the 6" in printed
    assert re.search(r"times of 2 samples on cpu.* threads: [\d.]+, [\d.]+, [\d.]+ ms, the backb", printed)
    saved = _saved(tmp_path)
    assert (saved["predictor"]["kind"], saved["predictor"]["reads"]) == ("pooled", "inputs")
    assert saved["about"]["inputs"] == 6 and saved["latency"]["batch"] == 2
    shown = run("evaluate", *OTHERS).succeeds()
    assert re.search(r"promise: P\(.*\n.*consistent *\n.*\n +0.2 .* \d+ of 12 .* (yes|no) *\n", shown)
    assert re.search(r"out-of-distribution guard: \d+ of 12 samples are out", shown)
    assert 'id="promise"' in (tmp_path / "run/report/report.html").read_text()


def test_a_model_is_calibrated_later(run, tmp_path):
    run("evaluate", "toy.py:decoder", "away", "--inputs", "toy.py:few").fails_with("away")
    run.fit().succeeds()
    run("calibrate", *OTHERS).fails_with("59.* 47 more")
    run("calibrate", *OTHERS, *PROMISE, "--rule", "strict").fails_with("'strict'")
    assert _saved(tmp_path)["calibration_sha256"] is None
    printed = run("calibrate", *OTHERS, *PROMISE, "--latency", "1").succeeds()
    assert re.search(r"threshold +predictions up to +saved +above *\n.*\n +0.2 +(none|[\d.]+) .* of 12", printed)
    assert "promise: P(ms-ssim > threshold) <= 0.5" in printed and printed.endswith("saved to run\n")
    assert "times of 1 sample on cpu" in printed
    assert _saved(tmp_path)["calibration_sha256"] is not None
    again = run("evaluate", *OTHERS)
    assert "calibrated on" in again.err and "promise: P(ms-ssim" in again.out


def test_a_model_is_calibrated_for_all_thresholds_or_by_groups(run, tmp_path):
    run.fit().succeeds()
    (tmp_path / "labels.py").write_text("drives = ['a', 'b', 'b'] * 4\n")
    run("calibrate", *OTHERS, *PROMISE, "--holds-for", "some").fails_with("--holds-for must be .* 'some'")
    run("calibrate", *OTHERS, *PROMISE, "--rule", "worst-group").fails_with("worst-group.*needs groups")
    printed = run("calibrate", *OTHERS, *PROMISE, "--holds-for", "all").succeeds()
    assert "for all thresholds together" in printed
    groups = ("--rule", "worst-group", "--groups", "labels.py:drives")
    printed = run("calibrate", *OTHERS, *PROMISE, *groups).succeeds()
    assert re.search(r"group left out .*\n.*\n +0.2 +a +4 .*\n +0.2 +b +8 ", printed)
    assert "no promise: at most 0.5 of each of 2 groups" in printed


def test_a_report_is_written_again_without_the_generator(run, tmp_path):
    run("report", "nowhere").fails_with(r"evaluation.json.*Run 'retroexit evaluate")
    assert not (tmp_path / "nowhere").exists()
    run.fit().succeeds()
    run("evaluate", "toy.py:decoder", "run", "--inputs", "toy.py:few").succeeds()
    folder = tmp_path / "run/report"
    before, numbers = (folder / "report.html").read_text(), (folder / "summary.json").read_text()
    (folder / "report.html").unlink()
    (tmp_path / "toy.py").unlink()
    printed = run("report", "run").succeeds()
    assert printed == "report: run/report/report.html\nnumbers: run/report/summary.json\n"
    assert (folder / "report.html").read_text() == before
    assert (folder / "summary.json").read_text() == numbers
    assert _saved(tmp_path)["weights_sha256"] in before and _saved(tmp_path)["fingerprint"] in before
    thresholds = ("--threshold", "0.3", "--threshold", "0.2")
    run("report", "run/report", "--out", "else", "--title", "Mine", *thresholds, "--unguided", "run").succeeds()
    page = (tmp_path / "else/report.html").read_text()
    assert "<h1>Mine</h1>" in page and "Dashed: the same exits without guidance." in page
    summary = json.loads((tmp_path / "else/summary.json").read_text())
    assert [row["threshold"] for row in summary["sweep"]] == [0.2, 0.3]
    pictures = re.findall(r'<img[^>]* src="data:image/png;base64,', page)
    assert len(pictures) == len(list((folder / "strips").glob("*.png"))) > 10
