"""Batches whose samples leave at different exits."""

import itertools

import pytest
import torch

from retroexit.errors import BankError, OptionError, TrainingError


def _inputs(difficulty):
    z, w = torch.rand(len(difficulty), 4, 4, 4), torch.rand(len(difficulty), 5)
    z[:, 0] = torch.tensor(difficulty)[:, None, None]
    return z, w


def _calls(model):
    return [stage.calls for stage in model.generator.stages]


@pytest.mark.parametrize("guided", [False, True])
def test_a_mixed_batch_equals_its_samples_routed_alone_in_their_order(routed, guided):
    model = routed(guided)
    difficulty = [2.0, 0.0, 5.0, 1.0, 0.2, 2.4, 1.3, 7.0]
    exits = [3, 1, 4, 2, 1, 3, 2, 4]
    z, w = _inputs(difficulty)
    assert model.choose_exits(z, w, threshold=0.5).tolist() == exits
    with torch.no_grad():
        whole = model(z, w, threshold=0.5)
        for row, k in enumerate(exits):
            one, two = z[row][None], w[row][None]
            for wanted in (model(one, two, threshold=0.5), model(one, two, exit=k)):
                for key in ("image", "mean"):
                    assert torch.allclose(whole[key][row], wanted[key][0], atol=1e-5)
        backbone = model.generator(z, w)
    assert torch.allclose(whole["image"][2], backbone["image"][2], atol=1e-5)
    assert not torch.allclose(whole["image"][1], backbone["image"][1], atol=1e-2)


def test_a_routed_call_can_tell_where_each_sample_left(routed):
    model = routed()
    z, w = _inputs([2.0, 0.0, 5.0, 1.0])
    with torch.no_grad():
        output, exits = model.routed(z, w, threshold=0.5)
        assert exits.tolist() == model.choose_exits(z, w, threshold=0.5).tolist() == [3, 1, 4, 2]
        assert torch.equal(output["image"], model(z, w, threshold=0.5)["image"])


@pytest.mark.parametrize("guided", [False, True])
def test_routing_a_shuffled_batch_shuffles_the_images(routed, guided):
    model = routed(guided)
    z, w = _inputs([2.0, 0.0, 5.0, 1.0])
    order = torch.tensor([2, 0, 3, 1])
    with torch.no_grad():
        straight, shuffled = model(z, w, threshold=0.5), model(z[order], w[order], threshold=0.5)
    assert torch.allclose(straight["image"][order], shuffled["image"], atol=1e-5)


@pytest.mark.parametrize(
    ("difficulty", "calls"),
    [
        ([0.0, 0.3], [1, 0, 0, 0]),
        ([0.0, 1.0], [1, 1, 0, 0]),
        ([1.0, 1.2], [1, 1, 0, 0]),
        ([0.0, 2.0], [1, 1, 1, 0]),
        ([9.0, 0.0], [1, 1, 1, 1]),
        ([9.0, 9.0], [1, 1, 1, 1]),
    ],
)
def test_stages_behind_the_last_sample_do_not_run(routed, difficulty, calls):
    model = routed()
    model(*_inputs(difficulty), threshold=0.5)
    assert _calls(model) == calls


@pytest.mark.parametrize("k", [1, 2, 3])
def test_a_fixed_exit_runs_no_stage_behind_it(routed, k):
    model = routed()
    model(*_inputs([0.0]), exit=k)
    assert _calls(model) == [1] * k + [0] * (4 - k)


def test_a_batch_where_nobody_leaves_is_the_generators(routed):
    model = routed(True)
    z, w = _inputs([9.0, 8.0, 7.0])
    with torch.no_grad():
        found, wanted = model(z, w, threshold=0.5), model.generator(z, w)
    assert torch.equal(found["image"], wanted["image"]) and torch.equal(found["mean"], wanted["mean"])


def test_a_batch_where_nobody_leaves_searches_no_guide(routed, monkeypatch):
    model = routed(True)
    assert model.bank is not None
    searches = []
    real = model.bank.search
    monkeypatch.setattr(
        model.bank, "search", lambda feature, *more: (searches.append(len(feature)), real(feature, *more))[1]
    )
    model(*_inputs([9.0, 9.0]), threshold=0.5)
    assert searches == []
    model(*_inputs([9.0, 0.0]), threshold=0.5)
    assert len(searches) == 1


def test_a_batch_where_everybody_leaves_at_once_equals_that_exit(routed):
    model = routed()
    for k, difficulty in ((1, 0.0), (2, 1.0), (3, 2.0)):
        z, w = _inputs([difficulty, difficulty + 0.1])
        with torch.no_grad():
            assert torch.equal(model(z, w, threshold=0.5)["image"], model(z, w, exit=k)["image"])


def test_the_predictor_is_asked_once_per_call(routed):
    model = routed()
    model(*_inputs([0.0, 1.0, 9.0]), threshold=0.5)
    assert model.predictor.rows == [3]


def test_a_stricter_threshold_never_leaves_earlier(routed):
    model = routed()
    z, w = _inputs([0.0, 0.5, 1.0, 1.7, 2.2, 3.0])
    chosen = [model.choose_exits(z, w, threshold=t) for t in (0.0, 0.3, 0.9, 2.0)]
    assert all(bool((a >= b).all()) for a, b in itertools.pairwise(chosen))


def test_what_cannot_be_routed_is_refused(routed):
    model = routed(True)
    z, w = _inputs([0.0, 1.0])
    with pytest.raises(OptionError, match="exit must not be combined .* got exit=1 and threshold=0.5"):
        model(z, w, exit=1, threshold=0.5)
    with pytest.raises(OptionError, match="threshold must be a finite number >= 0, got -1"):
        model(z, w, threshold=-1)
    for wrong in (0, 5, True, "1"):
        with pytest.raises(
            OptionError, match=f"exit must be an integer from 1 to 4, the backbone, got {wrong!r}"
        ):
            model(z, w, exit=wrong)
    model.bank = None
    with pytest.raises(BankError, match="this branch needs a guide, but there is no guidance bank"):
        model(z, w, threshold=0.5)
    model.predictor = None
    with pytest.raises(TrainingError, match="choosing exits needs a predictor"):
        model(z, w, threshold=0.5)
