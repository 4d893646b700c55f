"""The demo from wrap to report, with fewer steps."""

import functools
import json
import re

import pytest
import torch

from retroexit import api, cli
from retroexit.demo import run as demo
from retroexit.demo.generator import load_scene_generator, scene_inputs
from retroexit.errors import PluginError, WeightsError
from retroexit.metrics import MSSSIM
from retroexit.plugins import Host


def test_the_demo_command_wraps_fits_and_reports(tmp_path, monkeypatch, capsys):
    pytest.importorskip("typer")
    monkeypatch.setattr("retroexit.training.initialise._SAMPLES", [2])
    monkeypatch.setattr(demo, "ATTACH_AT", (1, 3))
    monkeypatch.setattr(demo, "SCALES", (1 / 4, 1 / 3))
    quick = {"steps": 2, "predictor_steps": 2, "progress": False}
    monkeypatch.setattr(demo, "fit", lambda *args, **settings: api.fit(*args, **settings | quick))
    monkeypatch.setattr(demo, "evaluate", functools.partial(api.evaluate, repeats=1, progress=False))
    made = []
    run_demo = demo.run_demo

    @functools.wraps(run_demo)  # the command reads the types of its options
    def shorter(*args, **kwargs):
        made.append(run_demo(*args, **kwargs))

    monkeypatch.setattr(demo, "run_demo", shorter)
    monkeypatch.setattr(demo, "TEST_SCENES", 3)
    arguments = ["demo", "--scenes", "16", "--metric", "ms-ssim", "--out", str(tmp_path)]
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    assert not ended.value.code
    ((model, result),) = made
    assert result.loss.shape == (3, 2)
    assert [e.attach_at for e in model.exits] == ["body.0", "body.2", ""]
    assert result.macs.tolist() == sorted(result.macs.tolist())
    printed = capsys.readouterr().out
    assert "gets 2 early exits" in printed and "pinned" not in printed
    assert "ms-ssim to the generator's image, mean over 3 other scenes" in printed
    assert re.search(r"saved -?\d+% of the compute at a mean loss of 0\.\d{3}", printed)
    assert printed.splitlines()[-1].startswith("next: retroexit inspect ")
    for k, mean in enumerate(result.loss.mean(0), 1):
        assert f"exit {k}: {mean:.3f}" in printed
    assert f"report with pictures: {tmp_path / 'report/report.html'}" in printed
    assert f"retroexit {' '.join(arguments)}" in (tmp_path / "report/report.html").read_text()
    assert json.loads((tmp_path / "report/evaluation.json").read_text())["metric"]["name"] == "ms-ssim"
    loaded = api.load(tmp_path / "ms-ssim", load_scene_generator())
    sample = tuple(x[None] for x in scene_inputs(1, 9)[0])
    with torch.no_grad():
        assert torch.equal(loaded(*sample, exit=2), model(*sample, exit=2))
        assert torch.equal(loaded(*sample), load_scene_generator()(*sample))


def test_without_lpips_weights_the_demo_uses_ms_ssim_and_prints_why(monkeypatch):
    real = Host.metric

    def offline(self, name, weights=None):
        if name.startswith("lpips"):
            raise WeightsError("alexnet-owt-7be5be79.pth cannot be downloaded")
        return real(self, name, weights)

    monkeypatch.setattr(Host, "metric", offline)
    lines = []
    assert isinstance(demo.pick_metric("auto", None, lines.append), MSSSIM)
    (line,) = lines
    assert "1 - MS-SSIM instead" in line and "reason: alexnet-owt-7be5be79.pth cannot be downloaded" in line
    with pytest.raises(WeightsError, match="cannot be downloaded"):
        demo.pick_metric("lpips-alex", None, lines.append)
    with pytest.raises(PluginError, match="no metric 'psnr'; closest: "):
        demo.pick_metric("psnr", None, lines.append)
