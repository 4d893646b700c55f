"""A decoder that also takes the pose and expression, the key of its frame bank (FIANCEE, section 4.2)."""

from __future__ import annotations

from torch import Tensor, nn

from retroexit_megaportraits.frames import frame_key

__all__ = ["DrivenG2d", "driver_key"]


class DrivenG2d(nn.Module):
    """Pass the feature to a decoder; head angles and expression of the driver are arguments for the bank only.

    G2d itself takes only the feature. An early exit looks up the most similar frame of the source by the driver's
    pose and expression, so they must be among the generator's arguments.

    Args:
        decoder: A `MegaPortraitsG2d`, or any module that makes an image from one feature map.
    """

    def __init__(self, decoder: nn.Module) -> None:
        super().__init__()
        self.decoder = decoder
        self.train(decoder.training)

    def forward(self, feature: Tensor, angles: Tensor, expression: Tensor) -> Tensor:
        """Make an image of the feature; the other arguments are not used.

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
    """Return the keys ``(N, 515)`` of the arguments of a `DrivenG2d`; see `frame_key`."""
    return frame_key(angles, expression).flatten(1)
