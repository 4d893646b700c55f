"""The predictor and its training."""

import numpy as np
import pytest
import torch
from toys import Distance, decoder_12

import retroexit
from retroexit.core.modules import count_macs
from retroexit.errors import TrainingError
from retroexit.routing.predictor import Predictor
from retroexit.training.predictor import train_predictor


@pytest.mark.parametrize("size", [(9,), (6, 5), (3, 4, 5)])
def test_it_gives_one_loss_per_exit_for_maps_of_any_dimension(size):
    predictor = Predictor(4, exits=3, dims=len(size))
    assert predictor(torch.rand(7, 4, *size)).shape == (7, 3)
    maps, losses = torch.rand(20, 4, *size), torch.rand(20, 3)
    train_predictor(predictor, maps, losses, held_out=[0, 1], steps=2, progress=False)
    assert predictor.input_shape == (4, *size)


def test_a_prediction_does_not_depend_on_the_rest_of_the_batch():
    predictor, maps = Predictor(4, exits=2), torch.rand(6, 4, 5, 5)
    alone = torch.cat([predictor(row[None]) for row in maps])
    assert torch.allclose(predictor(maps), alone, atol=1e-6)


def test_it_learns_a_function_of_the_feature_better_than_the_mean():
    maps = torch.randn(300, 4, 6, 6) * (0.5 + torch.rand(300, 1, 1, 1)) + torch.randn(300, 4, 1, 1)
    easy = maps[:, 0].mean((1, 2)).sigmoid()
    hard = maps[:, 1].std((1, 2)) + 0.5 * easy
    losses = torch.stack([easy, 5 * hard], 1)
    predictor = Predictor(4, exits=2)
    train_predictor(predictor, maps[:240], losses[:240], held_out=range(200, 240), steps=250, progress=False)
    assert not predictor.training
    with torch.no_grad():
        error = (predictor(maps[240:]) - losses[240:]).abs().mean(0)
    of_mean = (losses[:240].mean(0) - losses[240:]).abs().mean(0)
    assert float((error / of_mean).max()) < 0.5


def test_a_step_minimises_the_squared_error_of_the_logarithms():
    maps, losses = torch.randn(5, 3, 4, 4), 0.1 + torch.rand(5, 2) + torch.tensor([0.0, 3.0])
    predictor, hand = Predictor(3, exits=2), Predictor(3, exits=2)
    hand.load_state_dict(predictor.state_dict())
    train_predictor(predictor, maps, losses, held_out=[], steps=1, seed=9, progress=False)

    rows = np.random.default_rng(9).integers(0, 5, 32)
    hand.mean.copy_(torch.stack([maps[:, c].mean() for c in range(3)]))
    hand.std.copy_(torch.stack([maps[:, c].var(unbiased=False).sqrt() for c in range(3)]))
    target = losses.log()
    hand.loss_mean.copy_(target.mean(0))
    hand.loss_std.copy_(target.var(0, unbiased=False).sqrt())
    optimizer = torch.optim.Adam(hand.parameters(), lr=2e-3, weight_decay=1e-4)
    total = torch.zeros(())
    for row in rows.tolist():
        for k in range(2):  # in units of each exit's own spread, so that all exits count alike
            predicted = hand(maps[row][None])[0, k]
            total = total + ((predicted.log() - target[row, k]) / hand.loss_std[k]) ** 2
    (total / 64).backward()
    optimizer.step()
    for name, value in hand.state_dict().items():
        if name.startswith("guard."):  # learnt afterwards
            continue
        assert torch.allclose(predictor.state_dict()[name], value, atol=1e-5), name


def test_its_mean_error_on_held_out_samples_is_taken_out():
    maps, losses = torch.randn(60, 3, 4, 4), 0.1 + torch.rand(60, 2)
    losses[50:] *= torch.tensor([2.0, 0.5])  # what branches lose on samples that they have not seen
    predictor = Predictor(3, exits=2)
    error = train_predictor(predictor, maps, losses, held_out=range(50, 60), steps=30, progress=False)
    with torch.no_grad():
        predicted = predictor(maps[50:])
    left = predicted.log() - losses[50:].log()
    assert torch.allclose(left.mean(0), torch.zeros(2), atol=1e-5)
    assert error == pytest.approx(float((predicted - losses[50:]).abs().mean()), rel=1e-4)
    assert train_predictor(predictor, maps, losses, held_out=[], steps=1, progress=False) is None


def test_training_is_a_function_of_seed_and_starting_weights():
    maps, losses = torch.randn(20, 3, 4, 4), torch.rand(20, 2)
    start = Predictor(3, exits=2).state_dict()
    weights = []
    for seed in (1, 1, 2):
        predictor = Predictor(3, exits=2)
        predictor.load_state_dict(start)
        train_predictor(predictor, maps, losses, held_out=[3], steps=5, seed=seed, progress=False)
        weights.append(predictor.head[0].weight.detach().clone())
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_one_sample_and_dead_channels_do_no_harm():
    maps, losses = torch.randn(12, 3, 4, 4), torch.rand(12, 1)
    maps[:, 2] = 0.0
    predictor = Predictor(3, exits=1)
    train_predictor(predictor, maps, losses, held_out=[0], steps=5, progress=False)
    alive = maps.clone()
    alive[:, 2] = 0.1
    with torch.no_grad():
        assert float((predictor(alive) - losses).abs().max()) < 20
    train_predictor(predictor, maps[:1], losses[:1], held_out=[], steps=2, progress=False)
    assert bool(torch.isfinite(predictor(maps)).all())


def test_maps_without_bound_stop_the_training():
    maps = torch.randn(8, 3, 4, 4)
    maps[3, 0, 0, 0] = float("inf")
    with pytest.raises(TrainingError, match="the predictor's loss became nan at step 0"):
        train_predictor(Predictor(3, 1), maps, torch.rand(8, 1), held_out=[], steps=3, progress=False)


def test_it_can_read_the_inputs_through_an_adapter(tmp_path):
    batches = []

    def reads(z):
        batches.append(len(z))
        return z[:, :3]

    adapter = retroexit.Description(name="toy", predictor_inputs=reads)
    inputs = torch.rand(40, 4, 8, 8)
    options = {"init": "scratch", "image_range": (-1, 1), "example_inputs": (inputs[:2],)}
    model = retroexit.wrap(decoder_12(), [1], 1.0, adapter=adapter, **options)
    settings = {"steps": 2, "batch": 2, "predictor_steps": 3, "progress": False}
    retroexit.fit(model, inputs, tmp_path, metric=Distance(), **settings)
    assert batches == [32, 8]
    assert model.predictor.input_shape == (3, 8, 8)
    with torch.no_grad():
        assert torch.equal(model.predict(inputs[:5]), model.predictor(inputs[:5, :3]))
    overhead = model.router.overhead()
    assert overhead[0] == overhead[-1] == count_macs(model.predictor, torch.zeros(1, 3, 8, 8))
