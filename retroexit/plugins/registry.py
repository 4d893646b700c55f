"""Whether an offered thing can be used, and making one from its factory."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from retroexit.errors import OptionError, PluginError, RetroExitError
from retroexit.plugins.info import PluginInfo, brief, cause_of

if TYPE_CHECKING:
    from retroexit.metrics import QualityMetric
    from retroexit.plugins.training_types import BatchTerm, Term

__all__ = ["check_retriever", "make_loss", "make_metric"]


def check_retriever(name: str, thing: Any) -> None:
    """Check a back-end before it is handed out.

    Raises:
        PluginError: If it is no complete subclass of `retroexit.retrieval.Retriever`, or has another name.
    """
    from retroexit.retrieval import Retriever

    if not (isinstance(thing, type) and issubclass(thing, Retriever)):
        raise PluginError(
            f"retriever {name!r} is {brief(thing)}; derive a class from retroexit.retrieval.Retriever", thing
        )
    if inspect.isabstract(thing):
        missing = ", ".join(sorted(thing.__abstractmethods__))
        raise PluginError(f"retriever {name!r} does not define {missing}", thing)
    own = getattr(thing, "name", None)
    if own != name:  # saved banks are read back by the class's name
        raise PluginError(f"retriever {name!r} has name = {own!r}; use one name for both", thing)


def make_metric(
    factory: Callable[..., Any], name: str, author: PluginInfo, options: dict[str, Any]
) -> QualityMetric:
    """Make a metric.

    Raises:
        OptionError: If it takes no such options.
        PluginError: If the factory raises, makes no `QualityMetric`, or one with another name.
        RetroExitError: What the factory says itself, such as `WeightsError`.
    """
    from retroexit.metrics import QualityMetric

    if not _takes(factory, options):
        raise OptionError(
            f"asked for the metric {name!r} with {', '.join(options)}; found that it takes no such thing. "
            "Leave it out.",
            options,
        )
    made = _make("metric", factory, name, author, options)
    if not isinstance(made, QualityMetric):
        raise PluginError(
            f"metric {name!r} of {author} made {brief(made)}; derive it from retroexit.metrics.QualityMetric",
            made,
        )
    own = getattr(made, "name", None)
    if own != name:  # a fitted model remembers its metric by this name
        raise PluginError(f"metric {name!r} of {author} has name = {own!r}; use one name for both", made)
    return made


def make_loss(
    factory: Callable[..., Any], name: str, author: PluginInfo, options: dict[str, Any]
) -> Term | BatchTerm:
    """Make a term of the training loss.

    Raises:
        OptionError: If it takes no such options.
        PluginError: If the factory raises or makes nothing that can be called.
    """
    if not _takes(factory, options):
        raise OptionError(
            f"asked for the loss {name!r} with {', '.join(options)}; found that it takes no such thing. "
            "Leave it out.",
            options,
        )
    made = _make("loss", factory, name, author, options)
    if not callable(made) and not callable(getattr(made, "of_batch", None)):
        raise PluginError(
            f"loss {name!r} of {author} made {brief(made)}; make something that compares two images",
            made,
        )
    term: Term | BatchTerm = made
    return term


def _takes(factory: Callable[..., Any], options: dict[str, Any]) -> bool:
    try:
        parameters = inspect.signature(factory).parameters
    except (TypeError, ValueError):  # some functions written in C tell nothing
        return True
    return any(p.kind is p.VAR_KEYWORD for p in parameters.values()) or set(options) <= set(parameters)


def _make(
    kind: str, factory: Callable[..., Any], name: str, author: PluginInfo, options: dict[str, Any]
) -> Any:
    try:
        return factory(**options)
    except RetroExitError:
        raise
    except Exception as error:
        given = f" with {', '.join(options)}" if options else ""
        raise PluginError(
            f"making the {kind} {name!r} of {author}{given} raised {cause_of(error)}", factory
        ) from error
