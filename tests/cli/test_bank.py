"""``retroexit bank``: build, info and verify."""

import re

import pytest
import torch

from retroexit.guidance import GuidanceBank

BUILD = ("bank", "build", "toy.py:decoder", "--inputs", "toy.py:samples", "--out", "made", "--size", "40")


@pytest.mark.parametrize("thin", ["fps", "kmeans", "random"])
def test_build_info_and_verify_agree(run, thin):
    built = run(*BUILD, "--thin", thin, "--retriever", "faiss", "--batch", "5").succeeds()
    assert built.endswith("saved to made\n")
    shown = run("bank", "info", "made")
    assert shown.out == built.removesuffix("saved to made\n")
    assert re.search(r"^pairs: +40 from \d+ inputs$", shown.out, re.MULTILINE)
    assert re.search(rf"^thinning: +{thin} of 768 candidates, 768 seen, seed 0$", shown.out, re.MULTILINE)
    assert re.search(r"^coverage: +radius [\d.]+, mean distance", shown.out, re.MULTILINE)
    checked = run("bank", "verify", "made", "toy.py:decoder").succeeds()
    assert "40 of 40 keys find themselves" in checked and "backbone is the one" in checked


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


def test_another_backbone_a_damaged_file_and_a_used_folder_are_refused(run, tmp_path):
    run(*BUILD).succeeds()
    run("bank", "verify", "made", "toy.py:sized", "--args", "5").fails_with("backbone")
    run(*BUILD).fails_with("made already holds a bank. Name a new folder")
    values = tmp_path / "made/values.npy"
    values.write_bytes(values.read_bytes()[:-4])
    run("bank", "verify", "made").fails_with("values.npy")
    run("bank", "info", "nowhere").fails_with("nowhere")


FRAMES = """

def pose(z):
    return z.mean((2, 3))


names = ["ann", "bob", "ann"] * 4
"""


def test_frame_banks_of_every_identity_are_built_resumed_and_verified(run, tmp_path):
    with open(tmp_path / "toy.py", "a") as file:
        file.write(FRAMES)
    command = (*BUILD, "--key", "toy.py:pose", "--identities", "toy.py:names")
    built = run(*command).succeeds()
    assert built.count("saved to made") == 2 and not (tmp_path / "made.part").exists()
    assert len(GuidanceBank.load("made/ann")) == 8 and len(GuidanceBank.load("made/bob")) == 4
    assert "keys from toy@" in run("bank", "verify", "made/ann", "toy.py:with_inputs", "--key", "toy.py:pose").out
    (tmp_path / "made/bob/meta.json").unlink()
    again = run(*command)
    assert again.out.count("saved to") == 1 and again.out.endswith("saved to made/bob\n")


def test_verify_compares_taps_and_patches_on_request(run):
    run(*BUILD, "--value-after", "2").succeeds()
    same = ("bank", "verify", "made", "toy.py:with_inputs", "--key-after", "1", "--value-after")
    assert "as expected" in run(*same, "2").out
    run(*same, "1").fails_with("source of values must be")
    run(*same, "2", "--patch", "2").fails_with(r"patch of a key must be \(2, 2\), got \(1, 1\)")
    run("bank", "verify", "made", "toy.py:with_inputs", "--key-after", "2").fails_with("source of keys must be")
