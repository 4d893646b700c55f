"""The same window of features, guide and image."""

import numpy as np
import pytest
import torch
from decoders import SETTINGS, Copying, Distance, fit, make, wrap

import retroexit
from retroexit.errors import OptionError
from retroexit.training.steps import Cropper


def _coordinates(height, width):
    """A map ``(3, H, W)`` whose values are the coordinates."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack([rows / 16 - 0.5, columns / 16 - 0.5, torch.zeros(height, width)])


@pytest.mark.parametrize("guidance", [None, True])
def test_windows_of_features_guide_and_image_coincide(tmp_path, guidance):
    # Equal inputs, so that a guide from another sample shows the same places.
    inputs = _coordinates(4, 6)[None].repeat(8, 1, 1, 1)
    guidance = guidance and retroexit.Guidance(value_after=2)
    stages, seen, targets = [f"stages.{i}" for i in range(3)], [], []
    model = wrap(make(Copying), stages=stages, guidance=guidance, example_inputs=(inputs[:2],))

    class Watching(Distance):
        def compare(self, a, b):
            targets.append(b.detach().clone())
            return super().compare(a, b)

    def note(branch, args, kwargs):
        if branch.training:
            seen.append((args[0].clone(), kwargs["guide"]))

    for branch in model.branches:
        branch.register_forward_pre_hook(note, with_kwargs=True)
    fit(model, tmp_path, inputs, metric=Watching(), steps=5, crop=8)
    windows = (SETTINGS["batch"], 3, 8, 8)
    targets = [image for image in targets if image.shape == windows][1:]  # the first one is a trial
    seen = seen[2:]  # one call of each branch tries the layout of its weights
    assert len(seen) == len(targets) == 10
    for index, ((feature, guide), target) in enumerate(zip(seen, targets, strict=True)):
        ratio = 2 if index % 2 else 4
        assert feature.shape[2:] == (8 // ratio, 8 // ratio)
        assert torch.equal(feature, target[:, :, ::ratio, ::ratio])
        if guidance:
            assert guide is not None and guide.shape[2:] == (4, 4)
            # Values are stored in half precision.
            assert torch.allclose(guide, target[:, :, ::2, ::2], atol=1e-3)
    corners = {(float(t[0, 0, 0]), float(t[1, 0, 0])) for target in targets for t in target}
    assert len(corners) > 5


def test_offsets_reach_every_window_on_the_grid():
    cropper = Cropper.for_maps(8, (16, 24), [(4, 6), (8, 12)])
    corners = {tuple(corner) for corner in cropper.offsets(2000, np.random.default_rng(0)).tolist()}
    assert corners == {(i, j) for i in range(0, 9, 4) for j in range(0, 17, 4)}


def test_windows_equal_slices_taken_one_by_one():
    cropper = Cropper.for_maps(8, (16, 24), [(4, 6)])
    image, feature = torch.rand(5, 3, 16, 24), torch.rand(5, 7, 4, 6)
    offsets = cropper.offsets(5, np.random.default_rng(1))
    for row, (top, left) in enumerate(offsets.tolist()):
        assert torch.equal(cropper(image, offsets)[row], image[row, :, top : top + 8, left : left + 8])
        cell = feature[row, :, top // 4 : top // 4 + 2, left // 4 : left // 4 + 2]
        assert torch.equal(cropper(feature, offsets)[row], cell)


def test_other_tensors_pass_and_a_shared_map_is_cut_for_every_sample():
    cropper = Cropper.for_maps(8, (16, 24), [(4, 6), (1, 1)])
    offsets = cropper.offsets(3, np.random.default_rng(1))
    for other in (torch.rand(3, 9), torch.rand(3, 9, 1, 1), torch.rand(9, 4, 3, 3), torch.rand(3, 9, 5)):
        assert cropper(other, offsets) is other
    shared = torch.rand(1, 2, 4, 6)
    assert torch.equal(cropper(shared, offsets), cropper(shared.repeat(3, 1, 1, 1), offsets))


def test_windows_as_large_as_the_image_are_the_image():
    image = torch.rand(2, 3, 16, 16)
    for size in (None, 16, 100):
        cropper = Cropper.for_maps(size, (16, 16), [(4, 4)])
        assert cropper(image, cropper.offsets(2, np.random.default_rng(0))) is image


@pytest.mark.parametrize(
    ("size", "maps", "message"),
    [
        (6, [(4, 4)], "crop must be a multiple of 4, got 6"),
        (0, [], "crop must be a multiple of 1, got 0"),
        (8, [(5, 5)], r"divide the image's, \(16, 16\), got \(5, 5\)"),
        (8, [(4, 8)], r"got \(4, 8\). Train on whole images \(crop=None\)"),
    ],
)
def test_wrong_sizes_are_refused(size, maps, message):
    with pytest.raises(OptionError, match=message):
        Cropper.for_maps(size, (16, 16), maps)
