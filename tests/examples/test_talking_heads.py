"""The talking-heads example: keys, retrieved frames, script."""

import json
import sys

import numpy as np
import pytest
import torch
from PIL import Image

SPLITS = {"train": ["a", "b"], "val": [], "test": ["c", "d"]}


@pytest.fixture(scope="module")
def example(imported):
    names = ("latent_decoder", "frames", "keys", "figures", "summary", "exits")
    with imported("talking_heads", "exits", *names[:-1]) as modules:
        yield modules.exits


@pytest.fixture
def drawn(shared, tmp_path):
    """A shared folder with the real weights, whose clips are moving squares and show nobody."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data/weights").symlink_to(shared.resolve() / "data/weights")
    random = np.random.default_rng(0)
    for name in "abcd":
        folder = tmp_path / "data/faces" / name
        folder.mkdir(parents=True)
        back = random.integers(0, 255, 3)
        for frame in range(10):
            image = np.tile(back, (64, 64, 1)).astype(np.uint8)
            image[20:44, 4 * frame : 4 * frame + 24] = 255 - back
            Image.fromarray(image).save(folder / f"{frame:04d}.jpg")
    clips = {"clips": {name: {} for name in "abcd"}, "splits": SPLITS}
    (tmp_path / "data/faces/clips.json").write_text(json.dumps(clips))
    return tmp_path


def test_a_key_depends_on_places_not_on_colours(example):
    frames = sys.modules["frames"]
    still = torch.randn(4, 16, 16)

    def moved(by):
        latent = still.clone()
        latent[:, 4:12, by : by + 6] += 3
        return latent

    clip = torch.stack([moved(by) for by in range(8)])
    key = frames.PoseKey.fitted([clip], people=3, components=3)
    there = key.pose(clip)
    near, far = (there[0] - there[1]).norm(), (there[0] - there[7]).norm()
    assert near < far / 2
    tinted = clip + torch.randn(4, 1, 1)  # somebody else: another colour all over, always the same
    assert torch.allclose(key.pose(tinted)[3] - key.pose(tinted)[0], there[3] - there[0], atol=1e-4)


def test_a_query_retrieves_another_frame_of_the_same_person(example, drawn, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["exits.py", "--shared", str(drawn), "--size", "64"])
    options = example.parse()
    clips = example.Clips(drawn, tmp_path / "out", 64)
    latents = [clips.latents(name) for name in SPLITS["train"]]
    key = example.PoseKey.fitted(latents, len(clips.names))
    model = example.wrapped(options, key, 64)  # as wide as the decoder: no widths to look for
    inputs = clips.samples("train", "bank")
    bank = example.bank_of(model, inputs, tmp_path / "bank")
    assert len(bank) == len(inputs) == 12
    for latent, clip in clips.samples("train", "queries"):
        neighbours = bank.search(key(latent[None], clip[None])[..., None, None])
        frame, source_clip = inputs[int(bank.source[neighbours.ids])]
        assert source_clip == clip
        assert not torch.equal(frame, latent)
        assert float(neighbours.distances) < 100
    nobody = example.misleading(bank, 4, same_person=False)
    owner = bank.retriever.keys[:, -4:].argmax(1)
    for row, one in enumerate(owner):
        others = np.asarray(bank.values)[owner != one]
        assert any(np.array_equal(nobody.values[row], other) for other in others)


@pytest.mark.long
def test_the_script_runs_and_resumes(example, drawn, tmp_path, run_script):
    out = tmp_path / "out"
    words = f"--shared {drawn} --out {out} --size 64 --attach-at 6 8 --widths 8 --plain 8 --train-every 1"
    words += " --steps 1 --batch 1 --crop 32 --predictor-steps 5 --repeats 1"
    printed = run_script(example, words)
    assert "TalkingHead with 2 early exits" in printed
    assert "any frame of the same person" in printed
    assert "frames of 2 people at" in printed
    assert "rank correlation of the distance to the guide" in printed
    # Those of one scale factor, then those of all.
    figures = ["figure-7-width-8.svg", "figure-10-width-8.svg", "figure-6.svg", "talking-heads.png"]
    assert printed.strip().splitlines()[-1] == "figures: " + ", ".join(str(out / name) for name in figures)
    assert all((out / name).stat().st_size > 5000 for name in figures)
    again = run_script(example, words)  # nothing is fitted again
    assert "early exits" not in again
    assert again in printed
