"""Banks from a stream of inputs: interrupted, with noise drawn inside, by name."""

import numpy as np
import pytest
import torch
from decoders import Chain, fit, latents, same, trained, wrap

import retroexit
from retroexit.core.samples import Samples
from retroexit.errors import BankError, CheckpointError, OptionError
from retroexit.guidance.bank import GuidanceBank
from retroexit.retrieval import ExactRetriever
from retroexit.split.split import SplitGenerator
from retroexit.training.steps import Steps
from retroexit.training.stream_bank import stream_bank, stream_banks

SAMPLES = torch.randn(14, 4, 6, 6, generator=torch.Generator().manual_seed(1))


def chain(guidance, noise=False):
    """A wrapped generator, and the batch sizes that each of its stages has run with since."""
    generator, stages = Chain(4, noise).eval(), [f"stages.{i}" for i in range(4)]
    runs = [[] for _ in stages]
    for index, stage in enumerate(generator.stages):
        stage.register_forward_hook(lambda _m, x, _y, i=index: runs[i].append(len(x[0])))
    example = {"example_inputs": (SAMPLES[:2],), "stages": stages}
    model = retroexit.wrap(generator, [1 if noise else 3], 1.0, guidance=guidance, min_channels=1, **example)
    for run in runs:
        run.clear()
    return model, runs


def build(items=SAMPLES, **options):
    """A bank of a generator that draws noise."""
    model, _ = chain(retroexit.Guidance(value_after=2, size=50), noise=True)
    return stream_bank(model, Samples(items, 3), ExactRetriever(), progress=False, **options)


def pose(x):
    return x.mean((2, 3))


def test_values_belong_to_their_keys_where_noise_is_drawn_inside():
    bank, model = build(), Chain(4, noise=True).eval()
    outputs = []
    for stage in model.stages[:2]:
        stage.register_forward_hook(lambda _m, _x, output: outputs.append(output))
    for begin in range(0, len(SAMPLES), 4):
        torch.manual_seed(3 + begin)
        with torch.no_grad():
            model(SAMPLES[begin : begin + 4])
    keys, values = (torch.cat(outputs[i::2]).movedim(1, -1).reshape(-1, 4) for i in (0, 1))
    bank_keys = torch.from_numpy(bank.retriever.keys.copy())
    rows = torch.cdist(bank_keys.double(), keys.double()).argmin(1)
    torch.testing.assert_close(keys[rows], bank_keys, rtol=1e-5, atol=1e-6)
    bank_values = torch.from_numpy(bank.values.copy()).float().flatten(1)
    torch.testing.assert_close(bank_values, values[rows], rtol=2e-3, atol=1e-3)


@pytest.fixture
def keep_partial_results(monkeypatch):
    """Write what an interrupted build continues from after every batch."""
    monkeypatch.setattr("retroexit.guidance.building._STORED", -1.0)
    monkeypatch.setattr("retroexit.guidance.building._SHARE", -1.0)


def test_an_interrupted_build_continues_to_the_same_bank(tmp_path, monkeypatch, keep_partial_results):
    class Interrupted:
        def __init__(self):
            self.reads, self.limit = 0, 1 + 14 + 8  # the first is checked, all are hashed, two batches run

        def __len__(self):
            return len(SAMPLES)

        def __getitem__(self, index):
            self.reads += 1
            if self.reads > self.limit:
                raise KeyboardInterrupt
            return SAMPLES[index]

    items = Interrupted()
    options = {"scratch": tmp_path / "part", "max_candidates": 200}
    with pytest.raises(KeyboardInterrupt):
        build(items, **options)
    items.limit, sizes = 999, []
    real = SplitGenerator.key_feature
    monkeypatch.setattr(SplitGenerator, "key_feature", lambda *args: sizes.append(len(args[1][0])) or real(*args))
    bank, expected = build(items, **options), build(max_candidates=200)
    assert sizes == [4, 2, 4, 4, 4, 2]  # of the first bank, the first two batches are not run again
    assert np.array_equal(bank.retriever.keys, expected.retriever.keys)
    assert np.array_equal(bank.values, expected.values) and bank.meta == expected.meta


def test_an_interrupted_build_notices_that_an_input_has_changed(tmp_path, monkeypatch, keep_partial_results):
    monkeypatch.setattr("retroexit.guidance.building._compute_values", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        build(scratch=tmp_path / "part")
    changed = SAMPLES.clone()
    changed[5, 0, 0, 0] += 1
    with pytest.raises(CheckpointError, match="belongs to another build: samples was"):
        build(changed, scratch=tmp_path / "part")


def test_keys_run_no_later_stage_and_values_only_batches_with_chosen_keys():
    model, runs = chain(retroexit.Guidance(key_after=1, value_after=2, size=3))
    bank = stream_bank(model, Samples(SAMPLES, 3), ExactRetriever(), progress=False)
    sources = bank.source.unique()
    assert 1 <= len(sources) <= 3 and sum(runs[0]) >= len(SAMPLES)
    assert runs[1] == [2 if batch == 3 else 4 for batch in (sources // 4).unique()]  # batches of 4, 4, 4, 2
    assert runs[2] == runs[3] == []


def test_keys_from_a_function_run_no_stage():
    model, runs = chain(retroexit.Guidance(key=pose, size=2))
    bank = stream_bank(model, Samples(SAMPLES, 3), ExactRetriever(), progress=False)
    assert len(bank) == 2 and sum(runs[0]) <= 4 + 2
    keys = pose(SAMPLES)[bank.source]
    torch.testing.assert_close(torch.from_numpy(bank.retriever.keys.copy()), keys)
    with torch.no_grad():
        images = model.generator(SAMPLES)[bank.source]
    torch.testing.assert_close(bank.guide(keys[:, :, None, None]), images, rtol=1e-3, atol=1e-3)


def test_every_identity_gets_a_bank_of_its_own_frames(tmp_path):
    model, _ = chain(retroexit.Guidance(key=pose, thin="none"))
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
        (None, "the model has no guidance. Pass guidance="),
    ],
)
def test_names_that_are_no_folders_and_models_without_guidance_are_refused(names, message):
    with pytest.raises(OptionError, match=message):
        if names is None:
            stream_bank(chain(None)[0], Samples(SAMPLES), ExactRetriever())
        model, _ = chain(retroexit.Guidance(key=pose))
        next(iter(stream_banks(model, Samples(SAMPLES), names, ExactRetriever)))


# Fits with a bank that was made beforehand.


def bank_of(inputs):
    return stream_bank(wrap(guidance=True), Samples(inputs), ExactRetriever(), progress=False)


def test_a_given_bank_guides_with_all_its_values(tmp_path, monkeypatch):
    model, inputs = wrap(guidance=True), latents(10)
    bank = bank_of(inputs)  # of the inputs of the fit, whose own values are not left out
    guides = []
    real = Steps.at

    def at(steps, index):
        if steps.guide_of is not None:  # before, a loss is tried
            guides.append(steps.guide_of(range(10)))
        return real(steps, index)

    monkeypatch.setattr(Steps, "at", at)
    fit(model, tmp_path, inputs=inputs, bank=bank)
    key_feature = model.split.begin((inputs,), {}).key_feature
    assert torch.equal(guides[-1], bank.guide(key_feature))
    assert torch.equal(model.bank.guide(key_feature), bank.guide(key_feature))
    assert np.array_equal(bank.source.unique().numpy(), np.arange(10))  # the given bank is unchanged


def test_a_fit_goes_on_with_the_bank_that_it_began_with(tmp_path):
    bank, other = bank_of(latents(10)), bank_of(latents(10) + 1)
    same(*(trained(fit(wrap(guidance=True), tmp_path, bank=bank)) for _ in range(2)))
    for wrong in (None, other):
        with pytest.raises(CheckpointError, match="other settings: bank was"):
            fit(wrap(guidance=True), tmp_path, bank=wrong)


def test_a_bank_that_does_not_fit_is_refused_before_anything_is_written(tmp_path):
    bank = bank_of(latents(10))
    with pytest.raises(BankError, match="wrapped without guidance"):
        fit(wrap(), tmp_path / "plain", bank=bank)
    with pytest.raises(BankError, match="source of values must be"):
        fit(wrap(guidance=retroexit.Guidance(value_after="image")), tmp_path / "image", bank=bank)
    assert list(tmp_path.iterdir()) == []
