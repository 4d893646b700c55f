"""What a GPU may change, on the CPU and on a GPU: ``pytest tests/test_gpu.py`` on a machine with one."""

import pytest
import torch

import retroexit
from retroexit.core.modules import device_of
from retroexit.routing.predictor import Predictor


@pytest.fixture(params=[pytest.param("cpu", marks=pytest.mark.long), pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    return request.param


@pytest.fixture
def x(toys, device):
    return toys.TOYS["group_norm"]().args[0].repeat(2, 1, 2, 2).to(device)  # (4, 4, 16, 16)


@pytest.fixture
def generator(toys, device):
    return toys.TOYS["group_norm"]().generator.to(device)


def wrapped(generator, x, **settings):
    return retroexit.wrap(generator, [1, 2], 1 / 4, min_channels=8, example_inputs=(x[:2],), **settings)


def fitted(model, folder, **settings):
    samples = [torch.rand(4, 16, 16) for _ in range(8)]
    settings = {"steps": 2, "batch": 2, "predictor_steps": 2, "metric": "ms-ssim", "progress": False} | settings
    return retroexit.fit(model, samples, folder, **settings)


@torch.no_grad()
def test_the_final_exit_is_the_generator_bit_for_bit(generator, x):
    model, expected = wrapped(generator, x), generator(x)
    for image in (model(x), model(x, exit=3), model.all_exits(x)[-1]):
        assert image.device == x.device and torch.equal(image, expected)


@pytest.mark.parametrize("bfloat16", [False, True])
def test_a_fit_stays_on_the_device_and_routes(generator, x, device, tmp_path, bfloat16):
    model = fitted(wrapped(generator, x), tmp_path, bfloat16=bfloat16)
    assert {p.device.type for p in model.parameters()} == {device}
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    with torch.no_grad():
        assert model.predict(x).device == x.device
        for options in ({"threshold": 0.0}, {"threshold": [9.0, 0.0, 9.0, 0.0]}):
            image, exits = model.routed(x, **options)
            assert image.device == x.device and exits.shape == (4,)
            for row, exit in enumerate(exits.tolist()):
                torch.testing.assert_close(image[row], model(x, exit=exit)[row], atol=2e-3, rtol=1e-3)


def test_a_model_saved_on_the_device_runs_on_the_cpu_and_back(generator, x, device, tmp_path):
    model = fitted(wrapped(generator, x), tmp_path / "fit")
    with torch.no_grad():
        exits, losses = [model(x, exit=k) for k in (1, 2)], model.predict(x)
    loaded = retroexit.load(tmp_path / "fit", generator.cpu())
    for place, tolerance in (("cpu", 2e-3), (device, 0)):  # a GPU may round convolutions to TF32
        loaded.to(place)
        assert {p.device.type for p in loaded.parameters()} == {place}
        with torch.no_grad():
            for k, expected in zip((1, 2), exits, strict=True):
                image = loaded(x.to(place), exit=k)
                torch.testing.assert_close(image, expected.to(place), atol=tolerance, rtol=tolerance)
            predicted = loaded.predict(x.to(place))
            torch.testing.assert_close(predicted, losses.to(place), atol=max(tolerance, 1e-6), rtol=tolerance)


@torch.no_grad()
def test_a_draft_is_finished_on_the_device(generator, x):
    model = wrapped(generator, x)
    with model.draft(x, exit=1) as draft:
        assert torch.equal(draft.image, model(x, exit=1))
        assert torch.equal(draft.finish(), generator(x))
        rows = torch.tensor([3, 1], device=x.device)
        torch.testing.assert_close(draft.finish(rows), generator(x)[rows], atol=2e-3, rtol=1e-3)


@torch.no_grad()
def test_compiled_pieces_give_the_same_images(generator, x):
    torch.compiler.reset()
    model = wrapped(generator, x)
    choose = lambda losses, _limits: torch.tensor([1, 3, 2, 1], device=losses.device)  # noqa: E731
    model.router.predictor = Predictor(32, 2).to(x.device).eval()
    expected, _ = model.routed(x, choose=choose)
    model.compile(backend="eager")
    image, exits = model.routed(x, choose=choose)
    assert exits.tolist() == [1, 3, 2, 1]
    torch.testing.assert_close(image, expected, atol=2e-3, rtol=1e-3)


@torch.no_grad()
def test_exits_follow_the_model_to_bfloat16(generator, x):
    model = wrapped(generator, x)
    exact = [model(x, exit=k) for k in (1, 2)]
    model.to(torch.bfloat16)
    for k, expected in zip((1, 2), exact, strict=True):
        image = model(x.bfloat16(), exit=k)
        assert image.dtype == torch.bfloat16 and image.device == x.device
        torch.testing.assert_close(image.float(), expected, rtol=0.05, atol=0.05)


def test_guides_from_the_bank_are_on_the_device(generator, x, handed, tmp_path):
    model = fitted(wrapped(generator, x, guidance=retroexit.Guidance(size=8)), tmp_path)
    guides = handed(model.branches[0])
    with torch.no_grad():
        image, exits = model.routed(x, threshold=9.0)
    assert exits.tolist() == [1] * 4 and image.device == x.device
    assert [guide.device for guide in guides] == [x.device]
    assert len(model.bank) == 8


def test_programs_exported_on_the_device_give_its_images(generator, x, tmp_path):
    model = wrapped(generator, x)
    bundle = retroexit.load_bundle(retroexit.export(model, tmp_path / "bundle", "torch", verify=False))
    assert bundle.manifest["device"] == str(device_of(generator))
    with torch.no_grad():
        for k in (1, 2, 3):
            images, _ = bundle.run(x.cpu().numpy(), exit=k)
            torch.testing.assert_close(torch.from_numpy(images), model(x, exit=k).cpu(), atol=2e-3, rtol=1e-3)
