"""Properties of wrapped generators, checked for every toy."""

import pytest
import torch

import retroexit
from retroexit.core.nested import tensors


def wrapped(toy, **options):
    settings = {"attach_at": list(toy.stages[:2]), "scale": 1 / 4, "min_channels": 8} | options
    return retroexit.wrap(toy.generator, **settings, example_inputs=toy.args, example_kwargs=toy.kwargs)


def call(model, toy, rows=slice(None), **options):
    args, kwargs = toy.rows(rows)
    torch.manual_seed(7)
    return model(*args, **kwargs, **options)


def equal(a, b):
    pairs = list(zip(tensors(a), tensors(b), strict=True))
    return type(a) is type(b) and all(torch.equal(x, y) for x, y in pairs)


def count(module):
    return sum(p.numel() for p in module.parameters())


def test_any_decoder_gets_exits_and_keeps_its_output(every_toy, untouched, tmp_path):
    _check_exits(every_toy, "inherit", untouched, tmp_path)


REPARAMETRISED = ["weight_norm_old", "spectral_norm_parametrized", "modulated_convolution_with_skip_image"]


@pytest.mark.parametrize("name", ["tied_weights", "buffers_and_plain_tensors", *REPARAMETRISED])
def test_branches_from_scratch_keep_the_output_too(toys, name, untouched, tmp_path):
    _check_exits(toys.TOYS[name](), "scratch", untouched, tmp_path)


def _check_exits(toy, init, untouched, tmp_path):
    expected = call(toy.generator, toy)
    with untouched(toy.generator):
        model = wrapped(toy, init=init)
    assert equal(call(model, toy), expected)
    assert equal(call(model, toy, exit=3), expected)
    for k in (1, 2):
        branch = model.branches[k - 1]
        output = call(model, toy, exit=k)
        assert type(output) is type(expected)
        assert [t.shape for t in tensors(output)] == [t.shape for t in tensors(expected)]
        sum(t.square().sum() for t in tensors(output)).backward()
        assert [name for name, p in branch.named_parameters() if p.grad is None] == []
        assert all(p.grad is None for p in toy.generator.parameters())
        _check_width(model, k, toy)
        _check_batch(model, k, toy)
    model.save(tmp_path)
    again = retroexit.load(tmp_path, toy.generator, toy.args, toy.kwargs)
    with torch.no_grad():
        assert all(equal(call(model, toy, exit=k), call(again, toy, exit=k)) for k in (1, 2))


def _check_width(model, k, toy):
    branch, row = model.branches[k - 1], model.exits[k - 1]
    tail = model.split.tail(k - 1)
    assert row.parameters == count(branch) < 0.5 * count(tail)
    if toy.pinned:  # the second attach point may lie behind the line that pins
        assert any(toy.pinned in line for line in model.exits[0].pinned)
    else:
        assert row.pinned == ()


def _check_batch(model, k, toy):
    with torch.no_grad():
        both = tensors(call(model, toy, exit=k))
        alone = [tensors(call(model, toy, slice(i, i + 1), exit=k)) for i in (0, 1)]
    for batch, first, second in zip(both, *alone, strict=True):
        if batch.dim() and batch.shape[0] == 2:
            atol = 1e-4 * float(batch.abs().max())
            torch.testing.assert_close(batch, torch.cat([first, second]), rtol=1e-3, atol=atol)


@torch.no_grad()
def test_at_full_width_every_exit_is_the_generator_bit_for_bit(every_toy):
    toy = every_toy
    model, expected = wrapped(toy, scale=1.0), call(toy.generator, toy)
    torch.manual_seed(7)
    outputs = model.all_exits(*toy.args, **toy.kwargs)
    assert all(equal(output, expected) for output in (*outputs, *(call(model, toy, exit=k) for k in (1, 2))))
