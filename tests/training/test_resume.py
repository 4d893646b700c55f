"""A fit that was interrupted ends with the same numbers, bit for bit; damaged files are refused."""

import os
import shutil
import signal

import decoders
import numpy as np
import pytest
import torch
from decoders import HALVES, Judge, Noisy, checkpoint, fit, interrupted, latents, make, same, trained, wrap

from retroexit.errors import CheckpointError
from retroexit.guidance.bank import GuidanceBank
from retroexit.model import EarlyExitGenerator
from retroexit.training import cache as caching
from retroexit.training import fit as fitting
from retroexit.training import trainer as training
from retroexit.training.steps import draw_batch
from retroexit.training.trainer import BranchTrainer, learning_rate

ADVERSARIAL = {"losses": {"l1": 1, "quality": 1, "adversarial": 0.1}, "equalise": 3}

FITS = {
    "plain": (wrap, {}),
    "guided": (lambda: wrap(guidance=True), {}),
    "noisy": (lambda: wrap(make(Noisy)), {}),
    "noisy, without cache": (lambda: wrap(make(Noisy)), {"cache": False}),
    "inherited": (lambda: wrap(**HALVES), {}),
    "inherited, features": (lambda: wrap(**HALVES), {"features": 1.0}),
    "adversarial": (wrap, ADVERSARIAL),
}


def fit_one(name, folder, model=None, **more):
    """Fit a model of `FITS`, or go on with the given one."""
    wrap_it, settings = FITS[name]
    discriminator = {"discriminator": Judge()} if name == "adversarial" else {}
    return fit(wrap_it() if model is None else model, folder, **settings | discriminator | more)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """Folder and weights of a fit that was not interrupted; each one runs once."""
    results = {}

    def get(name):
        if name not in results:
            folder = tmp_path_factory.mktemp("uninterrupted")
            results[name] = folder, trained(fit_one(name, folder))
        return results[name]

    return get


@pytest.mark.parametrize(
    ("name", "owner", "function", "call"),
    [
        *(pytest.param("guided", BranchTrainer, "advance", call, marks=pytest.mark.long) for call in (0, 3, 6)),
        ("guided", BranchTrainer, "advance", 7),
        ("guided", caching, "compute_features", 0),
        ("guided", caching, "compute_features", 2),
        ("guided", caching, "write_json", 1),
        ("guided", GuidanceBank, "save", 0),
        ("guided", BranchTrainer, "save", 0),
        ("guided", BranchTrainer, "save", 3),
        ("guided", fitting, "exit_losses", 0),
        ("guided", fitting, "fit_predictor", 0),
        ("guided", EarlyExitGenerator, "save", 0),
        *(
            pytest.param(name, BranchTrainer, "advance", 7, marks=[pytest.mark.long] if "features" in name else [])
            for name in FITS
            if name not in ("plain", "guided")
        ),
    ],
)
def test_an_interrupted_fit_ends_the_same(name, owner, function, call, tmp_path, uninterrupted):
    model = FITS[name][0]()
    with interrupted(owner, function, call):
        fit_one(name, tmp_path, model)
    torch.manual_seed(call)  # the result must not depend on the state of random numbers
    # Go on with the half-trained model, or as a new process does.
    is_same_model = name == "guided" and function != "advance"
    same(trained(fit_one(name, tmp_path, model if is_same_model else None)), uninterrupted(name)[1])


def test_an_interrupted_fit_may_go_on_with_other_checkpoints(tmp_path, uninterrupted):
    with interrupted(BranchTrainer, "advance", 7):
        fit_one("plain", tmp_path)
    same(trained(fit_one("plain", tmp_path, checkpoint_every=2)), uninterrupted("plain")[1])


def test_a_resumed_fit_does_not_reconstruct_its_branches_again(tmp_path, monkeypatch):
    with interrupted(BranchTrainer, "advance", 4):
        fit_one("inherited", tmp_path)
    monkeypatch.setattr("retroexit.branch.copy.CopyBranch.start", None)  # calling it would fail
    fit_one("inherited", tmp_path)


def test_a_finished_fit_that_is_called_again_trains_nothing(tmp_path, uninterrupted, monkeypatch):
    expected = uninterrupted("plain")[1]
    fit(wrap(), tmp_path)
    monkeypatch.setattr(BranchTrainer, "advance", None)  # calling it would fail
    same(trained(fit(wrap(), tmp_path)), expected)


KILLED = """
import os, signal
from retroexit.training.trainer import BranchTrainer
real = BranchTrainer.advance
def advance(trainer, step):
    if trainer.index == 1 and trainer.step == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(trainer, step)
BranchTrainer.advance = advance
decoders.fit(decoders.wrap(), Path(args[0]), discriminator=decoders.Judge(), **args[1])
"""


def _same_checkpoints(one, other):
    for number in (1, 2):
        same(checkpoint(one, number)[0], checkpoint(other, number)[0])


@pytest.mark.skipif(os.name == "nt", reason="SIGKILL")
def test_a_killed_fit_with_adversaries_and_equalised_weights_ends_the_same(tmp_path, uninterrupted):
    folder, weights = uninterrupted("adversarial")
    done = decoders.start_script(KILLED, tmp_path, ADVERSARIAL)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert checkpoint(tmp_path, 2)[1] == 3 and not (tmp_path / "model.json").exists()
    same(trained(fit_one("adversarial", tmp_path)), weights)
    _same_checkpoints(tmp_path, folder)
    states = [checkpoint(folder, number)[0] for number in (1, 2)]
    names = [name for name in states[0] if name.endswith("adversary.module.last.weight")]
    assert [int(v) for name, v in states[0].items() if name.endswith("equaliser.count")] == [3]
    assert len(names) == 1 and not torch.equal(states[0][names[0]], states[1][names[0]])
    assert not torch.equal(states[0][names[0]], Judge().last.weight)
    with pytest.raises(CheckpointError, match=r"other settings: loss\.discriminator was .*, is "):
        fit_one("adversarial", tmp_path, discriminator=Judge(2))


def test_a_fit_interrupted_between_the_checkpoints_of_two_branches_ends_the_same(tmp_path, uninterrupted):
    # Two saves at the start, two after step 3; the second of these does not happen.
    with interrupted(training, "write_tensors", 3):
        fit_one("adversarial", tmp_path)
    assert [checkpoint(tmp_path, number)[1] for number in (1, 2)] == [3, 0]
    folder, weights = uninterrupted("adversarial")
    same(trained(fit_one("adversarial", tmp_path)), weights)
    _same_checkpoints(tmp_path, folder)


def test_a_cache_interrupted_between_batches_has_the_same_arrays(tmp_path):
    new = lambda: wrap(make(Noisy), guidance=True)  # noqa: E731
    fit(new(), tmp_path / "whole", cache_batch=3)
    with interrupted(caching, "compute_features", 4):  # the first two calls check images
        fit(new(), tmp_path / "parts", cache_batch=3)
    with pytest.MonkeyPatch.context() as patch:
        seeds = []
        real = caching.compute_features
        patch.setattr(caching, "compute_features", lambda *args: (seeds.append(args[3]), real(*args))[1])
        fit(new(), tmp_path / "parts", cache_batch=3)
    assert seeds[2:] == [6, 9]  # those of the first samples of the missing batches
    names = sorted(path.name for path in (tmp_path / "whole/cache").glob("*.npy"))
    assert {"backbone-image.npy", "guidance-value.npy"} < set(names)
    for name in names:
        one, other = (np.load(tmp_path / part / "cache" / name) for part in ("whole", "parts"))
        assert np.array_equal(one, other), name


FILES = ("branches/exit1.safetensors", "cache/cache.json", "cache/backbone-image.npy", "fit.json", "losses.safetensors")


@pytest.mark.parametrize("file", FILES)
def test_a_file_cut_in_half_is_refused(tmp_path, uninterrupted, file):
    shutil.copytree(uninterrupted("plain")[0], tmp_path, dirs_exist_ok=True)
    path = tmp_path / file
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(CheckpointError, match=f"cannot read .*{path.name}"):
        fit(wrap(), tmp_path)


def test_files_of_another_fit_are_refused(tmp_path, uninterrupted):
    shutil.copytree(uninterrupted("plain")[0], tmp_path / "one")
    fit(wrap(attach_at=[1]), tmp_path / "other", inputs=latents(9))
    rows = r"stages_0.npy must have 9 rows, got \(10, 12, 8, 8\)"
    losses = r"must have shape \(9, 1\), got \(10, 2\). Remove it."
    for name, message in (("losses.safetensors", losses), ("cache/stages_0.npy", rows)):
        content = (tmp_path / "other" / name).read_bytes()
        (tmp_path / "other" / name).write_bytes((tmp_path / "one" / name).read_bytes())
        with pytest.raises(CheckpointError, match=message):
            fit(wrap(attach_at=[1]), tmp_path / "other", inputs=latents(9))
        (tmp_path / "other" / name).write_bytes(content)
    shutil.copy(tmp_path / "one/branches/exit2.safetensors", tmp_path / "one/branches/exit1.safetensors")
    with pytest.raises(CheckpointError, match="cannot read .*exit1.safetensors: .*Remove it to train this exit again"):
        fit(wrap(), tmp_path / "one")


def test_a_batch_is_a_function_of_the_step_alone():
    rows = list(range(100, 113))
    forward = [draw_batch(step, rows, 5, seed=3) for step in range(40)]
    backward = [draw_batch(step, rows, 5, seed=3) for step in reversed(range(40))][::-1]
    assert forward == backward
    assert forward != [draw_batch(step, rows, 5, seed=4) for step in range(40)]


@pytest.mark.parametrize("batch", [1, 4, 13, 30])
def test_each_epoch_visits_every_row_once(batch):
    rows = list(range(100, 113))
    batches = [draw_batch(step, rows, batch, seed=0) for step in range(26)]
    assert {len(rows) for rows in batches} == {batch}
    picked = [row for batch_rows in batches for row in batch_rows]
    epochs = [picked[begin : begin + 13] for begin in range(0, len(picked) - 12, 13)]
    assert len(epochs) == 26 * batch // 13
    assert all(sorted(epoch) == rows for epoch in epochs)
    assert len(epochs) < 3 or len({tuple(epoch) for epoch in epochs}) == len(epochs)


def test_the_learning_rate_rises_over_a_tenth_then_falls_to_a_thousandth():
    rates = [learning_rate(step, 200, 2.0) for step in range(201)]
    assert rates[0] == pytest.approx(0.2)
    assert rates[20] == max(rates) == pytest.approx(2.0)
    assert rates[110] == pytest.approx(2.0 * (0.001 + 0.999 * 0.5))
    assert rates[200] == pytest.approx(0.002)
    assert rates[:21] == sorted(set(rates[:21])) and rates[20:] == sorted(set(rates[20:]), reverse=True)
    assert learning_rate(0, 1, 2.0) > 0
