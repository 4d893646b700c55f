"""Progress of long work: a bar in a terminal, a line now and then in a log."""

import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterable
from typing import Any

from tqdm import tqdm

__all__ = ["progress_bar"]

_SECONDS = 4.0  # between two lines of a log, at first
_SHARE, _MOST = 1 / 30, 60.0  # later that share of the time that has passed, up to a minute
_LINE = "{desc}: {n_fmt} of {total_fmt}, {elapsed} passed, {remaining} left{postfix}"


class _Bar(tqdm):
    """Shows the time that has passed also while a single step is slow."""

    disable: bool
    pause = _SECONDS

    def __init__(self, *args: Any, **options: Any) -> None:
        self.displayed, self.closed = time.monotonic(), threading.Event()
        super().__init__(*args, **options)
        if not self.disable:
            threading.Thread(target=_refresh, args=(weakref.ref(self), self.closed), daemon=True).start()

    def display(self, *args: Any, **options: Any) -> Any:
        """Show the present state."""
        self.displayed = time.monotonic()
        return super().display(*args, **options)

    def close(self) -> None:
        """Show the last state."""
        self.closed.set()
        super().close()


def _refresh(bar: weakref.ref[_Bar], closed: threading.Event) -> None:
    while not closed.wait(_SECONDS / 8):
        shown = bar()
        if shown is None:
            return
        if time.monotonic() >= shown.displayed + shown.pause:
            shown.refresh()
        del shown


class _Lines(_Bar):
    """Writes a line instead of drawing over the last one."""

    @staticmethod
    def status_printer(file: Any) -> Callable[[str], None]:
        """Return what writes one state of the bar, unless it is the one before."""
        last = ""

        def write(text: str) -> None:
            nonlocal last
            if text != last:
                file.write(text.strip() + "\n")
                file.flush()
            last = text

        return write

    def display(self, *args: Any, **options: Any) -> Any:
        """Write the present state, and less often the longer the work takes."""
        self.pause = self.mininterval = max(_SECONDS, min(_MOST, _SHARE * self.format_dict["elapsed"]))
        return super().display(*args, **options)

    def close(self) -> None:
        """Write the last state, without the empty line of a bar."""
        self.closed.set()
        if not self.disable:
            self.display()
            self.disable = True
            self._decr_instances(self)


def progress_bar(work: Iterable[Any] | None = None, *, show: bool, **options: Any) -> Any:
    """Show the progress of work on stderr; with ``work``, of iterating over it.

    Args:
        work: What to iterate over.
        show: Whether to show anything.
        **options: Options of `tqdm.tqdm`: ``desc``, ``total``, ``initial``.
    """
    if sys.stderr.isatty():
        return _Bar(work, disable=not show, **options)
    return _Lines(work, disable=not show, mininterval=_SECONDS, bar_format=_LINE, **options)
