"""A bank from a stream of inputs: the same after an interruption, and with noise drawn on the way."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import retroexit
from retroexit.core.samples import Samples
from retroexit.errors import CheckpointError, OptionError
from retroexit.guidance.bank import GuidanceBank
from retroexit.retrieval import ExactRetriever
from retroexit.split.split import SplitGenerator
from retroexit.training.stream_bank import stream_bank, stream_banks


class Noisy(nn.Module):
    """Three stages, the first of which adds noise that it draws itself."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stages = nn.ModuleList(nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.ReLU()) for _ in range(3))
        self.rgb = nn.Conv2d(4, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = x + torch.randn_like(x)
        for stage in self.stages:
            x = stage(x)
        return torch.tanh(self.rgb(x))


STAGES = ["stages.0", "stages.1", "stages.2"]
SAMPLES = torch.randn(14, 4, 6, 6, generator=torch.Generator().manual_seed(1))


def wrapped(guidance: retroexit.Guidance | None) -> retroexit.EarlyExitGenerator:
    return retroexit.wrap(
        Noisy().eval(),
        [1],
        1.0,
        guidance=guidance,
        example_inputs=(SAMPLES[:2],),
        min_channels=1,
        stages=STAGES,
    )


def built(items=SAMPLES, **options) -> GuidanceBank:
    guidance = retroexit.Guidance(value_after=2, size=50)
    return stream_bank(wrapped(guidance), Samples(items, 3), ExactRetriever(), progress=False, **options)


def test_values_belong_to_their_keys_where_noise_is_drawn_inside() -> None:
    bank = built()
    model, found = Noisy().eval(), []
    for stage in model.stages:
        stage.register_forward_hook(lambda module, inputs, output: found.append(output))
    for begin in range(0, len(SAMPLES), 4):
        torch.manual_seed(3 + begin)
        with torch.no_grad():
            model(SAMPLES[begin : begin + 4])
    keys = torch.cat(found[0::3]).movedim(1, -1).reshape(-1, 4)
    values = torch.cat(found[1::3]).movedim(1, -1).reshape(-1, 4)
    kept = torch.from_numpy(bank.retriever.keys.copy())
    rows = torch.cdist(kept.double(), keys.double()).argmin(1)
    torch.testing.assert_close(keys[rows], kept, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(
        torch.from_numpy(bank.values.copy()).float().flatten(1), values[rows], rtol=2e-3, atol=1e-3
    )


def test_an_interrupted_build_goes_on_to_the_same_bank(tmp_path, monkeypatch) -> None:
    class Interrupted:
        def __init__(self) -> None:
            self.asked: list[int] = []
            self.most = 1 + 14 + 8  # the first is checked, all are hashed, two batches run

        def __len__(self) -> int:
            return len(SAMPLES)

        def __getitem__(self, index: int) -> Tensor:
            self.asked.append(index)
            if len(self.asked) > self.most:
                raise KeyboardInterrupt
            return SAMPLES[index]

    monkeypatch.setattr("retroexit.guidance.building._STORED", -1.0)
    monkeypatch.setattr("retroexit.guidance.building._SHARE", -1.0)
    items = Interrupted()
    options = {"scratch": tmp_path / "part", "max_candidates": 200}
    with pytest.raises(KeyboardInterrupt):
        built(items, **options)
    items.most, run = 999, []
    monkeypatch.setattr(
        SplitGenerator,
        "key_feature",
        lambda *a, f=SplitGenerator.key_feature: run.append(len(a[1][0])) or f(*a),
    )
    bank, whole = built(items, **options), built(max_candidates=200)
    assert run == [4, 2, 4, 4, 4, 2]  # of the first bank, the first two batches are not run again
    assert np.array_equal(bank.retriever.keys, whole.retriever.keys)
    assert np.array_equal(bank.values, whole.values) and bank.meta == whole.meta


def test_a_model_without_guidance_has_no_bank_to_build() -> None:
    with pytest.raises(OptionError, match="wrapped without guidance"):
        stream_bank(wrapped(None), Samples(SAMPLES), ExactRetriever())


class Quiet(nn.Module):
    """Four stages that draw nothing, and count their runs."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stages = nn.ModuleList(nn.Conv2d(4, 4, 3, padding=1) for _ in range(4))
        self.rgb = nn.Conv2d(4, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        for stage in self.stages:
            x = stage(x).relu()
        return torch.tanh(self.rgb(x))


def quiet(
    guidance: retroexit.Guidance, place: int = 3
) -> tuple[retroexit.EarlyExitGenerator, list[list[int]]]:
    """A wrapped generator, and the batch sizes that each of its stages has run with since."""
    generator = Quiet().eval()
    stages = [f"stages.{i}" for i in range(4)]
    runs: list[list[int]] = [[] for _ in stages]
    for index, stage in enumerate(generator.stages):
        stage.register_forward_hook(lambda _m, x, _y, i=index: runs[i].append(len(x[0])))
    model = retroexit.wrap(
        generator,
        [place],
        1.0,
        guidance=guidance,
        example_inputs=(SAMPLES[:2],),
        min_channels=1,
        stages=stages,
    )
    for run in runs:
        run.clear()
    return model, runs


def test_keys_run_no_stage_behind_their_own_and_values_only_batches_with_chosen_keys() -> None:
    model, runs = quiet(retroexit.Guidance(key_after=1, value_after=2, size=3))
    bank = stream_bank(model, Samples(SAMPLES, 3), ExactRetriever(), progress=False)
    owners = bank.source.unique()
    assert 1 <= len(owners) <= 3 and sum(runs[0]) >= len(SAMPLES)
    assert runs[1] == [2 if owner == 3 else 4 for owner in (owners // 4).unique()]  # batches of 4, 4, 4, 2
    assert runs[2] == runs[3] == []


def pose(x: Tensor) -> Tensor:
    return x.mean((2, 3))


def test_keys_from_a_function_run_no_stage_at_all() -> None:
    model, runs = quiet(retroexit.Guidance(key=pose, size=2))
    bank = stream_bank(model, Samples(SAMPLES, 3), ExactRetriever(), progress=False)
    assert len(bank) == 2 and sum(runs[0]) <= 4 + 2
    kept = pose(SAMPLES)[bank.source]
    torch.testing.assert_close(torch.from_numpy(bank.retriever.keys.copy()), kept)
    with torch.no_grad():
        images = model.generator(SAMPLES)[bank.source]
    torch.testing.assert_close(bank.guide(kept[:, :, None, None]), images, rtol=1e-3, atol=1e-3)


def test_an_interrupted_build_notices_that_an_input_has_changed(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("retroexit.guidance.building._STORED", -1.0)
    monkeypatch.setattr("retroexit.guidance.building._SHARE", -1.0)
    monkeypatch.setattr("retroexit.guidance.building._compute_values", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        built(scratch=tmp_path / "part")
    changed = SAMPLES.clone()
    changed[5, 0, 0, 0] += 1
    with pytest.raises(CheckpointError, match="belongs to another build: samples was"):
        built(changed, scratch=tmp_path / "part")


def test_every_identity_gets_a_bank_of_its_own_frames(tmp_path) -> None:
    model, _ = quiet(retroexit.Guidance(key=pose, thin="none"))
    names = ["ann", "bob"] * 7
    banks = dict(stream_banks(model, Samples(SAMPLES), names, ExactRetriever, progress=False))
    assert list(banks) == ["ann", "bob"] and [len(bank) for bank in banks.values()] == [7, 7]
    with torch.no_grad():
        images = model.generator(SAMPLES)
    for start, name in enumerate(names[:2]):
        banks[name].save(tmp_path / name)
        model.bank = GuidanceBank.load(tmp_path / name)
        guide = model.bank.guide(pose(SAMPLES[start::2])[:, :, None, None])
        torch.testing.assert_close(guide, images[start::2], rtol=1e-3, atol=1e-3)
    rest = stream_banks(model, Samples(SAMPLES), names, ExactRetriever, skip=["ann"], progress=False)
    assert [name for name, _ in rest] == ["bob"]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["a"] * 13, "13 names for 14 samples"),
        (["a", "../b"] * 7, "the name '../b'"),
        ([3] * 14, "the name 3"),
    ],
)
def test_names_that_no_folder_can_have_are_refused(names, message) -> None:
    model, _ = quiet(retroexit.Guidance(key=pose))
    with pytest.raises(OptionError, match=message):
        next(iter(stream_banks(model, Samples(SAMPLES), names, ExactRetriever)))
