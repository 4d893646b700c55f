"""Sections of the benchmark for GPUs: each fails alone, and runs on any generator."""

import argparse

import gpu
import pytest
import torch


@pytest.fixture
def bench(toys):
    def make(attach_at):
        options = argparse.Namespace(device="cpu", turns=1, batches=[1, 4], steps=1)
        wrapping = {"attach_at": attach_at, "scale": 1 / 2, "min_channels": 4, "adapter": False}
        return gpu.Bench(toys.decoder_12(), list(torch.rand(4, 4, 16, 16)), wrapping, options)

    return make


def test_a_section_that_fails_or_cannot_run_says_so_in_its_row(bench, monkeypatch, capsys):
    def broken(_bench):
        raise ValueError("out of\nluck")

    monkeypatch.setitem(gpu.SECTIONS, "fit", broken)
    assert gpu.run(bench([1]), "fit", is_late=False) == [{"error": "ValueError: out of luck"}]
    assert "Traceback" in capsys.readouterr().err
    assert gpu.run(bench([1]), "memory", is_late=False) == [{"error": "needs CUDA"}]
    assert gpu.run(bench([1]), "wrap", is_late=True) == [{"error": "left out, no time left"}]


@pytest.mark.parametrize("section", ["wrap", "time against MACs", "mixed batches", "bfloat16"])
def test_a_section_runs_on_one_generator_after_another(bench, section):
    for attach_at in ([1], [1, 2]):
        rows = gpu.run(bench(attach_at), section, is_late=False)
        assert rows and not any("error" in row for row in rows), rows
    if section == "wrap":
        assert rows[0]["bit for bit"] and rows[0]["exits"] == 3
    if section == "bfloat16":
        assert [row["exit"] for row in rows] == [1, 2, 3] and float(rows[-1]["float32 loss"]) == 0
