"""Name the line of somebody's code at which something happens, for messages that say where to look."""

from __future__ import annotations

import linecache
import sys
import sysconfig
from importlib.util import find_spec
from pathlib import Path
from types import FrameType

__all__ = ["is_user_code", "show", "user_line"]

_OURS = str(Path(__file__).parents[1])
_CALLS = str(Path(__file__).with_name("record.py"))
_DEMO = str(Path(_OURS, "demo"))  # a generator like anybody's
_LIBRARIES = tuple(
    str(Path(spec.origin).parent) for name in ("torch", "sympy") if (spec := find_spec(name)) and spec.origin
)
_STANDARD = sysconfig.get_paths()["stdlib"]


def is_user_code(filename: str) -> bool:
    """Tell whether a file is neither PyTorch's, nor Python's, nor ours."""
    installed = "site-packages" in filename or "dist-packages" in filename
    is_standard = (filename.startswith(_STANDARD) and not installed) or filename.startswith("<frozen")
    is_ours = filename.startswith(_OURS) and not filename.startswith(_DEMO)
    return not is_standard and not is_ours and not filename.startswith(_LIBRARIES)


def user_line(past_calls: bool = False) -> tuple[str, int] | None:
    """Find the innermost running line that belongs neither to PyTorch, nor to Python, nor to this library.

    Args:
        past_calls: Whether to look past the recorder's stand-in for calls of modules.

    Returns:
        File and line number; ``None`` also where one of our own files (other than the asking one) lies
        further in. Never a frame: one that is kept keeps every tensor of its callers alive.
    """
    frame: FrameType | None = sys._getframe(1)
    asking = sys._getframe(1).f_code.co_filename
    while frame is not None:
        filename = frame.f_code.co_filename
        if is_user_code(filename):
            return filename, frame.f_lineno
        if filename.startswith(_OURS) and filename != asking and not (past_calls and filename == _CALLS):
            return None
        frame = frame.f_back
    return None


def show(place: tuple[str, int]) -> str:
    """Format a line as ``file:number: code``."""
    filename, number = place
    return f"{filename}:{number}: {linecache.getline(filename, number).strip()}"
