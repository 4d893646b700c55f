"""Name the line of the user's code that is running, for messages."""

from __future__ import annotations

import linecache
import sys
import sysconfig
from importlib.util import find_spec
from pathlib import Path
from types import FrameType

__all__ = ["is_user_code", "show", "user_line"]

_OURS = str(Path(__file__).parents[1])
_DEMO = str(Path(_OURS, "demo"))  # holds a generator, which counts as the user's
_LIBRARIES = tuple(
    str(Path(spec.origin).parent) for name in ("torch", "sympy") if (spec := find_spec(name)) and spec.origin
)
_STANDARD = sysconfig.get_paths()["stdlib"]


def is_user_code(filename: str) -> bool:
    """Return whether a file belongs neither to PyTorch, nor to Python, nor to this library."""
    installed = "site-packages" in filename or "dist-packages" in filename
    is_standard = (filename.startswith(_STANDARD) and not installed) or filename.startswith(
        ("<frozen", "<retroexit")
    )
    is_ours = filename.startswith(_OURS) and not filename.startswith(_DEMO)
    return not is_standard and not is_ours and not filename.startswith(_LIBRARIES)


def user_line() -> tuple[str, int] | None:
    """Find the innermost running line of the user's code.

    Returns:
        File and line number; ``None`` where another file of this library, than the calling one, runs further
        in. Never a frame, which would keep the tensors of all callers alive.
    """
    frame: FrameType | None = sys._getframe(1)
    caller = sys._getframe(1).f_code.co_filename
    while frame is not None:
        filename = frame.f_code.co_filename
        if is_user_code(filename):
            return filename, frame.f_lineno
        if filename.startswith(_OURS) and filename != caller:
            return None
        frame = frame.f_back
    return None


def show(place: tuple[str, int]) -> str:
    """Format a line as ``file:number: code``."""
    filename, number = place
    return f"{filename}:{number}: {linecache.getline(filename, number).strip()}"
