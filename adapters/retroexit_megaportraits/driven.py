"""A decoder beside the pose and expression that its frame bank is searched with (FIANCEE, section 4.2)."""

from __future__ import annotations

from torch import Tensor, nn

from retroexit_megaportraits.frames import frame_key

__all__ = ["DrivenG2d", "driver_key"]


class DrivenG2d(nn.Module):
    """Hand a decoder its feature, and let head angles and expression of the driver pass by.

    G2d itself takes the feature alone; the driver is known to the modules in front of it. An early exit needs
    it to find the frame of the source that looks most alike, so it must be among the generator's arguments.

    Args:
        decoder: A `MegaPortraitsG2d`, or anybody's module that draws an image from one feature map.
    """

    def __init__(self, decoder: nn.Module) -> None:
        super().__init__()
        self.decoder = decoder
        self.train(decoder.training)

    def forward(self, feature: Tensor, angles: Tensor, expression: Tensor) -> Tensor:
        """Draw an image of the feature, whatever the other two say.

        Args:
            feature: What the decoder takes, batch first.
            angles: Angles of the driver's head, shape ``(N, 3)``.
            expression: The driver's encoded expression, shape ``(N, 512)``.

        Returns:
            The decoder's image.
        """
        image: Tensor = self.decoder(feature)
        return image


def driver_key(feature: Tensor, angles: Tensor, expression: Tensor) -> Tensor:
    """Give the keys ``(N, 515)`` of the arguments of a `DrivenG2d`; see `frame_key`."""
    return frame_key(angles, expression).flatten(1)
