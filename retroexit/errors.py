"""Every exception and warning of retroexit.

Each error derives from `RetroExitError` and from the builtin a caller would expect, and its text says
what was asked, what was found, and what to do next.

    RetroExitError
    |-- GeneratorError          the generator cannot be used as it stands
    |   |-- ModeError               train/eval flags are not what the recording needs
    |   |-- DeviceError             generator and inputs disagree about device or precision
    |   |-- NonFiniteError          NaN or infinity in an output
    |   `-- OutputError             no image, or several, in what the generator returns
    |-- RecordingError          one execution could not be written down as a graph
    |   `-- NotRecordedError        something needs a recording and there is none yet
    |-- AttachPointError        no branch can sit at this place
    |   `-- RepeatedStageError      the module runs more than once
    |-- BranchError             a thin copy could not be made
    |-- InputMismatchError      the inputs differ from the recording where that matters
    |-- OptionError             an argument has a value outside its range
    |-- BankError               a guidance bank is empty, damaged, or another backbone's
    |-- RetrieverError          keys or queries that no index may be given
    |-- WeightsError            pretrained weights are missing or are not what they claim
    |-- MissingExtraError       an optional dependency is not installed
    |-- CheckpointError         a file on disk is damaged or belongs to something else
    |-- TrainingError           training cannot start or go on
    |-- PluginError             a plug-in is broken or two claim one name
    `-- AdapterError            an adapter fails its conformance test
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = [
    "AdapterError",
    "AttachPointError",
    "BankError",
    "BranchError",
    "CheckpointError",
    "DeviceError",
    "GeneratorError",
    "InputMismatchError",
    "MissingExtraError",
    "ModeError",
    "NonFiniteError",
    "NotRecordedError",
    "OptionError",
    "OutputError",
    "PluginError",
    "RecordingError",
    "RepeatedStageError",
    "RetrieverError",
    "RetroExitError",
    "RetroExitWarning",
    "TrainingError",
    "WeightsError",
]


class RetroExitError(Exception):
    """Base of every error that retroexit raises on purpose.

    Attributes:
        subject: The object at fault (a stage, a path, a tensor shape, a file...), or ``None``.
    """

    def __init__(self, message: str, subject: object = None) -> None:
        super().__init__(message)
        self.subject = subject


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
    """One execution of the generator could not be written down as a graph."""


class NotRecordedError(RecordingError):
    """Something needs a recording of the generator and there is none yet."""


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
    """Pretrained weights are missing or are not what they claim to be."""

    def __str__(self) -> str:  # OSError would format its arguments as (errno, strerror)
        return str(self.args[0]) if self.args else ""


class MissingExtraError(RetroExitError, ImportError):
    """An optional dependency is not installed; the text holds the pip line."""


class CheckpointError(RetroExitError, ValueError):
    """A file on disk is damaged or belongs to something else."""


class TrainingError(RetroExitError, RuntimeError):
    """Training cannot start or go on."""


class PluginError(RetroExitError, RuntimeError):
    """A plug-in is broken, or two plug-ins claim one name."""


class AdapterError(RetroExitError, AssertionError):
    """An adapter fails its conformance test; the text lists everything that was found wrong.

    Attributes:
        problems: One line for each.
    """

    def __init__(self, message: str, subject: object = None, problems: tuple[str, ...] = ()) -> None:
        super().__init__(message, subject)
        self.problems = problems


class RetroExitWarning(UserWarning):
    """Category of every warning that retroexit issues."""


def cause_of(error: BaseException) -> str:
    """Format an exception in one line, with its type if it is not one of retroexit's."""
    text = " ".join(str(error).split())
    return text if isinstance(error, RetroExitError) else f"{type(error).__name__}: {text}"


def closest(wanted: object, known: Iterable[str], most: int = 3) -> str:
    """Format the known names nearest to a wrong one, for the end of an error message."""
    known = list(known)
    near = difflib.get_close_matches(str(wanted), known, n=most, cutoff=0.3) or known[:most]
    return ", ".join(repr(name) for name in near)
