"""``retroexit doctor`` and ``retroexit plugins``."""

import importlib.metadata
import os
import re
import sys

import torch

from retroexit.cli import doctor
from retroexit.metrics import weights


def test_plugins_lists_the_builtin_one(run):
    shown = run("plugins").succeeds()
    assert re.search(r"^builtin +retroexit +\S+ .*retroexit_metrics.*retroexit_retrievers", shown, re.MULTILINE)


def test_doctor_reports_and_fails_where_something_is_broken(run, monkeypatch):
    checks, text = [doctor.Check("torch", "ok", "2.15")], "ok    torch: 2.15\n"
    monkeypatch.setattr(doctor, "diagnose", lambda: checks)
    shown = run("doctor")
    assert (shown.status, shown.out, shown.err) == (0, text, "")
    checks.append(doctor.Check("faiss", "fail", "gone", "pip install faiss-cpu"))
    shown = run("doctor")
    assert (shown.status, shown.out) == (1, f"{text}fail  faiss: gone\n      pip install faiss-cpu\n")


def test_the_doctor_finds_nothing_broken_in_an_empty_cache(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    checks = {check.name: check for check in doctor.diagnose()}
    assert [check for check in checks.values() if check.status == "fail"] == []
    assert checks["torch"].detail.startswith(torch.__version__)
    assert checks["plug-in: builtin"].status == "ok"
    missing = checks["lpips weights: alex"]
    assert missing.status == "warn"
    assert "alexnet-owt-7be5be79.pth" in missing.hint


def test_the_doctor_checks_the_hash_of_cached_weights(monkeypatch, tmp_path):
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    (folder / "alexnet-owt-7be5be79.pth").write_bytes(b"abc")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    (alex,) = [check for check in doctor.diagnose() if check.name == "lpips weights: alex"]
    assert alex.status == "fail"
    assert "sha256 must start with 7be5be79, got ba7816bf. Delete it" in alex.detail  # FIPS 180-2, the example "abc"

    monkeypatch.setattr(weights, "_hub_address", lambda net: "https://example.org/abc-ba7816bf.pth")
    (folder / "abc-ba7816bf.pth").write_bytes(b"abc")
    (vgg,) = [check for check in doctor.diagnose() if check.name == "lpips weights: vgg"]
    assert vgg.status == "ok"


def test_the_doctor_reports_what_breaks(monkeypatch):
    def broken(*_):
        raise OSError("not today")

    monkeypatch.setattr(torch, "get_num_threads", broken)
    monkeypatch.setitem(sys.modules, "hnswlib", None)
    monkeypatch.setattr(os, "access", lambda *_: False)
    checks = {check.name: check for check in doctor.diagnose()}
    failed = {name: check for name, check in checks.items() if check.status == "fail"}
    assert failed.keys() == {"threads", "cache folder"}
    assert checks["retrieval: hnswlib"].status == "warn"  # the other back-ends work without it
    assert "OSError: not today" in failed["threads"].detail
    assert checks["retrieval: hnswlib"].hint == "pip install --force-reinstall --no-cache-dir hnswlib"
    assert failed["cache folder"].hint == "set TORCH_HOME to a folder that you may write to"


def test_the_doctor_lists_every_dependency_once_with_its_extra(monkeypatch):
    requirements = ["torch!=2.13.0,>=2.9", "numpy", "nosuchcore>=1", "nosuchextra>=1; extra == 'all'"]
    requirements += ["nosuchextra>=1; extra == 'report'", "ray[data,serve]>=2; extra == 'ray'"]
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: requirements)
    version = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda n: "0.1.0" if n == "retroexit" else version(n))
    names = ["numpy", "nosuchcore", "nosuchextra", "ray"]
    checks = [check for check in doctor.diagnose() if check.name in names]
    assert [check.name for check in checks] == names
    assert [check.status for check in checks[:3]] == ["ok", "fail", "ok"]
    assert checks[1].hint == "pip install nosuchcore"
    assert checks[2].hint == "pip install 'retroexit[report]'"
