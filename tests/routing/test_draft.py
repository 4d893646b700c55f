"""Batches that leave early and are finished later."""

import copy

import pytest
import torch
from toys import Chain, Toy, chain

import retroexit
from retroexit.core.modules import count_macs
from retroexit.core.nested import tensors
from retroexit.errors import GeneratorError, ModeError, OptionError


class Steered(Chain):
    """Lets a value control its forward, and draws, so that its recording cannot be cut."""

    def forward(self, x):
        h = self.stem(x)
        for block in self.blocks:
            h = block(h)
            if x.mean() > 0:
                h = h + torch.rand_like(h)
        return torch.tanh(self.rgb(h))


class Noisy(Chain):
    """Draws once, before its stages, as OASIS does."""

    def forward(self, x):
        return super().forward(x + torch.randn(x.shape[0], 1, 1, 1))


class Counted(Chain):
    """Reads the size of its batch as a number, which fixes it."""

    def forward(self, x):
        return super().forward(x + torch.linspace(0, 1, len(x)).view(-1, 1, 1, 1))


OWN = {"steered": Steered, "noise_first": Noisy, "fixed_batch": Counted}
NAMES = ["keyword_inputs_only", "noise_inside", "in_place_at_the_start", "list_input_with_unet_skips"]
NAMES += ["dataclass_output", "attention_by_pytorch", *OWN]


def _wrap(toy, **options):
    inputs = {"example_inputs": toy.args, "example_kwargs": toy.kwargs, "stages": list(toy.stages)}
    return retroexit.wrap(toy.generator, [1, 2], 1 / 2, min_channels=8, init="scratch", **inputs, **options)


@pytest.fixture(params=NAMES)
def toy(request, toys) -> Toy:
    return _make(request.param, toys)


def _make(name, toys):
    if name not in OWN:
        return toys.TOYS[name]()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        made = chain(kind=OWN[name])
    made.generator.eval()
    return made


def _drawn(call, *args, **kwargs):
    torch.manual_seed(7)
    return call(*args, **kwargs)


def _assert_equal(output, expected, rows=None, **tolerance):
    pairs = list(zip(tensors(output), tensors(expected), strict=True))
    assert pairs
    for a, b in pairs:
        b = b if rows is None else b[rows]
        assert torch.equal(a, b) if not tolerance else torch.allclose(a, b, **tolerance)


@pytest.mark.parametrize("copied", [False, pytest.param(True, marks=pytest.mark.long)])
def test_a_draft_is_the_early_exit_and_finishes_as_the_backbone(toy, copied):
    model = _wrap(toy)
    with torch.no_grad():
        first, second, backbone = (_drawn(model, *toy.args, **toy.kwargs, exit=k) for k in (1, 2, 3))
        draft = _drawn((copy.deepcopy(model) if copied else model).draft, *toy.args, **toy.kwargs, exit=1)
        _assert_equal(draft.image, first)
        assert draft.exits.tolist() == [1, 1]
        state = torch.manual_seed(1).get_state()
        for _ in range(2):
            _assert_equal(draft.finish(), backbone)
            _assert_equal(draft.finish(exit=2), second)
            _assert_equal(draft.finish(exit=1), first)
        for rows in ([1], [1, 0, 1], torch.tensor([0])):
            _assert_equal(draft.finish(rows), backbone, rows, atol=1e-5)
            _assert_equal(draft.finish(rows, exit=2), second, rows, atol=1e-5)
        assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(("name", "share"), [("dict_output", 2), ("noise_first", 2), ("noise_inside", 2 / 3)])
def test_some_samples_cost_their_share_unless_draws_belong_to_all(toys, name, share):
    toy = _make(name, toys)
    draft = _wrap(toy).draft(*toy.args, exit=1)
    torch.rand(1)  # numbers of others do not matter
    assert count_macs(draft.finish) == pytest.approx(share * count_macs(lambda: draft.finish([1])))


def test_gradients_and_autocast_are_those_of_the_call(toys):
    toy = toys.TOYS["dict_output"]()
    model, x = _wrap(toy), toy.args[0].requires_grad_()
    output = model.draft(x, exit=1).finish()
    _assert_equal(output, model(x))
    gradients = [torch.autograd.grad(made["image"].square().sum(), x)[0] for made in (output, model(x))]
    assert torch.allclose(*gradients, atol=1e-6)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected, draft = model(x), model.draft(x, exit=1)
    _assert_equal(draft.finish(), expected)
    model.to(torch.bfloat16)
    half = x.detach().bfloat16()
    _assert_equal(model.draft(half, exit=1).finish(), model(half))


def _inputs(difficulty):
    z, w = torch.rand(len(difficulty), 4, 4, 4), torch.rand(len(difficulty), 5)
    z[:, 0] = torch.tensor(difficulty)[:, None, None]
    return z, w


@pytest.mark.parametrize("guided", [False, True])
def test_a_routed_draft_finishes_every_sample_from_its_own_exit(routed, guided):
    model = routed(guided)
    z, w = _inputs([2.0, 0.0, 5.0, 1.0, 0.2])
    with torch.no_grad():
        expected, exits = model.routed(z, w, threshold=0.5)
        by_exit = {k: model(z, w, exit=k) for k in (1, 2, 3, 4)}
        draft = model.draft(z, w, threshold=0.5)
        _assert_equal(draft.image, expected)
        assert draft.exits.tolist() == exits.tolist() == [3, 1, 4, 2, 1]
        z.zero_()  # a draft owns what it holds
        _assert_equal(draft.finish(), by_exit[4], atol=1e-5)
        _assert_equal(draft.finish([4, 2, 3]), by_exit[4], [4, 2, 3], atol=1e-5)
        third = draft.finish(exit=3)
        for row, k in enumerate([3, 3, 4, 3, 3]):  # a sample is never made worse
            assert torch.allclose(third["image"][row], by_exit[k]["image"][row], atol=1e-5)


@pytest.mark.parametrize("options", [{"exit": 1}, {"exit": 3}, {"exit": 4}, {"threshold": 0.5}])
def test_no_stage_runs_twice_and_both_cost_what_backbone_and_branch_cost(routed, options):
    model, inputs = routed(), _inputs([2.0, 0.0, 5.0, 1.0])
    model(*inputs, exit=1)  # compares a new shape once
    for stage in model.generator.stages:
        stage.calls = 0
    drafts = []
    early = count_macs(lambda: drafts.append(model.draft(*inputs, **options)))
    torch.rand(1)  # numbers of others do not matter
    rest = count_macs(drafts[0].finish)
    if "exit" in options:
        assert [stage.calls for stage in model.generator.stages] == [1, 1, 1, 1]
    assert early == count_macs(lambda: model(*inputs, **options))
    backbone = count_macs(model.generator, *inputs)
    branches = sum(_branch_macs(model, inputs, int(k)) for k in drafts[0].exits)
    assert early + rest <= backbone + branches
    assert count_macs(lambda: drafts[0].finish([0])) * 4 == rest or "threshold" in options


def _branch_macs(model, inputs, exit):
    """MACs of a branch for one sample: what the call costs beyond the stages up to its cut."""
    if exit > len(model.branches):
        return 0
    one = [value[:1] for value in inputs]
    begun = model.split.begin(tuple(one), {})
    values = begun.values
    for cut in range(1, exit):
        values = model.split.advance(values, cut)
    return count_macs(lambda: model.branches[exit - 1](*model.split.crossing(values, exit - 1)))


def _write(model):
    with torch.no_grad():
        model.generator.rgb.bias.add_(0.1)


def _write_data(model):
    model.generator.rgb.weight.data.mul_(1.1)


def _hook(model):
    model.generator.stages[3].register_forward_hook(lambda *_: None)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (_write, GeneratorError, "weights must stay as they were, got a change in 'rgb.bias'. Make the draft again"),
        (_write_data, GeneratorError, "got a change in them. Make the draft again"),
        (lambda m: m.double(), GeneratorError, "Make the draft again"),
        (_hook, GeneratorError, r"must be as it was wrapped, got a change in 'stages.3'"),
        (lambda m: m.generator.train(), ModeError, "must be in eval mode"),
    ],
)
def test_a_draft_of_a_generator_that_has_changed_is_refused(routed, change, error, message):
    model = routed()
    draft = model.draft(*_inputs([0.0, 1.0]), exit=1)
    change(model)
    with pytest.raises(error, match=message):
        draft.finish()


@pytest.mark.parametrize(
    ("rows", "exit", "message"),
    [
        ([2], None, r"rows must be a list of sample numbers from 0 to 1, got \[2\]. Pass draft.finish\(\[0\]\)"),
        ([-1], None, r"got \[-1\]"),
        ([], None, r"got \[\]"),
        ([0.5], None, r"got \[0.5\]"),
        (1, None, "got 1"),
        ("first", None, "got first"),
        (torch.tensor([True, False]), None, "from 0 to 1, got tensor"),
        (None, 5, "exit must be an integer from 1 to 4, the backbone, got 5"),
    ],
)
def test_samples_and_exits_that_do_not_exist_are_refused(routed, rows, exit, message):
    draft = routed().draft(*_inputs([0.0, 1.0]), exit=1)
    with pytest.raises(OptionError, match=message):
        draft.finish(rows, exit)


def test_a_draft_says_what_it_holds_and_frees_it(routed):
    model, inputs = routed(), _inputs([0.0, 1.0])
    with pytest.raises(OptionError, match=r"a draft needs exit, threshold, .* got none of them. Pass exit=1"):
        model.draft(*inputs)
    with model.draft(*inputs, exit=1) as draft:
        crossing = model.split.crossing(model.split.begin(inputs, {}).values, 0)
        assert draft.nbytes == sum(value.nbytes for value in crossing)
        image = draft.finish([1])["image"]
    assert draft.nbytes == 0 and draft.image["image"].shape[0] == 2 and len(image) == 1
    with pytest.raises(OptionError, match=r"must be open, got a closed one. Finish it before close\(\)"):
        draft.finish()
