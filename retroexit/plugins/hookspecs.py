"""Every hook that a plug-in may implement: signatures and documentation, nothing else.

A plug-in is a module (or any object) whose functions carry `hookimpl`; a distribution announces it under the
entry-point group ``retroexit``. A hook may leave out arguments that it does not need. Wrappers are not
supported: every result has one author, so that a mistake can be reported under its name.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Final

import pluggy
from torch import nn

from retroexit.plugins.description import Description

if TYPE_CHECKING:
    from retroexit.evaluation.quality import QualityMetric
    from retroexit.retrieval import Retriever

__all__ = [
    "GROUP",
    "hookimpl",
    "hookspec",
    "retroexit_describe",
    "retroexit_metrics",
    "retroexit_retrievers",
]

GROUP: Final = "retroexit"
"""Name of the entry-point group, and of the project in the eyes of pluggy."""

hookspec = pluggy.HookspecMarker(GROUP)
hookimpl = pluggy.HookimplMarker(GROUP)


@hookspec(firstresult=True)
def retroexit_describe(generator: nn.Module) -> Description | None:
    """Recognise a generator and describe it; the first plug-in that does is believed.

    Args:
        generator: The user's trained model. It must be neither run nor changed here.

    Returns:
        The description, or ``None`` for a generator that this plug-in does not know.
    """


@hookspec
def retroexit_retrievers() -> dict[str, type[Retriever]]:  # type: ignore[empty-body]
    """Offer nearest-neighbour back-ends for the guidance bank.

    Returns:
        Classes by the name under which users ask for them. Import heavy dependencies when an object is made.
    """


@hookspec
def retroexit_metrics() -> dict[str, Callable[..., QualityMetric]]:  # type: ignore[empty-body]
    """Offer measures of the distance between an exit's image and the backbone's.

    Returns:
        Factories by the name under which users ask for them; calling one makes the metric.
    """
