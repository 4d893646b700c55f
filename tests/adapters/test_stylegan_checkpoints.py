"""Checkpoints of StyleGAN2 in two layouts: read without running code in them, or refused."""

import argparse
import itertools
import pickle
from pathlib import Path

import pytest
import retroexit_stylegan
import torch
from small import stylegan

from retroexit.errors import CheckpointError

convert = retroexit_stylegan.convert_rosinality
load_generator = retroexit_stylegan.load_generator


def to_rosinality(state):
    """Write a state in the other layout: its `g_ema` and `latent_avg`."""
    other = {"input.input": state["synthesis.b4.const"][None]}
    for i in itertools.takewhile(lambda i: f"mapping.fc{i}.weight" in state, itertools.count()):
        for what in ("weight", "bias"):
            other[f"style.{i + 1}.{what}"] = state[f"mapping.fc{i}.{what}"]
    blocks = [name.split(".")[1] for name in state if name.endswith("torgb.bias")]
    layers = ["b4.conv1", *(f"{block}.conv{j}" for block in blocks[1:] for j in (0, 1))]
    names = ["conv1", *(f"convs.{i}" for i in range(len(layers) - 1))]
    for i, (ours, theirs) in enumerate(zip(layers, names, strict=True)):
        layer = f"synthesis.{ours}"
        other[f"{theirs}.noise.weight"] = state[f"{layer}.noise_strength"][None]
        other[f"{theirs}.activate.bias"] = state[f"{layer}.bias"]
        other[f"noises.noise_{i}"] = state[f"{layer}.noise_const"][None, None]
        if ours.endswith("conv0"):
            other[f"{theirs}.conv.blur.kernel"] = 4 * state[f"{layer}.resample_filter"]
    names += ["to_rgb1", *(f"to_rgbs.{i}" for i in range(len(blocks) - 1))]
    layers += [f"{block}.torgb" for block in blocks]
    for ours, theirs in zip(layers, names, strict=True):
        other[f"{theirs}.conv.weight"] = state[f"synthesis.{ours}.weight"][None]
        for what in ("weight", "bias"):
            other[f"{theirs}.conv.modulation.{what}"] = state[f"synthesis.{ours}.affine.{what}"]
        if theirs.startswith("to_rgb"):
            other[f"{theirs}.bias"] = state[f"synthesis.{ours}.bias"].reshape(1, 3, 1, 1)
        if theirs.startswith("to_rgbs"):
            kernel = state[f"synthesis.{ours.split('.')[0]}.resample_filter"]
            other[f"{theirs}.upsample.kernel"] = 4 * kernel
    return other, state["mapping.w_avg"]


def save(state, path):
    if path.suffix == ".safetensors":
        pytest.importorskip("safetensors.torch").save_file(state, path)
    else:
        torch.save(state, path)
    return path


@pytest.mark.parametrize(
    ("suffix", "options"),
    [
        (".safetensors", {}),
        (".pth", {"c_dim": 5, "z_dim": 12}),
        (".pt", {"image_channels": 1, "num_mapping_layers": 8}),
        (".pth", {"resolution": 16, "channels": (16, 8, 24)}),
        (".pth", {"resolution": 4}),
    ],
    ids=["plain", "classes", "grey", "widths", "one block"],
)
def test_sizes_are_read_off_the_tensors(tmp_path, suffix, options):
    trained = stylegan(**options)
    loaded = load_generator(save(trained.state_dict(), tmp_path / f"weights{suffix}"))
    assert not loaded.training
    z = torch.randn(2, trained.z_dim)
    c = torch.eye(trained.c_dim)[:2] if trained.c_dim else None
    assert torch.equal(loaded(z, c, 0.7, 1), trained(z, c, 0.7, 1))


def written_by_train(generator):
    """Make what rosinality's ``train.py`` saves: networks, optimisers, its options, no mean style vector."""
    state, _ = to_rosinality(generator.state_dict())
    optimiser = torch.optim.Adam(generator.parameters(), lr=0.1)
    networks = {"g": state, "d": {"convs.0.weight": torch.zeros(1)}, "g_ema": state, "g_optim": optimiser.state_dict()}
    return networks | {"args": argparse.Namespace(path="lmdb", size=32, augment=False), "ada_aug_p": 0.0}


def test_checkpoints_of_rosinality_are_read_and_a_missing_mean_style_is_estimated(tmp_path):
    trained, z = stylegan(z_dim=6), torch.randn(2, 6)
    torch.save(written_by_train(trained), tmp_path / "550000.pt")
    generator, again = (load_generator(tmp_path / "550000.pt") for _ in range(2))
    assert torch.equal(generator(z), trained(z))
    styles = trained.mapping(torch.randn(20000, 6))[:, 0]
    error = styles.std(0) * (1 / 4096 + 1 / 20000) ** 0.5
    assert ((generator.mapping.w_avg - styles.mean(0)).abs() < 5 * error).all()
    assert torch.equal(generator.mapping.w_avg, again.mapping.w_avg)
    state, w_avg = to_rosinality(trained.state_dict())
    torch.save({"g_ema": state, "latent_avg": w_avg[None]}, tmp_path / "converted.pt")
    assert torch.equal(load_generator(tmp_path / "converted.pt")(z, None, 0.5), trained(z, None, 0.5))


class Payload:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return (Path.touch, (self.target,))


@pytest.mark.parametrize("writer", ["torch", "pickle", "train"])
def test_code_in_a_file_is_refused_and_does_not_run(tmp_path, writer):
    path, trace = tmp_path / "network.pkl", tmp_path / "trace"
    content = {"G_ema": Payload(trace), "training_set_kwargs": None}
    if writer == "train":
        content = written_by_train(stylegan())
        content["args"].extra = Payload(trace)
    if writer != "pickle":
        torch.save(content, path)
    else:
        path.write_bytes(pickle.dumps(content))
    with pytest.raises(CheckpointError, match="it must be a file of tensors and plain values only") as caught:
        load_generator(path)
    assert not trace.exists()
    _, read, write = str(caught.value).splitlines()[-3:]
    assert read == '    generator = legacy.load_network_pkl(open("network.pkl", "rb"))["G_ema"]'
    assert write == '    torch.save(generator.state_dict(), "network.pth")'


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"conv.weight": torch.zeros(1)}, r"must hold 'synthesis.b4.const'.*got \['conv.weight'\]"),
        ({"epoch": 3, "model": {}}, r"must hold a state dict, got \['epoch', 'model'\]"),
        ([torch.zeros(1)], "must hold a state dict, got list"),
    ],
)
def test_other_files_are_refused(tmp_path, content, message):
    torch.save(content, tmp_path / "other.pth")
    with pytest.raises(CheckpointError, match=message):
        load_generator(tmp_path / "other.pth")
    (tmp_path / "text.pth").write_text("not a checkpoint")
    with pytest.raises(CheckpointError, match="it must be a file of tensors and plain values only"):
        load_generator(tmp_path / "text.pth")
    with pytest.raises(FileNotFoundError):
        load_generator(tmp_path / "absent.pth")


@pytest.mark.parametrize("name", ["synthesis.b8.skip.weight", "synthesis.b4.torgb.bias"])
def test_another_architecture_is_refused_by_the_name_that_differs(tmp_path, name):
    state = stylegan().state_dict()
    if state.pop(name, None) is None:
        state[name] = torch.zeros(64, 64, 1, 1)
    with pytest.raises(CheckpointError, match=f"another architecture.*{name}"):
        load_generator(save(state, tmp_path / "other.pth"))


def test_a_state_of_another_layout_is_not_converted():
    state, _ = to_rosinality(stylegan().state_dict())
    with pytest.raises(ValueError, match=r"no tensor 'to_rgbs.0.bias' in the state, got 'synthesis.b4.const'"):
        convert({"synthesis.b4.const": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"foreign to rosinality's layout: 'latent_avg'\. Remove"):
        convert(state | {"latent_avg": torch.zeros(6)})
    del state["noises.noise_3"]
    with pytest.raises(ValueError, match=r"no tensor 'noises.noise_3' in the state; still unused: 'convs.2"):
        convert(state)
