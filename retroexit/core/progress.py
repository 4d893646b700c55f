"""Progress of long work: a bar in a terminal, a line now and then in a log."""

import sys
from collections.abc import Callable, Iterable
from typing import Any

from tqdm import tqdm

__all__ = ["progress_bar"]

_SECONDS = 4.0  # between two lines of a log
_LINE = "{desc}: {n_fmt} of {total_fmt}, {elapsed} passed, {remaining} left{postfix}"


class _Lines(tqdm):
    """Writes a line instead of drawing over the last one."""

    disable: bool

    @staticmethod
    def status_printer(file: Any) -> Callable[[str], None]:
        """Return what writes one state of the bar."""

        def write(text: str) -> None:
            file.write(text.strip() + "\n")
            file.flush()

        return write

    def close(self) -> None:
        """Write the last state, without the empty line of a bar."""
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
        return tqdm(work, disable=not show, **options)
    return _Lines(work, disable=not show, mininterval=_SECONDS, bar_format=_LINE, **options)
