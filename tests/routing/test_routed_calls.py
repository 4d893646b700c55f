"""Batches whose samples leave at different exits."""

import pytest
import torch


def _inputs(difficulty):
    z, w = torch.rand(len(difficulty), 4, 4, 4), torch.rand(len(difficulty), 5)
    z[:, 0] = torch.tensor(difficulty)[:, None, None]
    return z, w


@pytest.mark.parametrize("guided", [False, True])
def test_a_mixed_batch_equals_its_samples_routed_alone_in_their_order(routed, guided):
    model = routed(guided)
    exits = [3, 1, 4, 2, 1, 3, 2, 4]
    z, w = _inputs([2.0, 0.0, 5.0, 1.0, 0.2, 2.4, 1.3, 7.0])
    with torch.no_grad():
        batch, taken = model.routed(z, w, threshold=0.5)
        assert model.predictor.rows == [8], "one call of the predictor"
        assert taken.tolist() == model.choose_exits(z, w, threshold=0.5).tolist() == exits
        for row, k in enumerate(exits):
            one, two = z[row][None], w[row][None]
            for alone in (model(one, two, threshold=0.5), model(one, two, exit=k)):
                for key in ("image", "mean"):
                    assert torch.allclose(batch[key][row], alone[key][0], atol=1e-5)
        backbone = model.generator(z, w)
    assert torch.allclose(batch["image"][2], backbone["image"][2], atol=1e-5)
    assert not torch.allclose(batch["image"][1], backbone["image"][1], atol=1e-2)


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
def test_stages_behind_the_deepest_exit_do_not_run_and_the_backbone_searches_no_guide(
    routed, difficulty, calls, monkeypatch
):
    model, searches = routed(True), []
    search = model.bank.search
    monkeypatch.setattr(model.bank, "search", lambda x, *more: (searches.append(len(x)), search(x, *more))[1])
    model(*_inputs(difficulty), threshold=0.5)
    assert [stage.calls for stage in model.generator.stages] == calls
    assert len(searches) == (min(difficulty) < 9)


def test_a_batch_that_leaves_at_one_exit_equals_that_exit(routed):
    model = routed()
    for k, difficulty in ((1, 0.0), (2, 1.0), (3, 2.0), (4, 7.0)):
        z, w = _inputs([difficulty, difficulty + 0.1])
        with torch.no_grad():
            output, expected = model(z, w, threshold=0.5), model(z, w, exit=k)
        assert torch.equal(output["image"], expected["image"])
        assert torch.equal(output["mean"], expected["mean"])
