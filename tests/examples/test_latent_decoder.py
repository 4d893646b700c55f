"""The latent-decoder example: its layers fit the checkpoint, and the whole script runs."""

from __future__ import annotations

import functools
import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("latent_decoder", ROOT / "examples/latent_decoder.py")
    assert spec is not None and spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_decoder_turns_latents_into_images_of_eight_times_their_size(example: ModuleType) -> None:
    with torch.no_grad():
        assert example.decoder_layers().eval()(torch.zeros(1, 32, 4, 6)).shape == (1, 3, 32, 48)
        assert example.encoder_layers().eval()(torch.zeros(1, 3, 32, 48)).shape == (1, 32, 4, 6)


def test_the_weights_decode_what_they_encode(example: ModuleType, shared: Path) -> None:
    from PIL import Image

    street = shared / "data/street"
    name = (street / "test.txt").read_text().split()[0]
    photograph = np.array(Image.open(street / "256x128/image" / f"{name}.jpg").convert("RGB"))
    image = torch.from_numpy(photograph).permute(2, 0, 1)[None].float() / 255
    with torch.no_grad():
        again = example.load("decoder", shared)(example.load("encoder", shared)(image))
    assert float((again - image).abs().mean()) < 0.05


@pytest.mark.slow
def test_the_script_runs(
    example: ModuleType,
    shared: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for split in ("train", "test"):  # so that no photographs need to be encoded
        np.save(tmp_path / f"latents-{split}.npy", torch.randn(6, 32, 4, 8).numpy())
    fit, evaluate = example.retroexit.fit, example.retroexit.evaluate
    monkeypatch.setattr(example.retroexit, "fit", functools.partial(fit, predictor_steps=5))
    monkeypatch.setattr(example.retroexit, "evaluate", functools.partial(evaluate, repeats=1))
    words = [
        "--shared",
        str(shared),
        "--out",
        str(tmp_path),
        "--steps",
        "1",
        "--batch",
        "1",
        "--crop",
        "32",
        "--test",
        "3",
    ]
    monkeypatch.setattr(
        sys, "argv", ["latent_decoder.py", *words, "--attach-at", "6", "8", "--widths", "16", "32"]
    )
    example.main()
    said = capsys.readouterr().out
    assert "Sequential with 2 early exits" in said
    assert "threshold on the predicted loss of each sample" in said
    assert said.endswith(f"report: {tmp_path / 'report/report.html'}\n")
    assert len(json.loads((tmp_path / "report/evaluation.json").read_text())["loss"]) == 3
    assert (tmp_path / "report/settings.json").exists()
