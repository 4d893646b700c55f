"""Branches that inherit weights: reconstructed at the start of a fit, compared with the backbone's layers."""

import pytest
import torch
from decoders import HALVES, Layer, fit, latents, make, same, trained, wrap
from torch import nn

import retroexit
from retroexit.core.samples import ImageRange, Samples
from retroexit.training.cache import LiveFeatures
from retroexit.training.distributed import Team
from retroexit.training.initialise import reconstruct_branches
from retroexit.training.steps import Cropper, Steps
from retroexit.training.trainer import distances


def steps(model, team=None):
    samples, limits, cpu = Samples(latents(12)), ImageRange(-1, 1), torch.device("cpu")
    features, cropper = LiveFeatures(model, samples), Cropper(None, (16, 16))
    return Steps(features, samples, range(12), cropper, limits, None, 4, 0, cpu, team=team or Team())


@torch.no_grad()
def errors(model):
    """Mean squared errors of the exits on latents that were not fitted."""
    *exits, image = model.all_exits(latents(40)[20:])
    return [float((early - image).square().mean()) for early in exits]


@pytest.mark.parametrize("guidance", [None, True])
def test_a_fit_begins_closer_than_plain_inheritance(tmp_path, guidance):
    models = [wrap(guidance=guidance, **HALVES) for _ in range(2)]
    models[1].branches.apply(lambda module: setattr(module, "is_fresh", False))  # not reconstructed
    for number, model in enumerate(models):
        fit(model, tmp_path / str(number), steps=1, lr=1e-9, ema=0.0, batch=4)
    pairs = zip(*map(errors, models), strict=True)
    assert all(reconstructed < 0.8 * inherited for reconstructed, inherited in pairs)


def test_every_process_reconstructs_the_same_weights_without_the_others():
    models = [wrap(**HALVES) for _ in range(2)]
    for rank, model in enumerate(models):
        assert all(reconstruct_branches(model, steps(model, Team(rank, 2))))
    same(*(model.branches.state_dict() for model in models))


def test_branches_are_reconstructed_once_and_saved_ones_never(tmp_path):
    generator = make()
    model = wrap(generator, **HALVES)
    assert all(branch.is_fresh for branch in model.branches)
    fit(model, tmp_path)
    loaded = retroexit.load(tmp_path, generator, (latents(2),), adapter=False)
    for fitted in (model, loaded):
        assert reconstruct_branches(fitted, steps(fitted)) == [None, None]
    same(model.branches.state_dict(), loaded.branches.state_dict())


def test_stages_that_an_adapter_builds_are_reconstructed_too():
    def build(stage, channels, out_channels):
        return Layer(channels, out_channels, up=not isinstance(stage.up, nn.Identity))

    stages = [f"stages.{i}" for i in range(3)]
    model = wrap(adapter=retroexit.Description(name="layers", stages=stages, build_stage=build), **HALVES)
    before = errors(model)
    results = reconstruct_branches(model, steps(model))
    # The first stage reads the whole feature, so that its channels are exact.
    assert results[0] is not None and results[0].layers == ("stages.2.conv", "rgb")
    assert errors(model)[0] < 0.5 * before[0]


# The distance to the backbone's layers.


def test_the_feature_distance_is_that_of_a_loop_over_the_layers():
    model = wrap(**HALVES)
    branch, distance, step = model.branches[0], distances(model, 0.5)[0], steps(model).at(0)
    assert distance.paths == ["stages.1.conv", "stages.2.conv", "rgb"]
    values = [step.read(node.name) for node in model.split.cuts[0].crossing]
    with distance.capture(step):
        branch(*values)

    full, thin = model.split.tail(0), branch.tail
    terms = []
    with torch.no_grad():
        x_full, x_thin = values[0], branch.entry(values[0], None)
        for path in ("stages.1", "stages.2"):
            wide, narrow = full.get_submodule(path), thin.get_submodule(path)
            a, b = wide.conv(wide.up(x_full)), narrow.conv(narrow.up(x_thin))
            channels = branch.inherited[f"{path}.conv"]
            target = a if channels is None else a[:, channels]
            terms.append(float((b - target).square().mean() / target.var()))
            x_full, x_thin = torch.relu(wide.norm(a)), torch.relu(narrow.norm(b))
        a, b = full.rgb(x_full), thin.rgb(x_thin)
        terms.append(float((b - a).square().mean() / a.var()))
    assert float(distance().detach()) == pytest.approx(0.5 * sum(terms) / 3, rel=1e-4)


def test_one_run_of_the_backbone_serves_all_branches():
    model, runs = wrap(attach_at=(1, 2), scale=1 / 2, min_channels=4), []
    first, second = distances(model, 1.0)
    first.layers.full.register_forward_hook(lambda *_: runs.append(1))
    for number in range(2):
        step, losses = steps(model).at(number), []
        for index, distance in enumerate((first, second)):
            values = [step.read(node.name) for node in model.split.cuts[index].crossing]
            with torch.no_grad(), distance.capture(step):
                model.branches[index](*values)
            losses.append(float(distance()))
        assert len(runs) == number + 1
    alone = wrap(attach_at=(2,), scale=1 / 2, min_channels=4, seed=1)
    alone.branches[0].load_state_dict(model.branches[1].state_dict())
    (distance,) = distances(alone, 1.0)
    values = [step.read(node.name) for node in alone.split.cuts[0].crossing]
    with torch.no_grad(), distance.capture(steps(alone).at(1)):
        alone.branches[0](*values)
    assert float(distance()) == pytest.approx(losses[1], rel=1e-5)


def test_the_feature_distance_changes_what_is_learnt_and_leaves_no_hooks(tmp_path):
    generator = make()
    plain, matched = (fit(wrap(generator, **HALVES), tmp_path / str(weight), features=weight) for weight in (0.0, 1.0))
    one, other = trained(plain), trained(matched)
    assert any(not torch.equal(value, other[name]) for name, value in one.items())
    assert not any(m._forward_hooks for m in (*generator.modules(), *matched.branches.modules()))


def test_fresh_branches_have_no_layers_to_compare(tmp_path):
    model = wrap(init="scratch")
    assert distances(model, 1.0)[0].paths == []
    fit(model, tmp_path, features=1.0)
