"""The MegaPortraits adapter: MACs, blocks, keys of the frame bank."""

import torch
from retroexit_megaportraits import MegaPortraitsG2d, ResidualBlock, frame_key


def small():
    return MegaPortraitsG2d(in_channels=24, channels=64, size=4).eval()


def test_a_block_adds_two_normalised_convolutions_to_its_shortcut():
    block = ResidualBlock(3, 2, up=True).eval()
    with torch.no_grad():
        for name, value in block.state_dict().items():
            if name.startswith("norm") and "num_batches" not in name:
                value.uniform_(0.5, 2)
    x, weights = torch.randn(2, 3, 4, 4), block.state_dict()

    def norm(name, x):
        parts = ("weight", "bias", "running_mean", "running_var")
        gain, shift, mean, variance = (weights[f"{name}.{part}"][:, None, None] for part in parts)
        return gain * (x - mean) / (variance + 1e-5).sqrt() + shift

    def conv(name, x):
        weight = weights[f"{name}.weight"]
        return torch.conv2d(x, weight, padding=weight.shape[-1] // 2)

    def double(x):
        """Give each new pixel 3/4 of the old one and 1/4 of the neighbour it leans to, along both axes."""
        for axis in (2, 3):
            n = x.shape[axis]
            near = torch.arange(2 * n) // 2
            lean = (near + torch.where(torch.arange(2 * n) % 2 == 0, -1, 1)).clamp(0, n - 1)
            x = 0.75 * x.index_select(axis, near) + 0.25 * x.index_select(axis, lean)
        return x

    dx = conv("conv_1", norm("norm_1", conv("conv_0", double(norm("norm_0", x).relu()))).relu())
    torch.testing.assert_close(block(x), conv("shortcut", double(x)) + dx)


def test_a_frame_key_is_angles_then_expression_at_a_single_location():
    angles, expression = torch.randn(4, 3), torch.randn(4, 512)
    key = frame_key(angles, expression)
    assert key.shape == (4, 515, 1, 1)
    assert torch.equal(key[:, :3, 0, 0], angles)
    assert torch.equal(key[:, 3:, 0, 0], expression)
