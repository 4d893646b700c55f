"""Where keys and values of a bank come from: stages, functions, defaults of adapters."""

from functools import partial

import pytest
import torch
from torch import nn

import retroexit
from retroexit.core.identity import fingerprint
from retroexit.core.samples import Samples
from retroexit.errors import AttachPointError, BankError, CheckpointError, OptionError
from retroexit.guidance import build_bank
from retroexit.guidance.provider import key_name
from retroexit.retrieval import ExactRetriever
from retroexit.training.stream_bank import stream_bank

INPUTS = torch.randn(7, 4, 8, 8, generator=torch.Generator().manual_seed(1))
POSES = torch.randn(7, 5, generator=torch.Generator().manual_seed(2))
SAMPLES = list(zip(INPUTS, POSES, strict=True))


def pose_key(x, pose):
    return 2 * pose


def other_key(x, pose):
    return -pose


def wrap(generator, attach_at=(2,), guidance=True, **options):
    settings = {"stages": [f"stages.{i}" for i in range(4)], "example_inputs": (INPUTS[:2], POSES[:2])}
    settings |= {"adapter": False, "min_channels": 4, "image_range": (-1, 1)}
    return retroexit.wrap(generator, list(attach_at), 1 / 3, guidance=guidance, **(settings | options))


def fill(model, keys, values, patch=(1, 1)):
    stream, options = [(keys, range(len(keys)))], {"patch": patch, "thin": "none"}
    model.bank = build_bank(stream, lambda ids: values[ids], retriever=ExactRetriever(), **options)


def outputs_of(generator, path):
    """What a stage returns, before anything behind it writes into that."""
    seen = []
    hook = generator.get_submodule(path).register_forward_hook(lambda _m, _a, out: seen.append(out.clone()))
    with torch.no_grad():
        generator(INPUTS, POSES)
    hook.remove()
    return seen[0]


# Keys from a stage.


@pytest.mark.parametrize(("key_after", "tap"), [(1, "after"), ("stages.1", "after"), (1, "before"), ("stem", "after")])
def test_keys_are_what_the_named_stage_returns(posed, handed, key_after, tap):
    guidance = retroexit.Guidance(key_after=key_after, value_after=3)
    model = wrap(posed, [2], guidance, tap=tap)
    path = f"stages.{key_after - 1}" if isinstance(key_after, int) else key_after
    keys, values = outputs_of(posed, path), torch.rand(7, 12, 16, 16)
    fill(model, keys, values)
    guides = handed(model.branches[0])
    model(INPUTS[:3], POSES[:3], exit=1)
    # The bank holds the very keys, so that every place finds its own value again.
    torch.testing.assert_close(guides[0], values[:3], rtol=0, atol=1e-3)
    assert model.router.overhead()[0] == 64 * (7 * 64) * 12


def test_a_fit_fills_the_bank_from_the_named_stages(posed, metric, tmp_path):
    guidance = retroexit.Guidance(key_after=1, value_after=3, size=10_000, thin="none")
    model = wrap(posed, [2], guidance)
    retroexit.fit(model, SAMPLES, tmp_path, metric=metric, steps=1, predictor_steps=1, progress=False)
    assert len(model.bank) == 7 * 64
    # An input of the bank finds its own keys at distance 0, and with them its own values.
    keys, values = outputs_of(posed, "stages.0"), outputs_of(posed, "stages.2")
    result = model.bank.search(keys)
    assert result.distances.max() < 1e-6
    torch.testing.assert_close(model.bank.glue(result.ids), values, rtol=1e-3, atol=1e-3)
    loaded = retroexit.load(tmp_path, posed, (INPUTS[:1], POSES[:1]), adapter=False)
    assert loaded.options.guidance == model.options.guidance
    assert torch.equal(loaded(INPUTS, POSES, exit=1), model(INPUTS, POSES, exit=1))


@pytest.mark.parametrize(
    ("key_after", "error", "message"),
    [
        (3, OptionError, r"at or before the first attach point 'stages\.1', got 'stages\.2'"),
        ("rgb", OptionError, r"at or before the first attach point 'stages\.1', got 'rgb'"),
        (9, OptionError, r"key_after must be a stage from 1 to 4, got 9"),
        ("stage.0", AttachPointError, r"no module 'stage\.0' in Posed; closest: 'stages\.0'"),
    ],
)
def test_keys_from_behind_the_first_attach_point_are_refused(posed, untouched, key_after, error, message):
    with untouched(posed), pytest.raises(error, match=message):
        wrap(posed, [2, 3], retroexit.Guidance(key_after=key_after))


class Painter(nn.Module):
    """Begins with a learned constant, which the input joins only behind the first stage."""

    def __init__(self):
        super().__init__()
        self.constant = nn.Parameter(torch.randn(1, 8, 8, 8))
        self.stages = nn.ModuleList(nn.Conv2d(8, 8, 3, padding=1) for _ in range(3))
        self.rgb = nn.Conv2d(8, 3, 1)

    def forward(self, z):
        x = self.stages[0](self.constant) + z[:, :, None, None]
        return self.rgb(self.stages[2](self.stages[1](x).relu()).relu())


def test_keys_that_are_the_same_for_all_inputs_are_refused():
    options = {"stages": ("stages.0", "stages.1", "stages.2"), "example_inputs": (torch.randn(2, 8),)}
    with pytest.raises(BankError, match=r"output of key_after=1 is the same for all inputs"):
        wrap(Painter().eval(), guidance=retroexit.Guidance(key_after=1), **options)


# Keys from a function.


@pytest.mark.parametrize(
    ("key", "message"),
    [
        (lambda x, pose: pose[:, :, None], r"one row of numbers per input, \(2, D\), got \(2, 5, 1\)"),
        (lambda x, pose: pose[:1], r"\(2, D\), got \(1, 5\)"),
        (lambda x, pose: pose[:, :0], r"got \(2, 0\)"),
        (lambda x, pose: pose.long(), r"floating-point tensor \(2, D\), got torch\.int64"),
        (lambda x, pose: [0.0], r"floating-point tensor .*, got list"),
        (lambda x: x, r"raised TypeError: .*positional argument.* called with the generator's own arguments"),
    ],
)
def test_functions_that_return_no_keys_are_refused(posed, untouched, key, message):
    with untouched(posed), pytest.raises(BankError, match=message):
        wrap(posed, guidance=retroexit.Guidance(key=key))


def test_a_function_that_returns_another_width_is_refused(posed):
    width = [5]
    model = wrap(posed, guidance=retroexit.Guidance(key=lambda x, pose: pose[:, : width[0]]))
    fill(model, POSES[:, :, None, None], torch.rand(7, 3, 16, 16))
    assert model(INPUTS, POSES, exit=1).shape == (7, 3, 16, 16)
    width[0] = 4
    with pytest.raises(BankError, match=r"\(7, 5\), got \(7, 4\)"):
        model(INPUTS, POSES, exit=1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"key": pose_key, "key_after": 1}, r"not be combined with key_after=1"),
        ({"key": pose_key, "patch": (2, 2)}, r"not be combined with patch=\(2, 2\)"),
        ({"key": "pose"}, r"key must be a function .* got 'pose'"),
        ({"inject": "all"}, r"inject must be 'input' or 'every_stage', got 'all'"),
        ({"size": 0}, r"size must be >= 1, got 0"),
        ({"key": True}, r"key must be a function .* got True"),
        ({"order": 2}, r"order must be 0 or 1, got 2"),
    ],
)
def test_invalid_settings_are_refused(options, message):
    with pytest.raises(OptionError, match=message):
        retroexit.Guidance(**options)


@pytest.mark.parametrize(("value_after", "path"), [("image", ""), (None, ""), (1, "stages.0"), ("rgb", "rgb")])
def test_a_frames_value_is_the_whole_image_or_map(posed, metric, handed, tmp_path, value_after, path):
    model = wrap(posed, guidance=retroexit.Guidance(key=pose_key, value_after=value_after))
    retroexit.fit(model, SAMPLES, tmp_path, metric=metric, steps=1, predictor_steps=1, progress=False)
    assert len(model.bank) == 7
    guides, values = handed(model.branches[0]), outputs_of(posed, path)
    model(INPUTS[:2], POSES[[4, 6]] + 0.01, exit=1)
    torch.testing.assert_close(guides[0], values[[4, 6]], rtol=1e-3, atol=1e-3)
    assert model.guide.search_macs() == 7 * 5  # one search of 7 keys of 5 numbers


# Settings of the user and of the adapter.


def describe(**facts):
    return retroexit.Description(name="posed", stages=tuple(f"stages.{i}" for i in range(4)), **facts)


@pytest.mark.parametrize(
    ("guidance", "facts", "expected"),
    [
        (True, {"key_after": 1, "value_after": "stages.2"}, (None, 1, "stages.2", "input")),
        ({"key_after": 2, "value_after": 1}, {"key_after": 1, "value_after": "stages.2"}, (None, 2, 1, "input")),
        ({"value_after": 1}, {"key_after": 1}, (None, 1, 1, "input")),
        ({"order": 1}, {"value_after": 2}, (None, None, "image", "every_stage")),
        ({"order": 1, "value_after": 1, "inject": "input"}, {"value_after": 2}, (None, None, 1, "input")),
        # A key function of the adapter makes a bank of frames, unless the user sets something of patches.
        (True, {"key": pose_key}, (pose_key, None, "image", "every_stage")),
        ({"inject": "input", "value_after": 2}, {"key": pose_key}, (pose_key, None, 2, "input")),
        ({"key": other_key}, {"key": pose_key}, (other_key, None, "image", "every_stage")),
        ("patches", {"key": pose_key}, (None, None, None, "input")),
        ({"key": False}, {"key": pose_key}, (None, None, None, "input")),
        ({"key_after": 1}, {"key": pose_key}, (None, 1, None, "input")),
        ({"patch": (2, 2)}, {"key": pose_key}, (None, None, None, "input")),
    ],
)
def test_settings_of_the_user_go_before_those_of_the_adapter(posed, guidance, facts, expected):
    chosen = retroexit.Guidance(**guidance) if isinstance(guidance, dict) else guidance
    settings = wrap(posed, guidance=chosen, stages=None, adapter=describe(**facts)).options.guidance
    assert (settings.key, settings.key_after, settings.value_after, settings.inject) == expected


# Saving.


def test_a_key_function_is_named_by_module_and_name(posed):
    assert key_name(pose_key).endswith("test_taps.pose_key")
    assert key_name(partial(partial(pose_key), pose=None)) == key_name(pose_key)
    assert key_name(posed).endswith("Posed")


def test_a_key_function_is_given_again_at_loading_or_comes_from_the_adapter(posed, tmp_path):
    model = wrap(posed, guidance=retroexit.Guidance(key=pose_key))
    fill(model, pose_key(INPUTS, POSES)[:, :, None, None], torch.rand(7, 3, 16, 16))
    model.bank.meta["fingerprint"] = fingerprint(posed)
    model.save(tmp_path)
    example = (INPUTS[:1], POSES[:1])
    expected = model(INPUTS, POSES, exit=1)
    for key, adapter in ((pose_key, False), (pose_key, describe(key=other_key)), (None, describe(key=pose_key))):
        loaded = retroexit.load(tmp_path, posed, example, key=key, adapter=adapter)
        assert torch.equal(loaded(INPUTS, POSES, exit=1), expected)
        assert loaded.options.guidance == model.options.guidance
    for adapter in (False, describe(), describe(key=other_key)):
        with pytest.raises(CheckpointError, match=r"function '.*pose_key', which is not saved.* key=\.\.\."):
            retroexit.load(tmp_path, posed, example, adapter=adapter)


def test_a_key_function_for_a_model_without_one_is_refused(posed, tmp_path):
    wrap(posed).save(tmp_path)
    with pytest.raises(CheckpointError, match=r"was saved without a key function, got key=.*pose_key'. Leave key out"):
        retroexit.load(tmp_path, posed, adapter=False, key=pose_key)


def test_a_fit_that_began_with_other_keys_is_not_continued(posed, metric, tmp_path):
    settings = {"metric": metric, "steps": 1, "predictor_steps": 1, "progress": False}
    retroexit.fit(wrap(posed, guidance=retroexit.Guidance(key=pose_key)), SAMPLES, tmp_path, **settings)
    other = wrap(posed, guidance=retroexit.Guidance(key=other_key))
    with pytest.raises(CheckpointError, match=r"guidance\.key was .*pose_key, is .*other_key"):
        retroexit.fit(other, SAMPLES, tmp_path, **settings)
    (tmp_path / "fit.json").unlink()
    with pytest.raises(CheckpointError, match="features of another fit, with other guidance key"):
        retroexit.fit(other, SAMPLES, tmp_path, **settings)


# Banks of other taps.


def bank_of(generator, **guidance):
    model = wrap(generator, guidance=retroexit.Guidance(size=20, **guidance))
    return stream_bank(model, Samples(SAMPLES), ExactRetriever(), progress=False)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"key_after": 1}, r"the source of keys must be '.+', got '.+'"),
        ({"value_after": 2}, r"the source of values must be '.+', got '.+'"),
        ({"patch": (2, 2)}, r"patch of a key must be \(1, 1\), got \(2, 2\)"),
        ({"key": pose_key}, r"the source of keys must be '.+', got '.*pose_key'"),
    ],
)
def test_a_bank_of_other_taps_or_patches_is_refused(posed, other, message):
    foreign, fitting = bank_of(posed, **({"value_after": 3} | other)), bank_of(posed, value_after=3)
    model = wrap(posed, guidance=retroexit.Guidance(value_after=3))
    model.bank = fitting
    with pytest.raises(BankError, match=message):
        model.bank = foreign
    assert model.bank is fitting
    model = wrap(posed, guidance=retroexit.Guidance(value_after=3), example_inputs=None)
    model.bank = foreign  # checked in the first call, before there are branches
    with pytest.raises(BankError, match=message):
        model(INPUTS[:2], POSES[:2], exit=1)
    assert not model.is_recorded and len(model.branches) == 0
    model.bank = fitting
    assert model(INPUTS[:2], POSES[:2], exit=1).shape == (2, 3, 16, 16)


def test_a_bank_of_another_backbone_is_refused(posed):
    model, foreign = wrap(posed, guidance=retroexit.Guidance()), bank_of(posed)
    foreign.meta["fingerprint"] = "0" * 64
    with pytest.raises(BankError, match=r"the backbone of the bank must be '[0-9a-f]{64}', got '0{64}'"):
        model.bank = foreign
    assert model.bank is None


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (lambda keys, values: (keys[:, :5], values), "numbers per key must be 12, got 5"),
        (lambda keys, values: (keys, values[..., ::2, ::2]), r"value must be \(2, 2\), got \(1, 1\)"),
        (lambda keys, values: (keys, values[:, :3]), "channels per value must be 12, got 3"),
    ],
)
def test_a_bank_made_by_hand_is_compared_by_its_shapes(posed, changed, message):
    model = wrap(posed, guidance=retroexit.Guidance(value_after=3))
    keys, values = torch.randn(3, 12, 8, 8), torch.rand(3, 12, 16, 16)
    fill(model, keys, values)
    bank = model.bank
    with pytest.raises(BankError, match=message):
        fill(model, *changed(keys, values))
    assert model.bank is bank
