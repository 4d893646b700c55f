"""A saved model is the model, and so is a copy of it: over norms, stages, wrappers and precisions."""

import copy
import io
import pickle
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

import retroexit
from retroexit.core.identity import Identity, fingerprint
from retroexit.errors import CheckpointError, GeneratorError

NORMS = {
    "none": lambda c: [],
    "relu": lambda c: [nn.ReLU()],
    "prelu": lambda c: [nn.PReLU(c)],
    "batch norm": lambda c: [nn.BatchNorm2d(c), nn.ReLU()],
    "batch norm without statistics": lambda c: [nn.BatchNorm2d(c, track_running_stats=False), nn.ReLU()],
    "instance norm": lambda c: [nn.InstanceNorm2d(c, affine=True), nn.LeakyReLU(0.2)],
    "group norm": lambda c: [nn.GroupNorm(4, c), nn.SiLU()],
    "norm in front": lambda c: [nn.ReLU(), nn.BatchNorm2d(c)],
    "dropout": lambda c: [nn.BatchNorm2d(c), nn.ReLU(), nn.Dropout(0.5)],
}
X = torch.randn(3, 4, 12, 12, generator=torch.Generator().manual_seed(5))
EXAMPLE = (X[:2],)


def flat(norm):
    """Four convolutions, each closed by modules beside it."""
    torch.manual_seed(0)
    layers = [m for i in range(4) for m in (nn.Conv2d(16 if i else 4, 16, 3, padding=1), *NORMS[norm](16))]
    return nn.Sequential(*layers, nn.Conv2d(16, 3, 3, padding=1)).eval()


def wrapped(generator, **settings):
    settings = {"attach_at": [1, 2, 3], "example_inputs": EXAMPLE, "image_range": (-1, 1)} | settings
    return retroexit.wrap(generator, scale=1 / 2, min_channels=4, **settings)


def renders(model, x=X):
    """What a copy must reproduce bit for bit: features at every cut, and the image of every exit."""
    with torch.no_grad():
        return [*model.features(x), *model.all_exits(x)]


def assert_same(model, again, x=X):
    for a, b in zip(renders(model, x), renders(again, x), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("stages", [None, ("0", "{1}", "{2}", "{3}")], ids=["found", "given"])
def test_a_loaded_model_has_the_cuts_it_was_saved_with(norm, stages, tmp_path):
    generator = flat(norm)
    step = 1 + len(NORMS[norm](4))
    given = None if stages is None else [str(step * i) for i in range(4)]
    model = wrapped(generator, stages=given)
    assert [stage.path for stage in model.decomposition.places] == [str(step * i) for i in range(3)]
    again = retroexit.load(model.save(tmp_path / "m"), generator, EXAMPLE)
    assert_same(model, again)
    ends = [stage.end for stage in model.decomposition.places]
    assert ends == [stage.end for stage in again.decomposition.places]


@pytest.mark.parametrize("at", [["0"], ["1"], ["2"]])
def test_a_named_layer_is_cut_where_its_name_says_after_loading_too(at, tmp_path):
    generator = flat("batch norm")
    model = wrapped(generator, attach_at=at)
    assert_same(model, retroexit.load(model.save(tmp_path / "m"), generator, EXAMPLE))


def test_another_process_loads_the_same_model(tmp_path):
    model = wrapped(flat("batch norm"))
    folder = model.save(tmp_path / "m")
    subprocess.run([sys.executable, __file__, str(folder), str(tmp_path / "renders.pt")], check=True)
    elsewhere = torch.load(tmp_path / "renders.pt")
    assert all(torch.equal(a, b) for a, b in zip(elsewhere, renders(model), strict=True))


def _through_file(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": _through_file,
    "averaged": lambda model: AveragedModel(model).module,
    "copy of a copy": lambda model: copy.deepcopy(copy.deepcopy(model)),
}


@pytest.mark.parametrize("kind", COPIES)
@pytest.mark.parametrize("norm", ["batch norm", "group norm"])
def test_a_copy_is_the_model_and_apart_from_it(kind, norm):
    model = wrapped(flat(norm))
    with torch.no_grad():  # as after training
        for parameter in model.branches.parameters():
            parameter.mul_(1.5)
    model.branches[0].requires_grad_(False)
    before = renders(model)
    twin = COPIES[kind](model)
    assert isinstance(twin, retroexit.EarlyExitGenerator)
    assert_same(model, twin)
    flags = [p.requires_grad for p in model.parameters()]
    assert [p.requires_grad for p in twin.parameters()] == flags
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert all(torch.equal(a, b) for a, b in zip(before, renders(model), strict=True))


def test_a_fitted_model_is_copied_with_predictor_and_bank(tmp_path):
    model = wrapped(flat("batch norm"), attach_at=[2, 3], guidance=retroexit.Guidance(size=8))
    settings = {"metric": "ms-ssim", "steps": 2, "batch": 4, "predictor_steps": 2, "progress": False}
    samples = list(torch.randn(12, 4, 12, 12, generator=torch.Generator().manual_seed(2)))
    retroexit.fit(model, samples, tmp_path / "m", **settings)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert_same(model, twin)
        assert torch.equal(model.predict(X), twin.predict(X))
        assert torch.equal(model.choose_exits(X, threshold=0.1), twin.choose_exits(X, threshold=0.1))
        assert twin.about == model.about


def test_a_model_that_was_converted_or_not_recorded_is_copied():
    model = wrapped(flat("relu")).to(torch.bfloat16)
    assert_same(model, copy.deepcopy(model), X.bfloat16())
    twin = copy.deepcopy(wrapped(flat("relu"), example_inputs=None))
    assert not twin.is_recorded and twin(X, exit=1).shape == (3, 3, 12, 12)


# The identity of a generator.

WRAPPERS = {
    "compiled": lambda g: torch.compile(g, backend="eager"),
    "data parallel": nn.DataParallel,
    "both": lambda g: nn.DataParallel(torch.compile(g, backend="eager")),
    "compiled block": lambda g: nn.Sequential(torch.compile(g[0], backend="eager"), *g[1:]),
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_wrappers_do_not_change_which_generator_it_is(wrapper, tmp_path):
    generator = flat("batch norm")
    model = wrapped(generator)
    folder = model.save(tmp_path / "m")
    other = WRAPPERS[wrapper](flat("batch norm"))
    assert fingerprint(other) == fingerprint(generator)
    if wrapper != "compiled block":
        assert_same(model, retroexit.load(folder, other, EXAMPLE))
        assert_same(model, wrapped(other))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_generator_is_recognised_in_another_precision(dtype, tmp_path):
    model = wrapped(flat("batch norm"))
    folder = model.save(tmp_path / "m")
    other = flat("batch norm").to(dtype)
    assert Identity.of(model.generator).difference(Identity.of(other)) == ""
    again = retroexit.load(folder, other, (EXAMPLE[0].to(dtype),))
    assert again(X.to(dtype), exit=1).dtype == dtype
    with torch.no_grad():
        other[0].weight.mul_(1.1)
    with pytest.raises(CheckpointError, match=r"weights differ in 1 of .*: 0\.weight"):
        retroexit.load(folder, other, (EXAMPLE[0].to(dtype),))


def _narrow(generator):
    generator[0] = nn.Conv2d(4, 16, 1)
    return generator


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda g: g[:-1], r"it comes without \d+\.bias, \d+\.weight"),
        (lambda g: g.append(nn.Linear(1, 1)), r"it comes with new \d+\.bias, \d+\.weight"),
        (_narrow, r"0\.weight has the shape \(16, 4, 1, 1\) instead of \(16, 4, 3, 3\)"),
        (lambda g: nn.Sequential(g[0]), "it comes without"),
        (lambda g: g[0], "its class is Conv2d instead of Sequential"),
    ],
)
def test_the_message_says_how_another_generator_differs(change, says):
    identity = Identity.of(flat("relu"))
    assert Identity.from_json(identity.to_json()) == identity
    with pytest.raises(AssertionError, match=says):
        raise AssertionError(identity.difference(Identity.of(change(flat("relu")))))


def test_branches_of_other_weights_are_refused(tmp_path):
    model = wrapped(flat("batch norm"))

    def fit():
        settings = {"metric": "ms-ssim", "steps": 2, "predictor_steps": 2, "progress": False}
        retroexit.fit(model, list(X.repeat(4, 1, 1, 1)), tmp_path / "a", **settings)

    fit()
    with torch.no_grad():
        model.generator[0].weight.add_(1e-3)
    for attempt in (lambda: model.save(tmp_path / "b"), lambda: model.calibrate(list(X)), fit):
        with pytest.raises(GeneratorError, match=r"other weights of Sequential: .*0\.weight.*wrap and fit it again"):
            attempt()
    assert not (tmp_path / "b").exists()


def test_buffers_that_are_computed_do_not_count():
    generator = flat("relu")
    generator.register_buffer("grid", torch.zeros(3), persistent=False)
    before = Identity.of(generator)
    generator.register_buffer("grid", torch.ones(5), persistent=False)
    assert before.difference(Identity.of(generator)) == ""


if __name__ == "__main__":
    torch.save(renders(retroexit.load(sys.argv[1], flat("batch norm"), EXAMPLE)), sys.argv[2])
