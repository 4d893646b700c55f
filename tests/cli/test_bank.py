"""``retroexit bank``: build and info."""

import re

import pytest
import torch

from retroexit.guidance import GuidanceBank

BUILD = ("bank", "build", "toy.py:decoder", "--inputs", "toy.py:samples", "--out", "made", "--size", "40")


@pytest.mark.parametrize("thin", ["fps", "kmeans", "random"])
def test_build_and_info_agree(run, thin):
    built = run(*BUILD, "--thin", thin, "--retriever", "faiss", "--batch", "5").succeeds()
    assert built.endswith("saved to made\n")
    shown = run("bank", "info", "made")
    assert shown.out == built.removesuffix("saved to made\n")
    assert re.search(r"^pairs: +40 from \d+ inputs$", shown.out, re.MULTILINE)
    assert re.search(rf"^thinning: +{thin} of 768 candidates, 768 seen, seed 0$", shown.out, re.MULTILINE)
    assert re.search(r"^coverage: +radius [\d.]+, mean distance", shown.out, re.MULTILINE)


def test_a_bank_of_all_keys_guides_its_inputs_with_their_values(run):
    run(*BUILD, "--thin", "none", "--batch", "5", "--patch", "2", "--value-after", "2").succeeds()
    # The stage repeats every location 2x2, so that keys of single locations would occur more than once.
    from toy import Decoder, samples  # the file beside which commands run

    features = []
    toy = Decoder().eval()
    for stage in toy.stages[:2]:
        stage.register_forward_hook(lambda module, inputs, output: features.append(output))
    with torch.no_grad():
        toy(samples)
    guide = GuidanceBank.load("made").guide(features[0])
    torch.testing.assert_close(guide, features[1].half().float(), rtol=2e-3, atol=2e-4)


def test_a_damaged_file_and_a_used_folder_are_refused(run, tmp_path):
    run(*BUILD).succeeds()
    run(*BUILD).fails_with("made already holds a bank. Name a new folder")
    values = tmp_path / "made/values.npy"
    values.write_bytes(values.read_bytes()[:-4])
    run("bank", "info", "made").fails_with("values.npy")
    run("bank", "info", "nowhere").fails_with("nowhere")


FRAMES = """

def pose(z):
    return z.mean((2, 3))


names = ["ann", "bob", "ann"] * 4
"""


def test_frame_banks_of_every_identity_are_built_and_resumed(run, tmp_path):
    with open(tmp_path / "toy.py", "a") as file:
        file.write(FRAMES)
    command = (*BUILD, "--key", "toy.py:pose", "--identities", "toy.py:names")
    built = run(*command).succeeds()
    assert built.count("saved to made") == 2 and not (tmp_path / "made.part").exists()
    assert len(GuidanceBank.load("made/ann")) == 8 and len(GuidanceBank.load("made/bob")) == 4
    assert "toy@" in run("bank", "info", "made/ann").out
    (tmp_path / "made/bob/meta.json").unlink()
    again = run(*command)
    assert again.out.count("saved to") == 1 and again.out.endswith("saved to made/bob\n")
