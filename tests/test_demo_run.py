"""The demo from wrap to report, shortened."""

from __future__ import annotations

import functools
import json
import sys
from pathlib import Path

import pytest
import torch

from retroexit import api, cli
from retroexit.demo import run as demo
from retroexit.demo.generator import load_scene_generator, scene_inputs
from retroexit.demo.scenes import LABEL_COLOURS
from retroexit.errors import OptionError, WeightsError
from retroexit.evaluation.quality import MSSSIM


def test_the_demo_wraps_fits_and_reports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "fit", functools.partial(api.fit, predictor_steps=20, progress=False))
    monkeypatch.setattr(demo, "evaluate", functools.partial(api.evaluate, repeats=1, progress=False))
    said: list[str] = []
    model, result = demo.run_demo(
        tmp_path, metric="ms-ssim", steps=2, scenes=16, test_scenes=6, say=said.append, command="retroexit demo"
    )
    assert result.loss.shape == (6, 4)
    assert [e.attach_at for e in model.exits] == ["body.0", "body.1", "body.2", "body.3", ""]
    assert result.macs.tolist() == sorted(result.macs.tolist())
    text = "\n".join(said)
    assert "SceneGenerator with 4 early exits" in text
    assert "Quality loss (ms-ssim) of every exit to the backbone, on 6 scenes it was not fitted on" in text
    for k, mean in enumerate(result.loss.mean(0), 1):
        assert f"exit {k}: {mean:.3f}" in text
    assert f"report with pictures: {tmp_path / 'report/report.html'}" in text
    assert "retroexit demo" in (tmp_path / "report/report.html").read_text()
    assert json.loads((tmp_path / "report/evaluation.json").read_text())["metric"]["name"] == "ms-ssim"
    loaded = api.load(tmp_path / "ms-ssim", load_scene_generator())
    sample = tuple(x[None] for x in scene_inputs(1, 9)[0])
    with torch.no_grad():
        assert torch.equal(loaded(*sample, exit=2), model(*sample, exit=2))


def test_the_wrapped_generator_is_the_shipped_one_bit_for_bit() -> None:
    model, generator = demo.wrap_scene_generator(), load_scene_generator()
    sample = tuple(x[None] for x in scene_inputs(1, 3)[0])
    with torch.no_grad():
        torch.manual_seed(1)
        wanted = generator(*sample)
        torch.manual_seed(1)
        assert torch.equal(model(*sample), wanted)
    assert not model.generator.training


def test_lpips_without_weights_gives_way_to_ms_ssim_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    real = demo.resolve_metric

    def offline(name: str, weights: Path | None = None) -> object:
        if name.startswith("lpips"):
            raise WeightsError("alexnet-owt-7be5be79.pth cannot be downloaded")
        return real(name, weights)

    monkeypatch.setattr(demo, "resolve_metric", offline)
    said: list[str] = []
    assert isinstance(demo.pick_metric("auto", None, said.append), MSSSIM)
    (line,) = said
    assert "1 - MS-SSIM instead" in line and "reason: alexnet-owt-7be5be79.pth cannot be downloaded" in line
    with pytest.raises(WeightsError, match="cannot be downloaded"):
        demo.pick_metric("lpips-alex", None, said.append)
    with pytest.raises(OptionError, match="no quality metric 'psnr'"):
        demo.pick_metric("psnr", None, said.append)


def test_a_picture_shows_the_colour_of_every_class() -> None:
    labels, _ = scene_inputs(1, 2)[0]
    shown = demo.picture((labels, labels))
    assert shown.shape == (3, *labels.shape[1:])
    for row, column in ((0, 0), (10, 20), (labels.shape[1] - 1, labels.shape[2] - 1)):
        colour = LABEL_COLOURS[int(labels[:, row, column].argmax())] / 255
        assert shown[:, row, column].numpy() == pytest.approx(colour, abs=1e-6)


@pytest.mark.slow
def test_the_command_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["demo", "--steps", "2", "--scenes", "16", "--metric", "ms-ssim", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["retroexit", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert not ended.value.code
    assert "report with pictures" in capsys.readouterr().out
    assert f"retroexit {' '.join(arguments)}" in (tmp_path / "report/report.html").read_text()
