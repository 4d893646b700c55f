"""Every exception and warning of retroexit, derived from the builtin exception that a caller would expect."""

import difflib
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar


class RetroExitError(Exception):
    """Base of every error that retroexit raises on purpose."""


class GeneratorError(RetroExitError, ValueError):
    """The generator cannot be used as it stands."""


class ModeError(GeneratorError):
    """The generator's train/eval flags are not what the recording needs."""


class DeviceError(GeneratorError):
    """The generator and its inputs disagree about device or precision."""


class NonFiniteError(GeneratorError):
    """An output holds NaN or infinity."""


class OutputError(GeneratorError):
    """The generator returns no image, or several."""


class RecordingError(RetroExitError, RuntimeError):
    """One execution of the generator could not be recorded as a graph."""


class NotRecordedError(RecordingError):
    """The generator must be recorded first; ``model`` is the one without exits.

    torch.compile passes this error on because it holds an object; it runs the code uncompiled after plain errors.
    """

    def __init__(self, message: str, model: object = None) -> None:
        super().__init__(message)
        self.model = model


class AttachPointError(RetroExitError, ValueError):
    """No branch can be attached at this place."""


class RepeatedStageError(AttachPointError):
    """The module runs more than once in a forward pass, so that "after it" is no single place."""


class BranchError(RetroExitError, RuntimeError):
    """A thin copy of the tail could not be made."""


class InputMismatchError(RetroExitError, ValueError):
    """The inputs differ from the recording where that matters."""


class OptionError(RetroExitError, ValueError):
    """An argument has a value outside its range."""


class BankError(RetroExitError, ValueError):
    """A guidance bank is empty, damaged, or belongs to another backbone."""


class RetrieverError(RetroExitError, ValueError):
    """Keys or queries that must not reach a search index."""


class WeightsError(RetroExitError, FileNotFoundError):
    """Pretrained weights are missing, or belong to another network."""

    def __str__(self) -> str:  # OSError would format its arguments as (errno, strerror)
        return str(self.args[0]) if self.args else ""


class MissingExtraError(RetroExitError, ImportError):
    """An optional dependency is not installed; the message holds the pip command."""


class CheckpointError(RetroExitError, ValueError):
    """A file on disk is damaged or belongs to something else."""


class StorageError(RetroExitError, OSError):
    """A file cannot be written: the disk is full, or the folder is not yours to write to."""


class TrainingError(RetroExitError, RuntimeError):
    """Training cannot start or continue."""


class QueueFull(RetroExitError, RuntimeError):
    """A scheduler has no room for another request."""


class WorkerError(RetroExitError, RuntimeError):
    """A worker of Ray cannot do its part."""


class PluginError(RetroExitError, RuntimeError):
    """A plug-in is broken, or two plug-ins claim one name."""


class AdapterError(RetroExitError, AssertionError):
    """An adapter fails its conformance test; ``problems`` has one line for each."""

    def __init__(self, message: str, problems: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.problems = problems


class RetroExitWarning(UserWarning):
    """Category of every warning that retroexit issues."""


_is_silent = ContextVar("_is_silent", default=False)


def warn(message: str, stacklevel: int) -> None:
    """Issue a `RetroExitWarning`; a ``stacklevel`` of 1 names the caller's own line."""
    if not _is_silent.get():
        warnings.warn(message, RetroExitWarning, stacklevel + 1)


@contextmanager
def silence() -> Iterator[None]:
    """Drop the warnings of `warn` in this thread; `warnings.catch_warnings` would act on all of them."""
    token = _is_silent.set(True)
    try:
        yield
    finally:
        _is_silent.reset(token)


def cause_of(error: BaseException) -> str:
    """Format an exception in one line, with its type if it is not one of retroexit's."""
    text = " ".join(str(error).split())
    return text if isinstance(error, RetroExitError) else f"{type(error).__name__}: {text}"


def closest(name: object, names: Iterable[str], most: int = 3) -> str:
    """Format the names nearest to a wrong one, for the end of an error message."""
    names = list(names)
    near = difflib.get_close_matches(str(name), names, n=most, cutoff=0.3) or names[:most]
    return ", ".join(repr(near_name) for near_name in near)
