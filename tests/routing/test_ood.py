"""Inputs unlike the fitting set go to the backbone, and are counted."""

import pytest
import torch

from retroexit.guidance import with_slopes
from retroexit.guidance.bank import GuidanceBank
from retroexit.routing.predictor import OODGuard, Predictor, farthest
from retroexit.training.predictor import train_predictor


def _maps(samples, seed):
    """Maps of eight correlated channels, each sample with a mean of its own."""
    random = torch.Generator().manual_seed(seed)
    mixing = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))
    common = torch.randn(samples, 3, 6, 6, generator=random) + torch.randn(samples, 3, 1, 1, generator=random)
    noise = 0.2 * torch.randn(samples, 8, 6, 6, generator=random)
    return torch.einsum("cd,ndhw->nchw", mixing, common) + noise + 1.0


@pytest.fixture(scope="module")
def fitted():
    torch.manual_seed(0)
    predictor = Predictor(8, exits=2)
    maps = _maps(360, 1)
    losses = 0.1 + maps[:, :2].mean((2, 3)).abs()
    train_predictor(predictor, maps, losses, held_out=range(300, 360), steps=5, progress=False)
    return predictor


@torch.no_grad()
def _far(predictor, maps):
    return float((predictor.predict_losses(maps)[1] > 1).float().mean())


def test_few_inputs_like_the_fitting_set_raise_the_alarm_and_most_of_another_kind(fitted):
    assert _far(fitted, _maps(2000, 2)) <= 0.005
    maps = _maps(100, 3)
    assert _far(fitted, -maps) > 0.95
    assert _far(fitted, torch.randn_like(maps)) > 0.95
    assert _far(fitted, 4 * maps) > 0.9
    assert _far(fitted, maps[:, torch.arange(8).flip(0)]) > 0.95, "the same values in other channels"


def test_the_distance_is_that_of_mahalanobis_where_the_rank_is_full():
    torch.manual_seed(2)
    pooled = torch.randn(400, 5) @ torch.randn(5, 5) + 3
    guard = OODGuard(5)
    guard.fit(pooled, pooled[:0])
    other = torch.randn(20, 5) * 3
    inverse = torch.linalg.inv(torch.cov(pooled.T, correction=0))
    expected = torch.einsum("ni,ij,nj->n", other - pooled.mean(0), inverse, other - pooled.mean(0)).sqrt()
    assert torch.allclose(guard(other) * guard.limit, expected, rtol=1e-2)


def test_a_guard_that_saw_nothing_stops_nothing():
    guard = OODGuard(4)
    assert guard(torch.full((2, 4), 1e6)).tolist() == [0.0, 0.0]
    guard.fit(torch.randn(5, 4), torch.zeros(0, 4))  # too few to know
    assert guard(torch.full((2, 4), 1e6)).tolist() == [0.0, 0.0]


@torch.no_grad()
def test_routing_sends_them_to_the_backbone_and_counts_them(routed):
    model = routed()
    model.router.predictor_inputs = None
    model.predictor = Predictor(10, exits=3)
    z, w = torch.rand(40, 4, 4, 4), torch.rand(40, 5)
    values = model.split.begin((z, w), {}).values
    feature = model.split.crossing(values, 0)[0]
    train_predictor(model.predictor, feature, torch.rand(40, 3) + 0.1, held_out=[], steps=2, progress=False)
    strange = torch.cat([z[:2], -20 * z[:1], z[2:3]])
    _, exits = model.routed(strange, w[:4], threshold=1e3)
    assert exits.tolist() == [1, 1, 4, 1]
    assert (model.router.ood_counter.seen, model.router.ood_counter.count) == (4, 1)
    assert model.predict_losses(strange, w[:4]).is_ood.tolist() == [False, False, True, False]
    assert torch.isfinite(model.predict(strange, w[:4])).all(), "predictions themselves stay as they are"
    assert model.router.ood_counter.seen == 4, "only routed calls are counted"
    model.router.ood_counter.enabled = False
    assert model.routed(strange, w[:4], threshold=1e3)[1].tolist() == [1, 1, 1, 1]
    model.router.ood_counter.reset()
    assert (model.router.ood_counter.seen, model.router.ood_counter.count) == (0, 0)


@torch.no_grad()
def test_inputs_far_from_the_bank_go_to_the_backbone_and_are_counted(routed, monkeypatch):
    model = routed(guided=True)
    z, w = torch.rand(5, 4, 4, 4), torch.rand(5, 5)
    z[:, 0] = torch.tensor([0.0, 1.0, 9.0, 0.0, 0.0])[:, None, None]  # exits 1, 2, 4, 1, 1
    z[3, 1:] *= 200
    key_feature = model.split.begin((z, w), {}).key_feature
    distance = model.bank.search(key_feature).distances.sqrt().flatten(1).mean(1)
    model.router.guide_limit = float(distance[[0, 1, 4]].max()) + 1e-3
    searches = []
    real = model.bank.search
    monkeypatch.setattr(model.bank, "search", lambda x, *more: (searches.append(len(x)), real(x, *more))[1])
    output, exits = model.routed(z, w, threshold=0.5)
    assert exits.tolist() == [1, 2, 4, 4, 1]
    assert searches == [4], "one search, for those alone that would take a guide"
    assert (model.router.ood_counter.seen, model.router.ood_counter.count) == (5, 1)
    for row, k in enumerate(exits.tolist()):
        alone = model(z[row][None], w[row][None], exit=k)
        assert torch.allclose(output["image"][row], alone["image"][0], atol=1e-5)
    assert torch.equal(model.choose_exits(z, w, threshold=0.5), exits)
    model.router.ood_counter.enabled = False
    assert model.routed(z, w, threshold=0.5)[1].tolist() == [1, 2, 4, 1, 1]


@torch.no_grad()
def test_a_guide_that_follows_its_query_is_the_same_when_the_bank_is_guarded(routed):
    model = routed(guided=True)
    bank = model.bank
    maps = [(torch.rand(6, 10, 4, 4), torch.rand(6, 10, 8, 8))]
    model.bank = with_slopes(bank, maps, 6 * 16)
    assert isinstance(model.bank, GuidanceBank) and model.bank.order == 1
    z, w = torch.rand(3, 4, 4, 4), torch.rand(3, 5)
    z[:, 0] = torch.tensor([0.0, 1.0, 0.0])[:, None, None]
    expected = model(z, w, threshold=0.5)["image"]
    model.router.guide_limit = 1e6
    assert torch.allclose(model(z, w, threshold=0.5)["image"], expected, atol=1e-6)


def test_few_distances_like_those_seen_are_beyond_the_farthest():
    random = torch.Generator().manual_seed(0)
    seen, new = (torch.randn(n, generator=random).mul(0.3).exp() for n in (200, 20000))
    assert float((new > farthest(seen)).float().mean()) < 0.004
    assert farthest(torch.tensor([1.0, 1.0, 1.0, 5.0])) >= 5
