"""``retroexit serve``; the server itself is replaced."""

import pytest
import torch

import retroexit
from retroexit.cli import serve
from retroexit.routing.latency import Latency


@pytest.fixture
def started(monkeypatch):
    """The settings that the servers were started with, and the models that they load."""
    calls = []
    for name in ("run_uvicorn", "run_ray"):
        monkeypatch.setattr(serve, name, lambda load, name=name, **settings: calls.append((name, load(), settings)))
    return calls


def test_a_folder_and_an_export_are_served(run, started):
    run("inspect", "toy.py:decoder", "--shape", "1,4,4,4").succeeds()
    from toy import Decoder  # the file beside which commands run

    example = (torch.rand(1, 4, 4, 4),)
    model = retroexit.wrap(Decoder().eval(), [1], 1 / 2, min_channels=4, example_inputs=example)
    model.latency = Latency((1.0, 2.0), batch=7, device="cpu: of another machine", threads=99)
    model.save("model")
    run("serve", "model").fails_with("model must be an export, or come with --generator, got none")
    run("serve", "model", "--generator", "toy.py:decoder").fails_with(
        "an example input is needed, got none. Pass --inputs"
    )
    run("serve", "model", "--replicas", "2", "--no-ray").fails_with("--replicas must be 1 with --no-ray, got 2")
    words = ("serve", "model", "--generator", "toy.py:decoder", "--shape", "1,4,4,4", "--max-batch", "3")
    run(*words, "--no-ray", "--port", "81").succeeds()
    run(*words, "--replicas", "2").succeeds()
    (uvicorn, loaded, settings), (ray, _, others) = started
    assert (uvicorn, ray, settings["port"], others["replicas"]) == ("run_uvicorn", "run_ray", 81, 2)
    assert settings["options"]["max_batch"] == 3 and torch.equal(loaded(*example, exit=1), model(*example, exit=1))
    assert loaded.latency.batch == 1 and loaded.choose_exits(*example, deadline_ms=1e6).tolist() == [2]
    retroexit.export(model, "out", "torch")
    run("serve", "out", "--generator", "toy.py:decoder").fails_with("an export needs no generator, got --generator")
    run("serve", "out", "--no-ray").succeeds()
    assert started[-1][1].exits == 2
