"""Rows of images that show what each exit makes of one input, for reports and for README pictures."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from retroexit.errors import OptionError

__all__ = ["Strip", "data_address", "strip_image"]

_LONGEST_SIDE = 384  # pixels of an image in a page; ten strips of five then stay below 10 MB
_PICK = "#C44E00"


@dataclass(frozen=True)
class Strip:
    """The images of one input, side by side.

    Attributes:
        label: What the input is, such as ``"hardest input"``.
        images: Caption and pixels of each image; pixels have shape ``(H, W, 3)``, uint8.
        chosen: Place of the image that routing chose, from 0; ``None`` frames none.

    Raises:
        OptionError: If pixels have another shape or type, or ``chosen`` is not a place in ``images``.
    """

    label: str
    images: list[tuple[str, npt.NDArray[np.uint8]]]
    chosen: int | None

    def __post_init__(self) -> None:
        if self.chosen is not None and not 0 <= self.chosen < len(self.images):
            raise OptionError(
                f"strip {self.label!r}: chosen={self.chosen}, but there are {len(self.images)} images, from 0"
            )
        for caption, pixels in self.images:
            if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3 or pixels.size == 0:
                raise OptionError(
                    f"strip {self.label!r}, image {caption!r}: pixels need shape (H, W, 3) and type uint8, "
                    f"found {pixels.shape} and {pixels.dtype}"
                )


def strip_image(strips: Sequence[Strip], path: str | Path, *, width: int = 224) -> Path:
    """Write strips as one PNG, one row each, the chosen image framed.

    Args:
        strips: At least one.
        path: File to write; its folder is made if absent.
        width: Width of each image in pixels.

    Returns:
        ``path``.

    Raises:
        OptionError: If ``strips`` is empty.
    """
    from PIL import Image, ImageDraw, ImageFont

    if not strips:
        raise OptionError("a contact sheet needs at least one strip, found none")
    gap, line, frame = 10, 24, 5
    pictures = [[Image.fromarray(pixels) for _, pixels in strip.images] for strip in strips]
    heights = [max(round(width * p.height / p.width) for p in row) for row in pictures]
    columns = max(len(row) for row in pictures)
    size = (gap + columns * (width + gap), gap + sum(height + 2 * line + gap for height in heights))
    sheet = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(sheet)
    font: Any = ImageFont.load_default(size=15)
    y = gap
    for strip, row, height in zip(strips, pictures, heights, strict=True):
        pen.text((gap, y), strip.label, fill="black", font=font)
        top = y + line
        for place, ((caption, _), picture) in enumerate(zip(strip.images, row, strict=True)):
            x, chosen = gap + place * (width + gap), place == strip.chosen
            own = round(width * picture.height / picture.width)
            sheet.paste(picture.resize((width, own), Image.Resampling.LANCZOS), (x, top))
            if chosen:
                box = (x - frame, top - frame, x + width + frame - 1, top + own + frame - 1)
                pen.rectangle(box, outline=_PICK, width=frame)
            text = _fitting(f"chosen: {caption}" if chosen else caption, width, font)
            pen.text((x, top + height + frame), text, fill=_PICK if chosen else "#444444", font=font)
        y += height + 2 * line + gap
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path, format="PNG", optimize=True)
    return path


def _fitting(text: str, width: int, font: Any) -> str:
    """Shorten a caption to the width of its image."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "...") > width:
        text = text[:-1]
    return text + "..."


def data_address(pixels: npt.NDArray[np.uint8]) -> str:
    """Encode an image as a ``data:`` address, reduced to the size that the page can show."""
    from PIL import Image

    picture = Image.fromarray(pixels)
    picture.thumbnail((_LONGEST_SIDE, _LONGEST_SIDE), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    picture.save(file, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode("ascii")
