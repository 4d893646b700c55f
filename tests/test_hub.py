"""Folders on the Hugging Face hub. Nothing here uses the network."""

import shutil
import sys
from types import SimpleNamespace

import pytest
import torch
from runtime_models import Decoder, inputs, wrapped

import retroexit
from retroexit.errors import CheckpointError, MissingExtraError

hub = pytest.importorskip("huggingface_hub")


@pytest.fixture
def remote(tmp_path, monkeypatch):
    """A folder in place of the hub, where repositories are folders."""
    folder = tmp_path / "remote"

    class Api:
        def __init__(self, token=None):
            assert token == "secret"

        def create_repo(self, name, private=None, exist_ok=False):
            assert exist_ok and private
            return SimpleNamespace(repo_id=name)

        def upload_folder(self, repo_id, folder_path, commit_message, ignore_patterns):
            shutil.copytree(folder_path, folder / repo_id, ignore=shutil.ignore_patterns(*ignore_patterns))
            return SimpleNamespace(commit_url=f"https://hub/{repo_id}/commit/1")

    def download(name, revision=None):
        if not (folder / name).exists():
            raise OSError(f"404: no {name}")
        return str(folder / name)

    monkeypatch.setattr(hub, "HfApi", Api)
    monkeypatch.setattr(hub, "snapshot_download", download)
    monkeypatch.chdir(tmp_path)
    return folder


def test_a_model_comes_back_from_the_hub_with_a_card(remote):
    model, x = wrapped(rule={}, attach_at=(2,)), inputs(2)
    url = model.push_to_hub("me/exits", license="mit", base_model="them/decoder", private=True, token="secret")
    assert url == "https://hub/me/exits/commit/1"
    card = (remote / "me/exits/README.md").read_text()
    assert card.startswith("---\nlibrary_name: retroexit\nlicense: mit\nbase_model: them/decoder\ntags:")
    for text in ("# Decoder with early exits", '"me/exits"', "| 1 | stages.1 |", str(model.calibration)):
        assert text in card
    assert not list((remote / "me/exits").glob("*.lock"))
    for back in (
        retroexit.from_pretrained("me/exits", model.generator, x, revision="main", adapter=False),
        retroexit.load("me/exits", model.generator, x, adapter=False),
        retroexit.from_pretrained(remote / "me/exits", model.generator, x, adapter=False),
    ):
        assert torch.equal(back(*x, exit=1)["image"], model(*x, exit=1)["image"])


def test_a_folder_here_goes_first_and_errors_say_what_to_do(remote, tmp_path, monkeypatch):
    generator = Decoder().eval()
    with pytest.raises(
        CheckpointError, match="me/cake must be a folder here or a repository on the hub, got .*404.*Check"
    ):
        retroexit.load("me/cake", generator)
    (tmp_path / "runs").mkdir()
    with pytest.raises(CheckpointError, match=r"cannot read runs/cake/model\.json"):  # a typing error, not a repository
        retroexit.load("runs/cake", generator)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(MissingExtraError, match=r"Run: pip install 'retroexit\[hub\]'"):
        retroexit.load("me/cake", generator)
