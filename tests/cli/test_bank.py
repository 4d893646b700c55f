"""``retroexit bank``: what build writes, info shows and verify accepts."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from retroexit.guidance import GuidanceBank

BUILD = ("bank", "build", "toy.py:decoder", "--inputs", "toy.py:samples", "--out", "made", "--size", "40")


@pytest.mark.parametrize("thin", ["fps", "kmeans", "random"])
def test_build_info_and_verify_agree(run: Any, thin: str) -> None:
    built = run(*BUILD, "--thin", thin, "--retriever", "faiss", "--batch", "5").succeeds()
    assert built.endswith("saved to made\n")
    shown = run("bank", "info", "made")
    assert shown.out == built.removesuffix("saved to made\n")
    assert re.search(r"^pairs: +40 from \d+ inputs$", shown.out, re.MULTILINE)
    assert re.search(rf"^thinning: +{thin} of 768 candidates, 768 seen, seed 0$", shown.out, re.MULTILINE)
    assert re.search(r"^coverage: +radius [\d.]+, mean distance", shown.out, re.MULTILINE)
    checked = run("bank", "verify", "made", "toy.py:decoder").succeeds()
    assert "40 of 40 keys find themselves" in checked and "backbone is the one" in checked


def test_a_streamed_bank_of_everything_guides_inputs_with_their_own_values(run: Any) -> None:
    run(*BUILD, "--thin", "none", "--batch", "5", "--patch", "2", "--value-after", "2").succeeds()
    # The stage repeats every location 2x2, so that keys of single locations would occur more than once.
    from toy import Decoder, samples  # the file beside which commands run

    kept: list[torch.Tensor] = []
    toy = Decoder().eval()
    for stage in toy.stages[:2]:
        stage.register_forward_hook(lambda module, inputs, output: kept.append(output))
    with torch.no_grad():
        toy(samples)
    guide = GuidanceBank.load("made").guide(kept[0])
    torch.testing.assert_close(guide, kept[1].half().float(), rtol=2e-3, atol=2e-4)


def test_another_backbone_a_damaged_file_and_a_used_folder_are_refused(run: Any, tmp_path: Path) -> None:
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


def test_frame_banks_of_every_identity_are_built_resumed_and_verified(run: Any, tmp_path: Path) -> None:
    with open(tmp_path / "toy.py", "a") as file:
        file.write(FRAMES)
    command = (*BUILD, "--key", "toy.py:pose", "--identities", "toy.py:names")
    built = run(*command).succeeds()
    assert built.count("saved to made") == 2 and not (tmp_path / "made.part").exists()
    assert len(GuidanceBank.load("made/ann")) == 8 and len(GuidanceBank.load("made/bob")) == 4
    assert (
        "keys from toy@"
        in run("bank", "verify", "made/ann", "toy.py:with_inputs", "--key", "toy.py:pose").out
    )
    (tmp_path / "made/bob/meta.json").unlink()
    again = run(*command)
    assert again.out.count("saved to") == 1 and again.out.endswith("saved to made/bob\n")


def test_verify_compares_taps_and_patches_on_request(run: Any) -> None:
    run(*BUILD, "--value-after", "2").succeeds()
    same = ("bank", "verify", "made", "toy.py:with_inputs", "--key-after", "1", "--value-after")
    assert "as expected" in run(*same, "2").out
    run(*same, "1").fails_with("source of values must be")
    run(*same, "2", "--patch", "2").fails_with(r"patch of a key must be \(2, 2\), got \(1, 1\)")
    run("bank", "verify", "made", "toy.py:with_inputs", "--key-after", "2").fails_with(
        "source of keys must be"
    )
