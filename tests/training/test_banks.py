"""A bank from a stream of inputs: the same after an interruption, and with noise drawn on the way."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import retroexit
from retroexit.errors import OptionError
from retroexit.guidance.bank import GuidanceBank
from retroexit.retrieval import ExactRetriever
from retroexit.training.banks import stream_bank
from retroexit.training.inputs import Samples


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
            self.most = 9

        def __len__(self) -> int:
            return len(SAMPLES)

        def __getitem__(self, index: int) -> Tensor:
            self.asked.append(index)
            if index > self.most:
                raise KeyboardInterrupt
            return SAMPLES[index]

    monkeypatch.setattr("retroexit.guidance.filling._STORED", -1.0)
    items = Interrupted()
    options = {"scratch": tmp_path / "part", "max_candidates": 200}
    with pytest.raises(KeyboardInterrupt):
        built(items, **options)
    items.most, items.asked = 99, []
    bank, whole = built(items, **options), built(max_candidates=200)
    assert items.asked[2] == 8  # the first sample is looked at, the first two batches are not run again
    assert np.array_equal(bank.retriever.keys, whole.retriever.keys)
    assert np.array_equal(bank.values, whole.values) and bank.meta == whole.meta


def test_a_model_without_guidance_has_no_bank_to_build() -> None:
    with pytest.raises(OptionError, match="wrapped without guidance"):
        stream_bank(wrapped(None), Samples(SAMPLES), ExactRetriever())
